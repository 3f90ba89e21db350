"""Hits: stored manifests and blobs, over plain connections and TLS, for one client and for many."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

from tests.bench import load, proc
from tests.bench.content import DISK_BLOBS, GIB, KIB, MIB
from tests.bench.figures import Goal, LoadSize, Row, Runs
from tests.bench.load import Run
from tests.bench.testbed import CACHE, MIRROR, NGINX, OTHER, PULLCACHE, ServerProcess, Testbed

PLAIN, SECURED = (PULLCACHE, NGINX, CACHE, MIRROR), (PULLCACHE, NGINX)
OURS = (PULLCACHE, OTHER)
MANIFESTS = 35_000
# As long as Docker Hub's tokens are.
TOKEN = f"Authorization: Bearer {'x' * 900}"

Once = Callable[[ServerProcess], Run]


def plain(testbed: Testbed, size: LoadSize) -> Iterator[Row]:
    """Measure manifests and blobs with all peers."""
    with testbed.running_with_content(*PLAIN) as servers:
        # Manifests first, because the page cache after large blobs increases latencies.
        yield from _manifests(testbed, servers, size, "")
        yield from _odd_manifests(testbed, servers, size)
        yield from _blobs(testbed, servers, size, "")


def from_disk(testbed: Testbed, size: LoadSize) -> Iterator[Row]:
    """Measure blobs that are not in the page cache, as is usual if the store is larger than the memory."""
    length = max(size.hits)
    blobs = testbed.content.blobs
    many = [(blobs[one], one) for one in DISK_BLOBS]
    with testbed.running_with_content(PULLCACHE, NGINX) as servers:
        for name, wanted, clients in (
            (f"{len(many)} blobs of 1 MiB", many, 1),
            (f"{len(many)} blobs of 1 MiB", many, 8),
            (_blob_name(length), [(blobs[length], length)], 1),
            (_blob_name(length), [(blobs[length], length)] * 8, 8),
        ):
            runs = Runs()
            for _ in range(size.rounds):
                for server in servers:
                    for path in {path for path, _ in wanted}:
                        testbed.drop_from_memory(server, path)
                    runs.add(server.name, load.fetch(server, wanted, clients=clients))
            speeds = runs.figures(lambda run: run.received / run.seconds / 1e6)
            work = f"{name} from the disk, {_count(clients)}"
            yield Row(work, "MB/s", speeds, Goal(">=", 0.9, NGINX))
            spent = runs.figures(lambda run: run.server_cpu / (run.received / GIB))
            yield Row("  server's CPU", "s/GiB", spent, digits=3)


def secured(testbed: Testbed, size: LoadSize) -> Iterator[Row]:
    """Measure manifests and blobs over TLS with nginx, which does not use sendfile there either."""
    with testbed.running_with_content(*SECURED, tls=True) as servers:
        yield from _manifests(testbed, servers, size, ", TLS")
        yield from _blobs(testbed, servers, size, ", TLS")


def _seconds(size: LoadSize, length: int, clients: int) -> float:
    """Return the seconds of load: more if no client gets a whole blob in one second.

    Otherwise the time to connect would be a large part.
    """
    return size.seconds * (4 if clients * length > 8 * GIB else 1)


def _blobs(
    testbed: Testbed, servers: list[ServerProcess], size: LoadSize, how: str
) -> Iterator[Row]:
    for length in size.hits:
        path = testbed.content.blobs[length]
        for clients in size.connections:
            seconds = _seconds(size, length, clients)
            once: Once = partial(load.wrk, path=path, seconds=seconds, clients=clients)
            # For large blobs wrk's own work would count. Over TLS there is no cheaper client.
            if length >= MIB and not how:
                once = partial(load.blobs, path=path, size=length, seconds=seconds, clients=clients)
            runs = _alternately(servers, size, path, once)
            work = f"{_blob_name(length)}, {_count(clients)}{how}"
            if length < MIB:
                rates = runs.figures(lambda run: run.requests / run.seconds)
                yield Row(
                    work, "1/s", rates, Goal(">=", 0.9, MIRROR) if not how else None, more=True
                )
            else:
                speeds = runs.figures(lambda run: run.received / run.seconds / 1e6)
                yield Row(work, "MB/s", speeds, Goal(">=", 0.7 if how else 1.0, NGINX))
            yield from _latencies(runs)
            spent = runs.figures(lambda run: run.server_cpu / (run.received / GIB))
            goal = Goal("<=", 1.3, NGINX) if length >= MIB and not how else None
            yield Row("  server's CPU", "s/GiB", spent, goal, digits=3)
            yield _peak(runs)


def _manifests(
    testbed: Testbed, servers: list[ServerProcess], size: LoadSize, how: str
) -> Iterator[Row]:
    for what, path in (("tag", testbed.content.by_tag), ("digest", testbed.content.by_digest)):
        for clients in size.connections:
            once = partial(load.wrk, path=path, seconds=size.seconds, clients=clients)
            runs = _alternately(servers, size, path, once)
            many = clients == 32
            rates = runs.figures(lambda run: run.requests / run.seconds)
            goal = Goal(">=", MANIFESTS) if many and not how else None
            yield Row(f"manifest by {what}, {_count(clients)}{how}", "1/s", rates, goal, more=True)
            yield from _latencies(runs, Goal("<=", 5) if many and not how else None)
            spent = runs.figures(lambda run: run.server_cpu / max(1, run.requests) * 1e6)
            goal = Goal("<=", 1e6 / MANIFESTS) if many and not how else None
            yield Row("  server's CPU", "us", spent, goal)
            yield _peak(runs)


def _odd_manifests(testbed: Testbed, servers: list[ServerProcess], size: LoadSize) -> Iterator[Row]:
    """Measure requests as docker and containerd send them: with a token, and with the registry's name."""
    path = testbed.content.by_tag
    for what, target, headers in (
        ("with a token", path, (TOKEN,)),
        ("with ?ns=", f"{path}?ns=docker.io", ()),
    ):
        once = partial(load.wrk, path=target, seconds=size.seconds, clients=32, headers=headers)
        runs = _alternately(servers, size, target, once)
        rates = runs.figures(lambda run: run.requests / run.seconds)
        yield Row(f"manifest {what}, 32 clients", "1/s", rates, Goal(">=", MANIFESTS))


def _latencies(runs: Runs, goal: Goal | None = None) -> Iterator[Row]:
    """Yield the percentiles of the latencies, if every server completed a response in each round."""
    half = runs.figures(lambda run: run.p50 * 1e3)
    if all(any(values) for values in half.values()):
        yield Row("  50th percentile", "ms", half, digits=2)
        slow = runs.figures(lambda run: run.p99 * 1e3)
        yield Row("  99th percentile", "ms", slow, goal, digits=2)


def _peak(runs: Runs) -> Row:
    return Row("  peak memory", "MiB", runs.figures(lambda run: run.peak / MIB))


def _alternately(servers: list[ServerProcess], size: LoadSize, path: str, once: Once) -> Runs:
    """Run the load on each server in turn, with the content of `path` in memory.

    A peer that fails is reported and left out. docker-registry works on after its clients have disconnected, so
    each load waits until the servers are idle.
    """
    runs, failed = Runs(), set[str]()
    for _ in range(size.rounds):
        for server in servers:
            if server.name in failed:
                continue
            try:
                load.load_into_memory(server, path)
                proc.wait_until_idle(other.pid for other in servers)
                runs.add(server.name, once(server))
            except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
                if server.name in OURS:
                    raise
                failed.add(server.name)
                runs.forget(server.name)
                sys.stdout.write(f"left out: {error}\n"[:200])
    return runs


def _count(clients: int) -> str:
    return f"{clients} client{'s' if clients > 1 else ''}"


def _blob_name(length: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if length >= unit:
            return f"{length // unit} {name} blob"
    return f"{length} B blob"
