"""Links whose every connection is throttled: direct, through a peer, through pullcache.

A connection has 10 MB/s, and 4 where the end of a blob is asked for.
"""

import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

from tests.bench import load
from tests.bench.content import MIB, Content
from tests.bench.figures import Goal, Row, Runs, Size
from tests.bench.load import Run
from tests.bench.stage import MIRROR, PULLCACHE, UPSTREAM, Server, Stage
from tests.system.wire import ask

MB = 10**6
LAYERS = 8
AT_ONCE = 3  # what docker and containerd fetch of an image at a time
RATE = 10 * MB
TAIL = 64 << 10
SLOW = 4 * MB


def measure(stage: Stage, size: Size, place: Path) -> Iterator[Row]:
    """Measure a pull of many layers, one large blob, and the end of one."""
    layers = [size.link * 3 // 10 + number for number in range(LAYERS)]
    content = Content(place, hits=layers, cold=size.link, crowd=size.link + 1)
    pulls, blobs, tails = Runs(), Runs(), Runs()
    for _ in range(size.few):
        for name in (*stage.among(PULLCACHE, MIRROR), UPSTREAM):
            with stage.throttled(content, RATE) as url, stage.fresh(name, url) as server:
                pulls.add(name, _pull(server, content, layers))
                blobs.add(name, load.blobs(server, content.cold, size.link, seconds=0, clients=1))
            # docker-registry answers a range of a blob that it does not have yet with all of it.
            if name not in (MIRROR, UPSTREAM):
                with stage.throttled(content, SLOW) as url, stage.fresh(name, url) as server:
                    tails.add(name, _tail(server, content))
    speeds = pulls.figures(lambda run: run.received / run.seconds / MB)
    work = f"{LAYERS} x {layers[0] // MB} MB, cold, {AT_ONCE} at a time"
    yield Row(work, "MB/s", speeds, Goal(">=", 2.5, UPSTREAM), digits=1)
    speeds = blobs.figures(lambda run: run.received / run.seconds / MB)
    work = f"{size.link // MIB} MiB blob, cold, one client"
    yield Row(work, "MB/s", speeds, Goal(">=", 3, UPSTREAM), digits=1)
    waits = tails.figures(lambda run: run.seconds)
    work = f"last {TAIL >> 10} KiB of {size.link // MIB} MiB, cold"
    yield Row(work, "s", waits, Goal("<=", 2.5), digits=2)


def _pull(server: Server, content: Content, layers: list[int]) -> Run:
    wanted = [(content.blobs[size], size) for size in layers]
    return load.pull(server, content.by_tag, wanted, clients=AT_ONCE)


def _tail(server: Server, content: Content) -> Run:
    """Ask for the end of a blob, as lazy pullers do that look for its table of contents."""
    began = time.perf_counter()
    answer = ask(server.url, content.crowd, headers={"Range": f"bytes=-{TAIL}"})
    seconds = time.perf_counter() - began
    assert answer.status == HTTPStatus.PARTIAL_CONTENT, f"{server.name}: {answer.status}"
    assert answer.body == content.file(content.crowd).read_bytes()[-TAIL:], server.name
    return Run(seconds=seconds, requests=1, received=TAIL)
