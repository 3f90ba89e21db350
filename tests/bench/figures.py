"""A figure of the benchmark: what it is of, what each that was measured came to, and what is to be reached."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.bench.load import Run
from tests.bench.stage import PULLCACHE


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int
    seconds: float  # of load, for each figure of a hit
    connections: tuple[int, ...]
    hits: tuple[int, ...]  # bytes of the blobs that are hit
    cold: int
    crowd: int
    link: int  # bytes of the blob that comes over throttled connections
    few: int  # rounds of what takes long
    blobs: tuple[int, ...]  # of the stores that are filled
    followers: int
    growing: int  # bytes of the blob that they follow
    idle: int
    slow: int
    slow_seconds: float
    pulls: int  # of the fleet's day


@dataclass(frozen=True)
class Goal:
    """The figure to reach: `factor` times the peer's, or `factor` itself, and `plus`."""

    sense: str  # ">=" or "<="
    factor: float
    peer: str = ""
    plus: float = 0.0

    def bound(self, medians: dict[str, float]) -> float:
        return self.factor * (medians[self.peer] if self.peer else 1.0) + self.plus

    def __str__(self) -> str:
        if not self.peer:
            return f"{self.sense} {self.factor:,.5g}"
        plus = f" + {self.plus:g}" if self.plus else ""
        return f"{self.sense} {self.factor:g} x {self.peer}{plus}"


@dataclass(frozen=True)
class Row:
    """One figure of all that were measured, round by round, pullcache among them.

    Whether more is better is told by the goal's sense, or by `more` where there is no goal.
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
    def is_reached(self) -> bool | None:
        """Tell whether the goal is; None if there is none, or nobody to compare with."""
        if not self.goal:
            return None
        medians = self.medians
        if self.goal.peer and self.goal.peer not in medians:
            return None
        bound, ours = self.goal.bound(medians), medians[PULLCACHE]
        return ours >= bound if self.is_more_better else ours <= bound

    @property
    def ratios(self) -> dict[str, float]:
        """Return our figure by that of each other, where theirs is not nought."""
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
        if self.goal and self.is_reached is not None:
            goal = {"says": str(self.goal), "bound": self.goal.bound(self.medians)}
            document["goal"] = {**goal, "reached": self.is_reached}
        return document


class Runs:
    """The runs of several servers."""

    def __init__(self) -> None:
        self._runs: dict[str, list[Run]] = {}

    def add(self, name: str, run: Run) -> None:
        self._runs.setdefault(name, []).append(run)

    def forget(self, name: str) -> None:
        """Leave one out of the figures that are asked for from now on."""
        self._runs.pop(name, None)

    def figures(self, figure: Callable[[Run], float]) -> dict[str, list[float]]:
        return {name: [figure(run) for run in runs] for name, runs in self._runs.items() if runs}
