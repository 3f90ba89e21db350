"""Which bytes of a blob are in, and who fetches which of the rest. PURE."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

# A request costs a redirect and a round trip or two; this much is worth them.
MIN_PIECE = 4 << 20
# More than this at once, and who reads in order waits for one connection.
MAX_PIECE = 16 << 20
# Bytes that a connection will have reached before another could begin.
MIN_SPLIT_DISTANCE = 512 << 10

OPEN_END = 1 << 63


@dataclass(eq=False, slots=True)
class Piece:
    """Bytes that one connection fetches: in up to `start`, written or being so up to `position`."""

    start: int
    position: int
    stop: int


class PieceMap:
    """The bytes of one blob. What is in and what is taken never overlap.

    `size` is `END` as long as nobody knows it.
    """

    def __init__(self) -> None:
        self.size = OPEN_END
        # Starts and stops by turns, ascending: what is in.
        self._boundaries: list[int] = []
        self._claimed: list[Piece] = []

    @property
    def has_bytes(self) -> bool:
        """Whether any byte is in."""
        return bool(self._boundaries)

    @property
    def bytes_present(self) -> int:
        """How many bytes are in."""
        return sum(stop - start for start, stop in self._present_ranges())

    def contiguous_end(self, offset: int) -> int:
        """Return up to where the bytes from `offset` on are in; `offset` if that one is not."""
        index = bisect_right(self._boundaries, offset)
        return self._boundaries[index] if index % 2 else offset

    def ranges_after(self, frontier: int) -> list[tuple[int, int]]:
        """Return the runs of bytes that are in and begin beyond `frontier`."""
        return [run for run in self._present_ranges() if run[0] > frontier]

    def mark_present(self, start: int, stop: int) -> None:
        """Count the bytes from `start` up to `stop` as in."""
        if start == stop:
            return
        # Runs that touch become one.
        low, high = bisect_left(self._boundaries, start), bisect_right(self._boundaries, stop)
        begins = [] if low % 2 else [start]
        ends = [] if high % 2 else [stop]
        self._boundaries[low:high] = begins + ends

    def claim_next(self, connections: int) -> Piece | None:
        """Take the first bytes that are wanted: an even share of what nobody has taken.

        With one connection that is all of them. None if there is nothing to take.
        """
        gaps = self._unclaimed_ranges()
        if not gaps:
            return None
        start, stop = gaps[0]
        if connections > 1:
            free = sum(stop - start for start, stop in gaps)
            share = MIN_PIECE if self.size == OPEN_END else -(-free // connections)
            stop = min(stop, start + min(max(share, MIN_PIECE), MAX_PIECE))
        return self._claim(start, stop)

    def claim_up_to(self, length: int) -> Piece | None:
        """Take so many of the first bytes that are wanted, at most. None if there is nothing to take."""
        gaps = self._unclaimed_ranges()
        if not gaps:
            return None
        start, stop = gaps[0]
        return self._claim(start, min(stop, start + length))

    def claim_at(self, offset: int, stop: int) -> Piece | None:
        """Take bytes from `offset` up to `stop` at most, before their turn.

        What another connection would reach only later is taken from it. None if it is near, or in.
        """
        for span in self._claimed:
            if span.position + MIN_SPLIT_DISTANCE < offset < span.stop:
                span.stop = offset
                break
        for start, end in self._unclaimed_ranges():
            if start <= offset < end:
                return self._claim(offset, min(stop, end))
        return None

    def mark_written(self, piece: Piece) -> None:
        """Count the bytes of a span up to its position as in."""
        self.mark_present(piece.start, piece.position)
        piece.start = piece.position

    def release(self, piece: Piece) -> None:
        """Give back a span; what is missing of it may be taken again."""
        self._claimed.remove(piece)

    def extend_to_end(self, piece: Piece) -> None:
        """Give a span, the only one, all that follows."""
        piece.stop = self.size

    def set_size(self, size: int) -> None:
        """Take note of the size."""
        self.size = size
        for span in self._claimed:
            span.stop = min(span.stop, size)

    def _claim(self, start: int, stop: int) -> Piece:
        span = Piece(start, start, stop)
        self._claimed.append(span)
        return span

    def _present_ranges(self) -> Iterator[tuple[int, int]]:
        return zip(self._boundaries[::2], self._boundaries[1::2], strict=True)

    def _unclaimed_ranges(self) -> list[tuple[int, int]]:
        """Return the runs of bytes that are neither in nor taken."""
        gaps, end = [], 0
        busy = [*self._present_ranges(), *((span.start, span.stop) for span in self._claimed)]
        for start, stop in [*sorted(busy), (self.size, OPEN_END)]:
            if end < start:
                gaps.append((end, start))
            end = max(end, stop)
        return gaps
