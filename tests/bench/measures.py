"""What is measured: each figure of all servers alternately, in several rounds."""

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.bench import load
from tests.bench.content import MIB, Content
from tests.bench.load import Run
from tests.bench.stage import MIRROR, NGINX, OTHER, PULLCACHE, UPSTREAM, Server, Stage
from tests.system.processes import eventually
from tests.system.wire import Reader

GIB = 1 << 30
CROWD = 24
BIG_CLIENTS = 4


@dataclass(frozen=True)
class Size:
    """How long a run takes and what it moves."""

    rounds: int
    seconds: int
    cold: int
    crowd: int
    link_rounds: int


SHORT = Size(rounds=3, seconds=1, cold=256 * MIB, crowd=64 * MIB + 1, link_rounds=1)
LONG = Size(rounds=5, seconds=4, cold=GIB, crowd=256 * MIB + 1, link_rounds=3)
HITS = [MIB, 64 * MIB]


@dataclass(frozen=True)
class Goal:
    """The figure to reach: `factor` times the peer's, or `factor` itself, and `plus`."""

    sense: str  # ">=" or "<="
    factor: float
    peer: str = ""
    plus: float = 0.0

    def bound(self, medians: dict[str, float]) -> float:
        return self.factor * (medians[self.peer] if self.peer else 1.0) + self.plus


@dataclass(frozen=True)
class Row:
    """One figure of every server that was measured, round by round."""

    work: str
    unit: str
    figures: dict[str, list[float]]
    goal: Goal
    digits: int = 0

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.figures.items()}

    @property
    def is_reached(self) -> bool:
        medians = self.medians
        bound = self.goal.bound(medians)
        ours = medians[PULLCACHE]
        return ours >= bound if self.goal.sense == ">=" else ours <= bound

    @property
    def as_json(self) -> dict[str, Any]:
        medians = self.medians
        ratios = {name: medians[PULLCACHE] / value for name, value in medians.items() if value}
        goal = {"sense": self.goal.sense, "bound": self.goal.bound(medians), "peer": self.goal.peer}
        return {
            "work": self.work,
            "unit": self.unit,
            "median": medians,
            "rounds": self.figures,
            "ratio": ratios,
            "goal": {**goal, "reached": self.is_reached},
        }


class Runs:
    """The runs of several servers."""

    def __init__(self) -> None:
        self._runs: dict[str, list[Run]] = {}

    def add(self, name: str, run: Run) -> None:
        self._runs.setdefault(name, []).append(run)

    def figures(self, figure: Callable[[Run], float]) -> dict[str, list[float]]:
        return {name: [figure(run) for run in runs] for name, runs in self._runs.items()}


def measure(stage: Stage, size: Size) -> Iterator[Row]:
    """Measure everything, and yield each figure as it is there."""
    yield from _blob_hits(stage, size)
    yield from _manifests(stage, size)
    yield from _cold(stage, size)
    yield from _crowd(stage, size)


def among(stage: Stage, *names: str) -> list[str]:
    """Return the names of these servers, and of the other checkout if there is one."""
    return [name for name in stage.servers if name in (*names, OTHER)]


def _alternately(
    stage: Stage, names: Iterable[str], size: Size, once: Callable[[Server], Run]
) -> Runs:
    runs = Runs()
    for _ in range(size.rounds):
        for name in names:
            runs.add(name, once(stage.servers[name]))
    return runs


def _blob_hits(stage: Stage, size: Size) -> Iterator[Row]:
    for length, clients in ((MIB, load.CONNECTIONS), (64 * MIB, BIG_CLIENTS)):
        path = stage.content.blobs[length]
        names = among(stage, PULLCACHE, NGINX, *([MIRROR] if length == MIB else []))

        once = partial(
            load.blobs, path=path, size=length, seconds=0.7 * size.seconds, clients=clients
        )
        runs = _alternately(stage, names, size, once)
        work = f"{length // MIB} MiB blob, hit, {clients} clients"
        if length == MIB:
            rates = runs.figures(lambda run: run.requests / run.seconds)
            yield Row(work, "1/s", rates, Goal(">=", 0.9, NGINX))
        else:
            speeds = runs.figures(lambda run: run.received / run.seconds / 1e6)
            yield Row(work, "MB/s", speeds, Goal(">=", 0.9, NGINX))
        spent = runs.figures(lambda run: run.server_cpu / (run.received / GIB))
        yield Row("  server's CPU", "s/GiB", spent, Goal("<=", 1.3, NGINX), digits=3)


def _manifests(stage: Stage, size: Size) -> Iterator[Row]:
    content = stage.content
    # To nginx both are the same: a small file.
    peers = [NGINX, MIRROR]
    for what, path in (("tag", content.by_tag), ("digest", content.by_digest)):
        once = partial(load.small, path=path, seconds=size.seconds)
        runs = _alternately(stage, among(stage, PULLCACHE, MIRROR, *peers), size, once)
        work = f"manifest by {what}, hit, {load.CONNECTIONS} clients"
        rates = runs.figures(lambda run: run.requests / run.seconds)
        yield Row(work, "1/s", rates, Goal(">=", 15_000))
        slow = runs.figures(lambda run: run.p99 * 1e3)
        yield Row("  99th percentile", "ms", slow, Goal("<=", 5), digits=1)
        spent = runs.figures(lambda run: run.server_cpu / run.requests * 1e6)
        yield Row("  server's CPU", "us", spent, Goal("<=", 1e6 / 15_000))
        peers = [MIRROR]


def _cold(stage: Stage, size: Size) -> Iterator[Row]:
    """Fetch a blob that nobody has yet, through an empty store each time."""
    path = stage.content.cold
    runs = Runs()
    for number in range(size.rounds):
        for name in (*among(stage, PULLCACHE, MIRROR), UPSTREAM):
            with stage.fresh(name) as server:
                runs.add(name, load.blobs(server, path, size.cold, seconds=0, clients=1))
                if number == 0:
                    stage.check(server, path)
    speeds = runs.figures(lambda run: run.received / run.seconds / 1e6)
    yield Row(f"{size.cold // MIB} MiB blob, cold", "MB/s", speeds, Goal(">=", 1.0, MIRROR))
    first = runs.figures(lambda run: run.first_byte * 1e3)
    yield Row("  first byte", "ms", first, Goal("<=", 1.0, UPSTREAM, plus=10), digits=1)
    spent = runs.figures(lambda run: run.server_cpu / (run.received / GIB))
    del spent[UPSTREAM]
    yield Row("  server's CPU", "s/GiB", spent, Goal("<=", 1.0, MIRROR), digits=3)


def _crowd(stage: Stage, size: Size) -> Iterator[Row]:
    """Let many clients ask at once for a blob that nobody has yet."""
    path = stage.content.crowd
    moved: dict[str, list[float]] = {}
    runs = Runs()
    for name in among(stage, PULLCACHE, MIRROR):
        before = len(stage.transfers(path))
        with stage.fresh(name) as server:
            runs.add(name, _all_at_once(server, path, stage.content))
        found = eventually(partial(_since, stage, path, before), "upstream's log")
        moved[name] = [sum(found) / size.crowd]
    speeds = runs.figures(lambda run: run.received / run.seconds / 1e6)
    work = f"{size.crowd // MIB} MiB blob, cold, {CROWD} clients"
    yield Row(work, "MB/s", speeds, Goal(">=", 1.0, MIRROR))
    yield Row("  bytes from upstream", "blobs", moved, Goal("<=", 1), digits=2)


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
