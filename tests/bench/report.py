"""The table: one line a figure, printed as soon as it is known; and at the end what became of the goals."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from tests.bench.figures import Row
from tests.bench.stage import PULLCACHE


class Table:
    """Absolute medians in columns, then pullcache's ratio to each other, and the goal."""

    def __init__(self, stream: TextIO, columns: Sequence[str]) -> None:
        self._stream = stream
        self._columns = columns
        ratios = [f"/{name}" for name in columns if name != PULLCACHE]
        self._line("", "", columns, ratios, "goal", "")

    def add(self, row: Row) -> None:
        medians, ratios = row.medians, row.ratios
        cells = [
            f"{medians[name]:,.{row.digits}f}" if name in medians else "-" for name in self._columns
        ]
        others = [name for name in self._columns if name != PULLCACHE]
        shares = [f"{ratios[name]:.2f}" if name in ratios else "-" for name in others]
        mark = {None: "", True: "met", False: "NOT MET"}[row.is_reached]
        self._line(row.work, row.unit, cells, shares, str(row.goal or ""), mark)

    def fail(self, what: str, error: Exception) -> None:
        """Say that a measure could not be had."""
        self._stream.write(f"{what} FAILED: {type(error).__name__}: {error}\n"[:2000])
        self._stream.flush()

    def _line(
        self,
        work: str,
        unit: str,
        cells: Sequence[str],
        ratios: Sequence[str],
        goal: str,
        mark: str,
    ) -> None:
        middle = "".join(f"{cell:>12}" for cell in cells)
        middle += "".join(f"{ratio:>13}" for ratio in ratios)
        self._stream.write(f"{work:<38}{unit:>9}{middle}  {goal:<22}{mark}".rstrip() + "\n")
        self._stream.flush()


def named(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield with each row the work that it is of, and what of it, if it is not the first figure."""
    work = ""
    for row in rows:
        is_first = not row["work"].startswith(" ")
        work = row["work"] if is_first else work
        yield work, "" if is_first else row["work"].strip(), row


def tell_goals(stream: TextIO, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Say how many goals were met, and which were not."""
    goals = [
        (f"{part}: {work}{', ' if what else ''}{what}", row)
        for part, result in found.items()
        for work, what, row in named(result["rows"])
        if "goal" in row
    ]
    missed = [(name, row) for name, row in goals if not row["goal"]["reached"]]
    stream.write(f"\n{len(goals) - len(missed)} of {len(goals)} goals met\n")
    for name, row in missed:
        ours, goal = row["median"][PULLCACHE], row["goal"]
        says = f"{ours:,.4g} {row['unit']}; goal {goal['says']} ({goal['bound']:,.4g})"
        stream.write(f"  not met: {name}: {says}\n")
