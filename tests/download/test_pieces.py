"""Pieces: every byte is claimed once, in order, or before its turn for a reader."""

from hypothesis import given, strategies as st

from proxy.download.pieces import (
    MAX_PIECE,
    MIN_PIECE,
    MIN_SPLIT_DISTANCE,
    OPEN_END,
    Piece,
    PieceMap,
    RangeSet,
)

MIB = 1 << 20


def pieces(size: int = OPEN_END) -> PieceMap:
    found = PieceMap()
    found.set_size(size)
    return found


def took(span: Piece | None) -> tuple[int, int]:
    assert span is not None
    return span.start, span.stop


def arrive(found: PieceMap, span: Piece, count: int) -> None:
    found.advance(span, count)


def test_a_single_connection_claims_the_whole_blob():
    assert took(pieces(100).claim_next(1)) == (0, 100)
    assert took(pieces().claim_next(1)) == (0, OPEN_END)


def test_a_single_piece_of_a_blob_of_unknown_size_is_claimed_first():
    found = pieces()
    first = found.claim_next(4)
    assert took(first) == (0, MIN_PIECE)
    found.set_size(MIN_PIECE // 2)
    assert took(first) == (0, MIN_PIECE // 2)


def test_connections_claim_even_shares_in_order():
    found = pieces(64 * MIB)
    assert [took(found.claim_next(4)) for _ in range(3)] == [
        (0, 16 * MIB),
        (16 * MIB, 28 * MIB),
        (28 * MIB, 37 * MIB),
    ]


def test_the_size_of_a_piece_stays_within_its_bounds():
    assert took(pieces(10 << 30).claim_next(4)) == (0, MAX_PIECE)
    assert took(pieces(6 * MIB).claim_next(4)) == (0, MIN_PIECE)


def test_a_single_connection_claims_a_piece_of_the_given_length():
    found = pieces(100 * MIB)
    assert took(found.claim_up_to(60 * MIB)) == (0, 60 * MIB)
    assert took(found.claim_up_to(60 * MIB)) == (60 * MIB, 100 * MIB)
    assert found.claim_up_to(60 * MIB) is None


def test_a_released_piece_is_claimed_again_from_where_it_stopped():
    found = pieces(64 * MIB)
    span = found.claim_next(4)
    assert span is not None
    arrive(found, span, 1000)
    found.release(span)
    assert took(found.claim_next(1)) == (1000, 64 * MIB)


def test_a_range_that_a_reader_waits_for_is_claimed_before_its_turn():
    found = pieces(64 * MIB)
    found.claim_next(4)
    assert took(found.claim_at(63 * MIB, 64 * MIB)) == (63 * MIB, 64 * MIB)
    assert took(found.claim_at(40 * MIB, 41 * MIB)) == (40 * MIB, 41 * MIB)


def test_a_range_can_be_claimed_from_the_end_of_a_running_piece():
    found = pieces(64 * MIB)
    first = found.claim_next(4)
    assert took(found.claim_at(8 * MIB, 9 * MIB)) == (8 * MIB, 9 * MIB)
    assert took(first) == (0, 8 * MIB)


def test_bytes_that_have_arrived_or_soon_will_are_not_claimed_again():
    found = pieces(64 * MIB)
    found.received.add(20 * MIB, 30 * MIB)
    assert found.claim_at(25 * MIB, 26 * MIB) is None
    found.claim_next(4)
    assert found.claim_at(MIN_SPLIT_DISTANCE // 2, MIB) is None


def test_a_transfer_that_starts_over_claims_all_following_bytes():
    found = pieces(64 * MIB)
    span = found.claim_next(4)
    assert span is not None
    found.extend_to_end(span)
    assert took(span) == (0, 64 * MIB)
    assert found.claim_next(4) is None


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12))
def test_a_range_set_contains_the_ranges_that_were_added(runs):
    found, model = RangeSet(), set()
    assert not found
    for start, stop in map(sorted, runs):
        found.add(start, stop)
        model |= set(range(start, stop))
    assert bool(found) == bool(model)
    assert found.total == len(model)
    for offset in range(62):
        stop = offset
        while stop in model:
            stop += 1
        assert found.contiguous_end(offset) == stop
    ahead = {at for start, stop in found.ranges_after(5) for at in range(start, stop)}
    assert ahead == {at for at in model if at > found.contiguous_end(5)} - set(range(6))


@given(
    size=st.integers(1, 100 * MIB),
    steps=st.lists(
        st.tuples(st.sampled_from(["take", "at", "arrive", "drop"]), st.integers(0, 99)),
        max_size=30,
    ),
)
def test_every_byte_is_claimed_exactly_once(size, steps):
    found, seen = pieces(size), 0
    spans: list[Piece] = []
    for action, number in steps:
        if action == "take":
            spans += filter(None, [found.claim_next(1 + number % 5)])
        elif action == "at":
            spans += filter(None, [found.claim_at(size * number // 100, size)])
        elif spans:
            span = spans.pop(number % len(spans))
            if action == "arrive":
                seen += span.stop - span.start
                arrive(found, span, span.stop - span.start)
            found.release(span)
    while rest := found.claim_next(3):
        spans.append(rest)
    seen += sum(span.stop - span.start for span in spans)
    assert seen == size
