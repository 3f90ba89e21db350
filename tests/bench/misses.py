"""Misses: content that is not cached, with an empty store each time."""

import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.bench import load, proc
from tests.bench.content import GIB, MIB, BenchContent
from tests.bench.figures import Goal, LoadSize, Row, Runs
from tests.bench.load import Run
from tests.bench.many_clients import stalled
from tests.bench.testbed import CACHE, MIRROR, PULLCACHE, UPSTREAM, ServerProcess, Testbed
from tests.system.http_client import DownloadThread
from tests.system.images import make_image
from tests.system.processes import eventually, run

PEERS = (MIRROR, CACHE)
CLIENTS = 24
FAST = 8
LAYERS = 40
LAYER_SIZE = 512 << 10


def cold(testbed: Testbed, size: LoadSize, place: Path) -> Iterator[Row]:
    """Fetch one large blob, until the client has it and until the server's store has it."""
    path = testbed.content.cold
    runs = Runs()
    moved: dict[str, list[float]] = {}
    _touch(place / "touched", size.cold)
    for _ in range(size.rounds):
        for name in (*testbed.with_other(PULLCACHE, *PEERS), UPSTREAM):
            before = _recall(testbed, path)
            with testbed.running(name) as server:
                _begin(testbed, server)
                runs.add(name, _until_stored(testbed, server, path, size.cold))
            if name != UPSTREAM:
                sent = eventually(partial(_since, testbed, path, before), "upstream's log")
                moved.setdefault(name, []).append(sum(sent) / size.cold)
    speeds = runs.figures(lambda run: run.received / run.seconds / 1e6)
    yield Row(f"{size.cold // MIB} MiB blob, cold", "MB/s", speeds, more=True)
    first = runs.figures(lambda run: run.first_byte * 1e3)
    yield Row("  first byte", "ms", first, Goal("<=", 1.0, UPSTREAM, plus=10), digits=1)
    last = runs.figures(lambda run: run.seconds)
    yield Row("  last byte", "s", last, Goal("<=", 1.15, MIRROR), digits=2)
    runs.forget(UPSTREAM)
    stored = runs.figures(lambda run: run.stored)
    yield Row("  until it is stored", "s", stored, digits=2)
    # docker-registry stores a blob by a second transfer, after the client's.
    until = {PULLCACHE: stored[PULLCACHE], MIRROR: last[MIRROR]}
    yield Row("  that, over the mirror's last byte", "s", until, Goal("<=", 1.3, MIRROR), digits=2)
    spent = runs.figures(lambda run: run.stored_cpu / (run.received / GIB))
    yield Row("  server's CPU until then", "s/GiB", spent, Goal("<=", 2.2), digits=3)
    yield Row("  peak memory", "MiB", runs.figures(lambda run: run.peak / MIB))
    yield Row("  bytes from upstream", "blobs", moved, Goal("<=", 1), digits=2)


def many_clients(testbed: Testbed, size: LoadSize) -> Iterator[Row]:
    """Let many clients ask at once for one blob."""
    path = testbed.content.shared
    moved: dict[str, list[float]] = {}
    runs = Runs()
    for _ in range(size.slow_rounds):
        for name in testbed.with_other(PULLCACHE, *PEERS):
            before = _recall(testbed, path)
            with testbed.running(name) as server:
                runs.add(name, _all_at_once(server, path, testbed.content))
            sent = eventually(partial(_since, testbed, path, before), "upstream's log")
            moved.setdefault(name, []).append(sum(sent) / size.shared)
    speeds = runs.figures(lambda run: run.received / run.seconds / 1e6)
    work = f"{size.shared // MIB} MiB blob, cold, {CLIENTS} clients"
    yield Row(work, "MB/s", speeds, Goal(">=", 1.2, MIRROR))
    yield Row("  server's CPU", "s", runs.figures(lambda run: run.server_cpu), digits=2)
    yield Row("  bytes from upstream", "blobs", moved, Goal("<=", 1), digits=2)


def beside_slow(testbed: Testbed, size: LoadSize) -> Iterator[Row]:
    """Let clients fetch a blob after a client that requested it first and has stopped reading."""
    path = testbed.content.shared
    runs: dict[str, Runs] = {"": Runs(), "  beside one that stalls": Runs()}
    for _ in range(size.slow_rounds):
        for name in testbed.with_other(PULLCACHE, *PEERS):
            once = partial(load.blobs, path=path, size=size.shared, seconds=0, clients=FAST)
            _recall(testbed, path)
            with testbed.running(name) as server:
                runs[""].add(name, once(server))
            with testbed.running(name) as server, stalled(server, path):
                runs["  beside one that stalls"].add(name, once(server))
    for what, found in runs.items():
        taken = found.figures(lambda run: run.seconds)
        work = what or f"{size.shared // MIB} MiB blob, cold, {FAST} clients"
        yield Row(work, "s", taken, Goal("<=", 1.0, MIRROR), digits=2)


def image(testbed: Testbed, size: LoadSize, place: Path) -> Iterator[Row]:
    """Let skopeo pull an image of many layers."""
    made = make_image(place / "image", repository="library/many", layer_sizes=[LAYER_SIZE] * LAYERS)
    made.push(testbed.address)
    taken: dict[str, list[float]] = {}
    asked: dict[str, list[float]] = {}
    for _ in range(size.rounds):
        for name in (*testbed.with_other(PULLCACHE, *PEERS), UPSTREAM):
            before = testbed.count_requests(made.repository)
            with testbed.running(name) as server:
                began = time.perf_counter()
                _skopeo(server, f"{made.repository}:{made.tag}", place / "pulled")
                taken.setdefault(name, []).append(time.perf_counter() - began)
            asked.setdefault(name, []).append(
                float(testbed.count_requests(made.repository) - before)
            )
    yield Row(f"{LAYERS + 1} layers by skopeo, cold", "s", taken, Goal("<=", 1.0, MIRROR), digits=2)
    yield Row("  requests to upstream", "", asked, Goal("<=", 1.0, UPSTREAM, plus=4))


def _skopeo(server: ServerProcess, name: str, target: Path) -> None:
    source = f"docker://{server.url.rpartition('/')[2]}/{name}"
    run("skopeo", "copy", "--quiet", "--src-tls-verify=false", source, f"dir:{target}")
    shutil.rmtree(target)


def _recall(testbed: Testbed, path: str) -> int:
    """See that upstream has a blob in memory; return how often it has sent it so far."""
    before = len(testbed.transfers(path))
    with testbed.running(UPSTREAM) as upstream:
        load.load_into_memory(upstream, path)
    eventually(partial(_since, testbed, path, before), "upstream's log")
    return len(testbed.transfers(path))


def _begin(testbed: Testbed, server: ServerProcess) -> None:
    """Send a first request, so that later ones do not include a server's initialisation."""
    for path in testbed.content.hits:
        load.load_into_memory(server, path)
    proc.wait_until_idle([server.pid])


def _until_stored(testbed: Testbed, server: ServerProcess, path: str, size: int) -> Run:
    began, spent = time.perf_counter(), proc.cpu_seconds(server.pid)
    done = load.blobs(server, path, size, seconds=0, clients=1)
    testbed.wait_until_stored(server, path)
    done.stored = time.perf_counter() - began
    done.stored_cpu = proc.cpu_seconds(server.pid) - spent
    done.peak = proc.peak_bytes(server.pid)
    return done


def _touch(file: Path, size: int) -> None:
    """Use as much memory as a blob does, and give it back: its first use may be slow on its own."""
    with file.open("wb") as written:
        for _ in range(size // MIB):
            written.write(bytes(MIB))
    file.unlink()


def _since(testbed: Testbed, path: str, before: int) -> list[int]:
    return testbed.transfers(path)[before:]


def _all_at_once(server: ServerProcess, path: str, content: BenchContent) -> Run:
    with load.measured(server) as done:
        readers = [DownloadThread(server.url, path) for _ in range(CLIENTS)]
        for reader in readers:
            reader.finish()
    for reader in readers:
        problem = f"{server.name}: {reader.status}, {reader.error}, {reader.received} bytes"
        assert reader.digest == content.digest(path), problem
        done.received += reader.received
    return done
