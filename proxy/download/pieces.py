"""Which bytes of a blob are in, and who fetches which of the rest. PURE."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

# A request costs a redirect and a round trip or two; this much is worth them.
MIN_PIECE = 4 << 20
# More than this at once, and who reads in order waits for one connection.
MAX_PIECE = 16 << 20
# Bytes that a connection will have reached before another could begin.
NEAR = 512 << 10

END = 1 << 63


@dataclass(eq=False, slots=True)
class Span:
    """Bytes that one connection fetches: in up to `start`, written or being so up to `position`."""

    start: int
    position: int
    stop: int


class Pieces:
    """The bytes of one blob. What is in and what is taken never overlap.

    `size` is `END` as long as nobody knows it.
    """

    def __init__(self) -> None:
        self.size = END
        # Starts and stops by turns, ascending: what is in.
        self._marks: list[int] = []
        self._taken: list[Span] = []

    @property
    def has_any(self) -> bool:
        """Whether any byte is in."""
        return bool(self._marks)

    @property
    def count(self) -> int:
        """How many bytes are in."""
        return sum(stop - start for start, stop in self._runs())

    def filled(self, offset: int) -> int:
        """Return up to where the bytes from `offset` on are in; `offset` if that one is not."""
        index = bisect_right(self._marks, offset)
        return self._marks[index] if index % 2 else offset

    def ahead(self, frontier: int) -> list[tuple[int, int]]:
        """Return the runs of bytes that are in and begin beyond `frontier`."""
        return [run for run in self._runs() if run[0] > frontier]

    def add(self, start: int, stop: int) -> None:
        """Count the bytes from `start` up to `stop` as in."""
        if start == stop:
            return
        # Runs that touch become one.
        low, high = bisect_left(self._marks, start), bisect_right(self._marks, stop)
        begins = [] if low % 2 else [start]
        ends = [] if high % 2 else [stop]
        self._marks[low:high] = begins + ends

    def take(self, connections: int) -> Span | None:
        """Take the first bytes that are wanted: an even share of what nobody has taken.

        With one connection that is all of them. None if there is nothing to take.
        """
        gaps = self._gaps()
        if not gaps:
            return None
        start, stop = gaps[0]
        if connections > 1:
            free = sum(stop - start for start, stop in gaps)
            share = MIN_PIECE if self.size == END else -(-free // connections)
            stop = min(stop, start + min(max(share, MIN_PIECE), MAX_PIECE))
        return self._took(start, stop)

    def take_up_to(self, length: int) -> Span | None:
        """Take so many of the first bytes that are wanted, at most. None if there is nothing to take."""
        gaps = self._gaps()
        if not gaps:
            return None
        start, stop = gaps[0]
        return self._took(start, min(stop, start + length))

    def take_at(self, offset: int, stop: int) -> Span | None:
        """Take bytes from `offset` up to `stop` at most, before their turn.

        What another connection would reach only later is taken from it. None if it is near, or in.
        """
        for span in self._taken:
            if span.position + NEAR < offset < span.stop:
                span.stop = offset
                break
        for start, end in self._gaps():
            if start <= offset < end:
                return self._took(offset, min(stop, end))
        return None

    def put(self, span: Span) -> None:
        """Count the bytes of a span up to its position as in."""
        self.add(span.start, span.position)
        span.start = span.position

    def drop(self, span: Span) -> None:
        """Give back a span; what is missing of it may be taken again."""
        self._taken.remove(span)

    def widen(self, span: Span) -> None:
        """Give a span, the only one, all that follows."""
        span.stop = self.size

    def learn(self, size: int) -> None:
        """Take note of the size."""
        self.size = size
        for span in self._taken:
            span.stop = min(span.stop, size)

    def _took(self, start: int, stop: int) -> Span:
        span = Span(start, start, stop)
        self._taken.append(span)
        return span

    def _runs(self) -> Iterator[tuple[int, int]]:
        return zip(self._marks[::2], self._marks[1::2], strict=True)

    def _gaps(self) -> list[tuple[int, int]]:
        """Return the runs of bytes that are neither in nor taken."""
        gaps, end = [], 0
        busy = [*self._runs(), *((span.start, span.stop) for span in self._taken)]
        for start, stop in [*sorted(busy), (self.size, END)]:
            if end < start:
                gaps.append((end, start))
            end = max(end, stop)
        return gaps
