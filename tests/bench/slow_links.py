"""Pulls over links that throttle each connection: directly, through a peer, through pullcache.

A connection gets 10 MB/s, and 4 MB/s for the measurement of a range at the end of a blob.
"""

import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

from tests.bench import load
from tests.bench.content import MIB, BenchContent
from tests.bench.figures import Goal, LoadSize, Row, Runs
from tests.bench.load import Run
from tests.bench.testbed import MIRROR, PULLCACHE, UPSTREAM, ServerProcess, Testbed
from tests.system.http_client import send_request

MB = 10**6
LAYERS = 8
CONCURRENT_LAYERS = 3  # the default of docker and containerd
RATE = 10 * MB
TAIL_SIZE = 64 << 10
TAIL_RATE = 4 * MB


def measure(testbed: Testbed, size: LoadSize, directory: Path) -> Iterator[Row]:
    """Measure a pull of many layers, one large blob, and a range at the end of a blob."""
    layers = [size.throttled * 3 // 10 + number for number in range(LAYERS)]
    content = BenchContent(directory, hits=layers, cold=size.throttled, shared=size.throttled + 1)
    pulls, blobs, tails = Runs(), Runs(), Runs()
    for _ in range(size.slow_rounds):
        for name in (*testbed.with_other(PULLCACHE, MIRROR), UPSTREAM):
            with testbed.throttled(content, RATE) as url, testbed.running(name, url) as server:
                pulls.add(name, _pull(server, content, layers))
                blobs.add(
                    name, load.blobs(server, content.cold, size.throttled, seconds=0, clients=1)
                )
            # docker-registry sends the whole blob for a range of a blob that it has not stored yet.
            if name not in (MIRROR, UPSTREAM):
                with (
                    testbed.throttled(content, TAIL_RATE) as url,
                    testbed.running(name, url) as server,
                ):
                    tails.add(name, _fetch_tail(server, content))
    speeds = pulls.figures(lambda run: run.received / run.seconds / MB)
    work = f"{LAYERS} x {layers[0] // MB} MB, cold, {CONCURRENT_LAYERS} at a time"
    yield Row(work, "MB/s", speeds, Goal(">=", 2.5, UPSTREAM), digits=1)
    speeds = blobs.figures(lambda run: run.received / run.seconds / MB)
    work = f"{size.throttled // MIB} MiB blob, cold, one client"
    yield Row(work, "MB/s", speeds, Goal(">=", 3, UPSTREAM), digits=1)
    seconds = tails.figures(lambda run: run.seconds)
    work = f"last {TAIL_SIZE >> 10} KiB of {size.throttled // MIB} MiB, cold"
    yield Row(work, "s", seconds, Goal("<=", 2.5), digits=2)


def _pull(server: ServerProcess, content: BenchContent, layers: list[int]) -> Run:
    blobs = [(content.blobs[size], size) for size in layers]
    return load.pull(server, content.by_tag, blobs, clients=CONCURRENT_LAYERS)


def _fetch_tail(server: ServerProcess, content: BenchContent) -> Run:
    """Request the end of a blob, as lazy-pulling clients do for its table of contents."""
    started = time.perf_counter()
    response = send_request(server.url, content.shared, headers={"Range": f"bytes=-{TAIL_SIZE}"})
    seconds = time.perf_counter() - started
    assert response.status == HTTPStatus.PARTIAL_CONTENT, f"{server.name}: {response.status}"
    assert response.body == content.file(content.shared).read_bytes()[-TAIL_SIZE:], server.name
    return Run(seconds=seconds, requests=1, received=TAIL_SIZE)
