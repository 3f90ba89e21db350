"""Hits: what is in the store, over plain connections and TLS, for one client and for very many."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

from tests.bench import load, proc
from tests.bench.content import GIB, KIB, MIB
from tests.bench.figures import Goal, Row, Runs, Size
from tests.bench.load import Run
from tests.bench.stage import CACHE, MIRROR, NGINX, OTHER, PULLCACHE, Server, Stage

PLAIN, SECURED = (PULLCACHE, NGINX, CACHE, MIRROR), (PULLCACHE, NGINX)
OURS = (PULLCACHE, OTHER)
MANIFESTS = 20_000

Once = Callable[[Server], Run]


def plain(stage: Stage, size: Size) -> Iterator[Row]:
    """Measure all of it beside all peers."""
    with stage.warmed(*PLAIN) as servers:
        # First: what large blobs leave in memory is in the way of latencies.
        yield from _manifests(stage, servers, size, "")
        yield from _blobs(stage, servers, size, "")


def from_disk(stage: Stage, size: Size) -> Iterator[Row]:
    """Measure blobs that are not in memory, as most are in a store that is larger than it."""
    length = max(size.hits)
    path = stage.content.blobs[length]
    with stage.warmed(PULLCACHE, NGINX) as servers:
        for clients in (1, 8):
            runs = Runs()
            for _ in range(size.rounds):
                for server in servers:
                    stage.drop(server, path)
                    runs.add(
                        server.name, load.blobs(server, path, length, seconds=0, clients=clients)
                    )
            speeds = runs.figures(lambda run: run.received / run.seconds / 1e6)
            work = f"{_say(length)} from the disk, {_count(clients)}"
            yield Row(work, "MB/s", speeds, more=True)
            spent = runs.figures(lambda run: run.server_cpu / (run.received / GIB))
            yield Row("  server's CPU", "s/GiB", spent, digits=3)


def secured(stage: Stage, size: Size) -> Iterator[Row]:
    """Measure all of it over TLS beside nginx, which has no sendfile there either."""
    with stage.warmed(*SECURED, tls=True) as servers:
        yield from _manifests(stage, servers, size, ", TLS")
        yield from _blobs(stage, servers, size, ", TLS")


def _seconds(size: Size, length: int, clients: int) -> float:
    """Return how long to ask: where nobody gets a whole blob in a second, much of one would be connecting."""
    return size.seconds * (4 if clients * length > 8 * GIB else 1)


def _blobs(stage: Stage, servers: list[Server], size: Size, how: str) -> Iterator[Row]:
    for length in size.hits:
        path = stage.content.blobs[length]
        for clients in size.connections:
            seconds = _seconds(size, length, clients)
            once: Once = partial(load.wrk, path=path, seconds=seconds, clients=clients)
            # wrk's own work is not to be measured where bytes count; TLS it must read anyway.
            if length >= MIB and not how:
                once = partial(load.blobs, path=path, size=length, seconds=seconds, clients=clients)
            runs = _alternately(servers, size, path, once)
            work = f"{_say(length)}, {_count(clients)}{how}"
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


def _manifests(stage: Stage, servers: list[Server], size: Size, how: str) -> Iterator[Row]:
    for what, path in (("tag", stage.content.by_tag), ("digest", stage.content.by_digest)):
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


def _latencies(runs: Runs, goal: Goal | None = None) -> Iterator[Row]:
    """Yield how long answers took, if any came to its end."""
    half = runs.figures(lambda run: run.p50 * 1e3)
    if all(any(values) for values in half.values()):
        yield Row("  50th percentile", "ms", half, digits=2)
        slow = runs.figures(lambda run: run.p99 * 1e3)
        yield Row("  99th percentile", "ms", slow, goal, digits=2)


def _peak(runs: Runs) -> Row:
    return Row("  peak memory", "MiB", runs.figures(lambda run: run.peak / MIB))


def _alternately(servers: list[Server], size: Size, path: str, once: Once) -> Runs:
    """Run the same on each in turn, with what is at `path` in memory; a peer that does not stand it is left out, and that is said.

    docker-registry works on when its clients have left: it is waited for, or whoever comes next pays.
    """
    runs, failed = Runs(), set[str]()
    for _ in range(size.rounds):
        for server in servers:
            if server.name in failed:
                continue
            try:
                load.recall(server, path)
                proc.await_idle(other.pid for other in servers)
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


def _say(length: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if length >= unit:
            return f"{length // unit} {name} blob"
    return f"{length} B blob"
