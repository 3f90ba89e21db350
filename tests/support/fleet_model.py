"""What the directory's scripts are to do for one blob of one upstream, in plain Python.

Tests compare the scripts with it, and simulations of large fleets run on it.
"""

from bisect import bisect_left, insort
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Source = Literal["upstream", "whole", "growing"]


class ModelAnswer(NamedTuple):
    """Where a node is sent: `place` is its place in the order, `node` the one to ask."""

    place: int
    source: Source
    node: str = ""


@dataclass
class BlobModel:
    """The holders of a blob, and the order of those that download it. Nodes are named as in the directory."""

    children: int
    max_holders: int = 32
    holders: set[str] = field(default_factory=set)
    # Places and nodes, sorted.
    order: list[tuple[int, str]] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)

    def locate(
        self,
        node: str,
        now: int,
        *,
        place: int | None = None,
        offset: int = 0,
        excluded: Collection[str] = (),
    ) -> ModelAnswer:
        """Send a node that begins at `now`, or asks again at its `place`."""
        for late in self.silent - {node}:
            self._drop(late)
        self.silent.clear()
        if node not in self.places:
            last = self.order[-1][0] if self.order else 0
            self._join(node, max(now, last + 1) if place is None else place)
        place = self.places[node]
        holders = sorted(self.holders - {node, *excluded})
        rank = own = bisect_left(self.order, (place, node))
        while holders or rank > 0:
            if rank < len(holders) * self.children:
                return ModelAnswer(place, "whole", holders[(rank + offset) % len(holders)])
            above = rank // self.children - len(holders)
            rank = above if holders else (rank - 1) // self.children
            parent = self.order[rank][1]
            if parent != node and parent not in excluded:
                return ModelAnswer(place, "growing", parent)
        for _, other in self.order[: min(own, self.max_holders)]:
            if other not in excluded:
                return ModelAnswer(place, "growing", other)
        return ModelAnswer(place, "upstream")

    def renew(self, node: str, place: int) -> None:
        """Keep the place of a node that still downloads."""
        self._drop(node)
        self._join(node, place)

    def silence(self, node: str) -> None:
        """Have a node not report for so long that the next one no longer counts it."""
        if node in self.places:
            self.silent.add(node)

    def finish(self, node: str, *, is_stored: bool) -> None:
        """End a download of a node; with fewer holders than the maximum it is one of them."""
        if is_stored:
            self.holders.add(node)
        self._drop(node)

    def lose_everything(self) -> None:
        """Restart the server without data."""
        self.holders.clear()
        self.order.clear()
        self.places.clear()
        self.silent.clear()

    def _join(self, node: str, place: int) -> None:
        self.places[node] = place
        insort(self.order, (place, node))

    def _drop(self, node: str) -> None:
        self.silent.discard(node)
        place = self.places.pop(node, None)
        if place is not None:
            del self.order[bisect_left(self.order, (place, node))]
