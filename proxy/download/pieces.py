"""The ranges of a blob that have arrived, and the pieces that connections fetch. Pure."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# A request costs a redirect and a round trip or two, so a piece has at least this many bytes.
MIN_PIECE = 4 << 20
# With larger pieces, a slow connection could hold up a reader at the beginning of the blob.
MAX_PIECE = 16 << 20
# A connection receives this many bytes in the time that a new one takes to deliver its first.
MIN_SPLIT_DISTANCE = 512 << 10

OPEN_END = 1 << 63


class RangeSet:
    """A set of byte offsets, kept as disjoint ascending ranges."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        # Alternating starts and stops, ascending.
        self._boundaries: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._boundaries[::2], self._boundaries[1::2], strict=True)

    def __len__(self) -> int:
        return len(self._boundaries) // 2

    @property
    def total(self) -> int:
        """The number of bytes in the set."""
        return sum(stop - start for start, stop in self)

    def add(self, start: int, stop: int) -> None:
        """Add the bytes from `start` up to `stop`; ranges that touch become one."""
        if start == stop:
            return
        low, high = bisect_left(self._boundaries, start), bisect_right(self._boundaries, stop)
        begins = [] if low % 2 else [start]
        ends = [] if high % 2 else [stop]
        self._boundaries[low:high] = begins + ends

    def contiguous_end(self, offset: int) -> int:
        """Return where the range that contains `offset` ends; `offset` if none contains it."""
        index = bisect_right(self._boundaries, offset)
        return self._boundaries[index] if index % 2 else offset

    def ranges_after(self, offset: int) -> list[tuple[int, int]]:
        """Return the ranges that begin beyond `offset`."""
        return [run for run in self if run[0] > offset]


@dataclass(eq=False, slots=True)
class Piece:
    """The bytes that one connection still has to fetch; `start` advances as they arrive."""

    start: int
    stop: int


class PieceMap:
    """Which bytes of a blob have arrived or are being fetched. None of these can be claimed again.

    `size` is `OPEN_END` until upstream states it.
    """

    def __init__(self) -> None:
        self.size = OPEN_END
        self.received = RangeSet()
        self._claimed: list[Piece] = []

    @property
    def is_complete(self) -> bool:
        """Whether all bytes have arrived."""
        return self.received.contiguous_end(0) == self.size

    def claim_next(self, connections: int) -> Piece | None:
        """Claim the first unclaimed bytes: an even share of all of them for one of `connections`.

        With one connection, that is the whole first gap. Returns None if there is nothing to claim.
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
        """Claim the first unclaimed bytes, `length` at most. Returns None if there are none."""
        gaps = self._unclaimed_ranges()
        if not gaps:
            return None
        start, stop = gaps[0]
        return self._claim(start, min(stop, start + length))

    def claim_at(self, offset: int, stop: int) -> Piece | None:
        """Claim bytes from `offset` up to `stop` at most, out of turn.

        A piece that would reach them later is shortened. Returns None if they have arrived or will soon.
        """
        for piece in self._claimed:
            if piece.start + MIN_SPLIT_DISTANCE < offset < piece.stop:
                piece.stop = offset
                break
        for start, end in self._unclaimed_ranges():
            if start <= offset < end:
                return self._claim(offset, min(stop, end))
        return None

    def advance(self, piece: Piece, count: int) -> None:
        """Mark the next `count` bytes of a piece as arrived."""
        self.received.add(piece.start, piece.start + count)
        piece.start += count

    def release(self, piece: Piece) -> None:
        """Give up a piece; its missing bytes may be claimed again."""
        self._claimed.remove(piece)

    def extend(self, piece: Piece) -> None:
        """Extend a claimed piece up to the next bytes that have arrived or are claimed."""
        piece.stop = dict(self._unclaimed_ranges()).get(piece.stop, piece.stop)

    def extend_to_end(self, piece: Piece) -> None:
        """Extend the only claimed piece to the end of the blob."""
        piece.stop = self.size

    def set_size(self, size: int) -> None:
        """Set the blob's size."""
        self.size = size
        for piece in self._claimed:
            piece.stop = min(piece.stop, size)

    def _claim(self, start: int, stop: int) -> Piece:
        piece = Piece(start, stop)
        self._claimed.append(piece)
        return piece

    def _unclaimed_ranges(self) -> list[tuple[int, int]]:
        """Return the ranges that have neither arrived nor been claimed."""
        gaps, end = [], 0
        busy = [*self.received, *((piece.start, piece.stop) for piece in self._claimed)]
        for start, stop in [*sorted(busy), (self.size, OPEN_END)]:
            if end < start:
                gaps.append((end, start))
            end = max(end, stop)
        return gaps
