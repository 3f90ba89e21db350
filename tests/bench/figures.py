"""The figures of the benchmark: sizes of the measurements, rows of results, and goals."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.bench.load import Run
from tests.bench.testbed import PULLCACHE


@dataclass(frozen=True)
class LoadSize:
    """How much the benchmark measures. Sizes of blobs are in bytes."""

    rounds: int
    seconds: float  # of load, for each figure of a hit
    connections: tuple[int, ...]
    hits: tuple[int, ...]  # the blobs that are in the store
    cold: int  # a blob that is not
    shared: int  # a cold blob that many clients request at once
    throttled: int  # a cold blob over throttled connections
    slow_rounds: int  # rounds of measurements that take long
    blobs: tuple[int, ...]  # how many blobs the stores of the growth part have
    followers: int  # clients of one growing blob
    growing: int  # that blob
    idle_connections: int
    flooding: int  # connections that request absent blobs
    slow_readers: int
    slow_seconds: float  # how long they read
    repositories: int  # in the large index
    pulls: int  # in the day of the fleet


@dataclass(frozen=True)
class Goal:
    """The bound of a figure: `factor` times the peer's figure, or `factor` without a peer, and `plus`."""

    sense: str  # ">=" or "<="
    factor: float
    peer: str = ""
    plus: float = 0.0

    def bound(self, medians: dict[str, float]) -> float:
        return self.factor * (medians[self.peer] if self.peer else 1.0) + self.plus

    def __str__(self) -> str:
        plus = f" + {self.plus:g}" if self.plus else ""
        factor = f"{self.factor:g} x {self.peer}" if self.peer else f"{self.factor:,.5g}"
        return f"{self.sense} {factor}{plus}"


@dataclass(frozen=True)
class Row:
    """One figure: its values in all rounds by the measured programs, pullcache among them.

    The sense of the goal says whether more is better; without a goal, `more` says it.
    """

    work: str
    unit: str
    figures: dict[str, list[float]]
    goal: Goal | None = None
    digits: int = 0
    more: bool = False

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.figures.items()}

    @property
    def is_more_better(self) -> bool:
        return self.goal.sense == ">=" if self.goal else self.more

    @property
    def is_met(self) -> bool | None:
        """Return whether the goal is met; None without a goal, or if its peer was not measured."""
        if not self.goal:
            return None
        medians = self.medians
        if self.goal.peer and self.goal.peer not in medians:
            return None
        bound, ours = self.goal.bound(medians), medians[PULLCACHE]
        return ours >= bound if self.is_more_better else ours <= bound

    @property
    def ratios(self) -> dict[str, float]:
        """Return pullcache's figure divided by that of each peer, unless that is 0."""
        medians = self.medians
        ours = medians.pop(PULLCACHE)
        return {name: ours / value for name, value in medians.items() if value}

    @property
    def as_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "work": self.work,
            "unit": self.unit,
            "better": "more" if self.is_more_better else "less",
            "median": self.medians,
            "rounds": self.figures,
            "ratio": self.ratios,
        }
        if self.goal and self.is_met is not None:
            goal = {"says": str(self.goal), "bound": self.goal.bound(self.medians)}
            document["goal"] = {**goal, "reached": self.is_met}
        return document


class Runs:
    """The runs of several servers, by their names."""

    def __init__(self) -> None:
        self._runs: dict[str, list[Run]] = {}

    def add(self, name: str, run: Run) -> None:
        self._runs.setdefault(name, []).append(run)

    def forget(self, name: str) -> None:
        """Remove the runs of one server."""
        self._runs.pop(name, None)

    def figures(self, figure: Callable[[Run], float]) -> dict[str, list[float]]:
        """Return the figure of each run, by server."""
        return {name: [figure(run) for run in runs] for name, runs in self._runs.items() if runs}
