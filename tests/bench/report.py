"""The table of figures, printed line by line as they are measured, and the summary of the goals."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from tests.bench.figures import Row
from tests.bench.testbed import PULLCACHE


class Table:
    """Columns: the absolute medians, the ratios of pullcache to each peer, and the goal."""

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
        mark = {None: "", True: "met", False: "NOT MET"}[row.is_met]
        self._line(row.work, row.unit, cells, shares, str(row.goal or ""), mark)

    def add_failure(self, what: str, error: Exception) -> None:
        """Report a measurement that failed."""
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


def with_names(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each row with its work and the name of its figure, which is empty for the first of a work.

    Further figures of a work are rows whose own `work` is indented.
    """
    work = ""
    for row in rows:
        is_first = not row["work"].startswith(" ")
        work = row["work"] if is_first else work
        yield work, "" if is_first else row["work"].strip(), row


def write_goals(stream: TextIO, measured: Mapping[str, Mapping[str, Any]]) -> None:
    """Write how many goals were met, and a line for each that was not."""
    goals = [
        (f"{part}: {work}{', ' if figure else ''}{figure}", row)
        for part, result in measured.items()
        for work, figure, row in with_names(result["rows"])
        if "goal" in row
    ]
    missed = [(name, row) for name, row in goals if not row["goal"]["reached"]]
    stream.write(f"\n{len(goals) - len(missed)} of {len(goals)} goals met\n")
    for name, row in missed:
        ours, goal = row["median"][PULLCACHE], row["goal"]
        figures = f"{ours:,.4g} {row['unit']}; goal {goal['says']} ({goal['bound']:,.4g})"
        stream.write(f"  not met: {name}: {figures}\n")
