"""The table: one line a figure, printed as soon as it is known."""

from collections.abc import Sequence
from typing import TextIO

from tests.bench.measures import Goal, Row
from tests.bench.stage import PULLCACHE, UPSTREAM


class Table:
    """Absolute medians in columns, then pullcache's ratio to the peer of the goal, and the goal."""

    def __init__(self, stream: TextIO, servers: Sequence[str]) -> None:
        self._stream = stream
        self._columns = [*servers, UPSTREAM]
        self._line("", "", self._columns, "ratio", "to reach", "")

    def add(self, row: Row) -> None:
        medians = row.medians
        cells = [
            f"{medians[name]:,.{row.digits}f}" if name in medians else "-" for name in self._columns
        ]
        base = medians[row.goal.peer] if row.goal.peer else row.goal.factor
        ratio = f"{medians[PULLCACHE] / base:.2f}" if base else "-"
        mark = "" if row.is_reached else "not reached"
        self._line(row.work, row.unit, cells, ratio, _say(row.goal), mark)

    def _line(
        self, work: str, unit: str, cells: Sequence[str], ratio: str, goal: str, mark: str
    ) -> None:
        middle = "".join(f"{cell:>11}" for cell in cells)
        self._stream.write(
            f"{work:<34}{unit:>6}{middle}{ratio:>8}  {goal:<24}{mark}".rstrip() + "\n"
        )
        self._stream.flush()


def _say(goal: Goal) -> str:
    if not goal.peer:
        return f"{goal.sense} {goal.factor:,.5g}"
    plus = f" + {goal.plus:g}" if goal.plus else ""
    return f"{goal.sense} {goal.factor:.1f} x {goal.peer}{plus}"
