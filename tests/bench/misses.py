"""Misses: what nobody has yet, through an empty store each time."""

import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.bench import load, proc
from tests.bench.content import GIB, MIB, Content
from tests.bench.crowds import stalled
from tests.bench.figures import Goal, Row, Runs, Size
from tests.bench.load import Run
from tests.bench.stage import CACHE, MIRROR, PULLCACHE, UPSTREAM, Server, Stage
from tests.system.images import make_image
from tests.system.processes import eventually, run
from tests.system.wire import Reader

PEERS = (MIRROR, CACHE)
CROWD = 24
FAST = 8
LAYERS = 40
LAYER_SIZE = 512 << 10


def cold(stage: Stage, size: Size, place: Path) -> Iterator[Row]:
    """Fetch one large blob, until the client has it and until the server's store has it."""
    path = stage.content.cold
    runs = Runs()
    moved: dict[str, list[float]] = {}
    _touch(place / "touched", size.cold)
    for _ in range(size.rounds):
        for name in (*stage.among(PULLCACHE, *PEERS), UPSTREAM):
            before = _recall(stage, path)
            with stage.fresh(name) as server:
                _begin(stage, server)
                runs.add(name, _until_stored(stage, server, path, size.cold))
            if name != UPSTREAM:
                sent = eventually(partial(_since, stage, path, before), "upstream's log")
                moved.setdefault(name, []).append(sum(sent) / size.cold)
    speeds = runs.figures(lambda run: run.received / run.seconds / 1e6)
    yield Row(f"{size.cold // MIB} MiB blob, cold", "MB/s", speeds, Goal(">=", 1.0, MIRROR))
    first = runs.figures(lambda run: run.first_byte * 1e3)
    yield Row("  first byte", "ms", first, Goal("<=", 1.0, UPSTREAM, plus=10), digits=1)
    yield Row("  last byte", "s", runs.figures(lambda run: run.seconds), digits=2)
    runs.forget(UPSTREAM)
    stored = runs.figures(lambda run: run.stored)
    yield Row("  until it is stored", "s", stored, Goal("<=", 1.0, MIRROR), digits=2)
    spent = runs.figures(lambda run: run.stored_cpu / (run.received / GIB))
    yield Row("  server's CPU until then", "s/GiB", spent, Goal("<=", 1.0, MIRROR), digits=3)
    yield Row("  peak memory", "MiB", runs.figures(lambda run: run.peak / MIB))
    yield Row("  bytes from upstream", "blobs", moved, Goal("<=", 1), digits=2)


def crowd(stage: Stage, size: Size) -> Iterator[Row]:
    """Let many clients ask at once for one blob."""
    path = stage.content.crowd
    moved: dict[str, list[float]] = {}
    runs = Runs()
    for _ in range(size.few):
        for name in stage.among(PULLCACHE, *PEERS):
            before = _recall(stage, path)
            with stage.fresh(name) as server:
                runs.add(name, _all_at_once(server, path, stage.content))
            sent = eventually(partial(_since, stage, path, before), "upstream's log")
            moved.setdefault(name, []).append(sum(sent) / size.crowd)
    speeds = runs.figures(lambda run: run.received / run.seconds / 1e6)
    work = f"{size.crowd // MIB} MiB blob, cold, {CROWD} clients"
    yield Row(work, "MB/s", speeds, Goal(">=", 1.0, MIRROR))
    yield Row("  server's CPU", "s", runs.figures(lambda run: run.server_cpu), digits=2)
    yield Row("  bytes from upstream", "blobs", moved, Goal("<=", 1), digits=2)


def beside_slow(stage: Stage, size: Size) -> Iterator[Row]:
    """Let some clients fetch a blob that one asked for before them who has stopped reading."""
    path = stage.content.crowd
    runs: dict[str, Runs] = {"": Runs(), "  beside one that stalls": Runs()}
    for _ in range(size.few):
        for name in stage.among(PULLCACHE, *PEERS):
            once = partial(load.blobs, path=path, size=size.crowd, seconds=0, clients=FAST)
            _recall(stage, path)
            with stage.fresh(name) as server:
                runs[""].add(name, once(server))
            with stage.fresh(name) as server, stalled(server, path):
                runs["  beside one that stalls"].add(name, once(server))
    for what, found in runs.items():
        taken = found.figures(lambda run: run.seconds)
        work = what or f"{size.crowd // MIB} MiB blob, cold, {FAST} clients"
        yield Row(work, "s", taken, Goal("<=", 1.0, MIRROR), digits=2)


def image(stage: Stage, size: Size, place: Path) -> Iterator[Row]:
    """Let skopeo pull an image of many layers."""
    made = make_image(place / "image", repository="library/many", layer_sizes=[LAYER_SIZE] * LAYERS)
    made.push(stage.address)
    taken: dict[str, list[float]] = {}
    asked: dict[str, list[float]] = {}
    for _ in range(size.rounds):
        for name in (*stage.among(PULLCACHE, *PEERS), UPSTREAM):
            before = stage.asked(made.repository)
            with stage.fresh(name) as server:
                began = time.perf_counter()
                _skopeo(server, f"{made.repository}:{made.tag}", place / "pulled")
                taken.setdefault(name, []).append(time.perf_counter() - began)
            asked.setdefault(name, []).append(float(stage.asked(made.repository) - before))
    yield Row(f"{LAYERS + 1} layers by skopeo, cold", "s", taken, Goal("<=", 1.0, MIRROR), digits=2)
    yield Row("  requests to upstream", "", asked, Goal("<=", 1.0, UPSTREAM, plus=4))


def _skopeo(server: Server, name: str, target: Path) -> None:
    source = f"docker://{server.url.rpartition('/')[2]}/{name}"
    run("skopeo", "copy", "--quiet", "--src-tls-verify=false", source, f"dir:{target}")
    shutil.rmtree(target)


def _recall(stage: Stage, path: str) -> int:
    """See that upstream has a blob in memory; return how often it has sent it so far."""
    before = len(stage.transfers(path))
    with stage.fresh(UPSTREAM) as upstream:
        load.recall(upstream, path)
    eventually(partial(_since, stage, path, before), "upstream's log")
    return len(stage.transfers(path))


def _begin(stage: Stage, server: Server) -> None:
    """Have a server do what it does once in its life: who asks first pays for that."""
    for path in stage.content.hits:
        load.recall(server, path)
    proc.await_idle([server.pid])


def _until_stored(stage: Stage, server: Server, path: str, size: int) -> Run:
    began, spent = time.perf_counter(), proc.cpu_seconds(server.pid)
    done = load.blobs(server, path, size, seconds=0, clients=1)
    stage.await_stored(server, path)
    done.stored = time.perf_counter() - began
    done.stored_cpu = proc.cpu_seconds(server.pid) - spent
    done.peak = proc.peak(server.pid)
    return done


def _touch(file: Path, size: int) -> None:
    """Use as much memory as a blob does, and give it back: its first use may be slow on its own."""
    with file.open("wb") as written:
        for _ in range(size // MIB):
            written.write(bytes(MIB))
    file.unlink()


def _since(stage: Stage, path: str, before: int) -> list[int]:
    return stage.transfers(path)[before:]


def _all_at_once(server: Server, path: str, content: Content) -> Run:
    with load.clocked(server) as done:
        readers = [Reader(server.url, path) for _ in range(CROWD)]
        for reader in readers:
            reader.finish()
    for reader in readers:
        problem = f"{server.name}: {reader.status}, {reader.error}, {reader.received} bytes"
        assert reader.digest == content.digest(path), problem
        done.received += reader.received
    return done
