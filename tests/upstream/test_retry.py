"""When to ask again: bounded, jittered, and as upstream wishes within reason."""

from datetime import UTC, datetime
from email.utils import format_datetime
from itertools import repeat

import pytest
from hypothesis import given, strategies as st

from proxy.upstream.retry import (
    DEFAULT_RETRY_AFTER,
    MAX_DELAY,
    MAX_RETRY_AFTER,
    MIN_RETRY_AFTER,
    TRANSIENT_STATUSES,
    MinRateMonitor,
    backoff_delays,
    parse_ratelimit,
    parse_retry_after,
)

NOW = 1_700_000_000.0


@given(st.integers(1, 30), st.floats(0, 1, exclude_max=True))
def test_waits_grow_and_stay_bounded(attempts, random):
    waits = list(backoff_delays(attempts, repeat(random)))
    assert len(waits) == attempts - 1
    assert waits == sorted(waits)
    assert all(0 < wait <= MAX_DELAY for wait in waits)


def test_waits_are_spread_by_chance():
    assert list(backoff_delays(3, repeat(0.0))) == [0.125, 0.25]
    assert list(backoff_delays(3, repeat(0.5))) == [0.1875, 0.375]


def test_only_answers_that_mean_not_now_are_transient():
    assert {408, 425, 500, 502, 503, 504} == TRANSIENT_STATUSES


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("30", 30.0),
        (" 30 ", 30.0),
        ("0", MIN_RETRY_AFTER),
        ("86400", MAX_RETRY_AFTER),
        ("1700000042", 42.0),
        ("1600000000", MIN_RETRY_AFTER),
        ("999999999999", MAX_RETRY_AFTER),
        ("Tue, 14 Nov 2023 22:14:20 GMT", 60.0),
        ("Tue, 14 Nov 2013 22:14:20 GMT", MIN_RETRY_AFTER),
        ("Tue, 14 Nov 2033 22:14:20 GMT", MAX_RETRY_AFTER),
        (None, DEFAULT_RETRY_AFTER),
        ("", DEFAULT_RETRY_AFTER),
        ("-5", DEFAULT_RETRY_AFTER),
        ("1.5", DEFAULT_RETRY_AFTER),
        ("880.092\u00b5s, allowed: 44000/minute", DEFAULT_RETRY_AFTER),
        ("9" * 400, DEFAULT_RETRY_AFTER),
        ("\u0663\u0660", DEFAULT_RETRY_AFTER),
        ("Tue, 99 Nov 2023 22:14:20 GMT", DEFAULT_RETRY_AFTER),
    ],
)
def test_retry_after_in_the_forms_seen_in_the_wild(value, seconds):
    assert parse_retry_after(value, NOW) == seconds


@given(st.integers(0, 10**12))
def test_a_date_and_a_timestamp_mean_the_same(seconds):
    later = NOW + seconds % 10_000
    date = format_datetime(datetime.fromtimestamp(later, UTC), usegmt=True)
    assert parse_retry_after(date, NOW) == parse_retry_after(str(int(later)), NOW)


@given(st.none() | st.text() | st.from_regex(r"[A-Za-z]{3}, \d+ [A-Z][a-z]{2} \d+ \d+:\d+:\d+ \S+"))
def test_retry_after_never_raises_and_is_always_within_bounds(value):
    assert MIN_RETRY_AFTER <= parse_retry_after(value, NOW) <= MAX_RETRY_AFTER


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ("100;w=21600", 100),
        ("0;w=21600", 0),
        ("76", 76),
        (" 76 ; w=1", 76),
        (None, None),
        ("", None),
        ("many", None),
        ("-1;w=1", None),
        ("76,5", None),
        ("9" * 30, None),
    ],
)
def test_pull_limits_are_read(value, count):
    assert parse_ratelimit(value) == count


@given(st.text())
def test_no_pull_limit_makes_the_parser_raise(value):
    count = parse_ratelimit(value)
    assert count is None or count >= 0


class TestFloor:
    """A transfer is judged by its progress, in time spent waiting for it."""

    def test_a_drip_misses_it_after_its_window_and_not_before(self):
        floor = MinRateMonitor(1024, 60)
        assert [floor.is_too_slow(1, 1.0) for _ in range(60)] == [False] * 59 + [True]

    def test_a_transfer_that_is_fast_enough_never_does(self):
        floor = MinRateMonitor(1024, 60)
        assert not any(floor.is_too_slow(1100, 1.0) for _ in range(1000))

    def test_what_came_fast_does_not_excuse_what_comes_slowly(self):
        floor = MinRateMonitor(1024, 60)
        assert not floor.is_too_slow(10**9, 60)
        assert any(floor.is_too_slow(1, 1.0) for _ in range(60))

    def test_bytes_that_were_not_waited_for_cost_no_time(self):
        floor = MinRateMonitor(1024, 60)
        assert not any(floor.is_too_slow(1, 0.0) for _ in range(1000))

    def test_none_is_never_missed(self):
        floor = MinRateMonitor(0, 1)
        assert not any(floor.is_too_slow(1, 1000) for _ in range(10))


def test_a_floor_is_missed_by_what_comes_too_slowly_over_its_window():
    floor = MinRateMonitor(1000, 10)
    assert not floor.is_too_slow(1, 9.9)
    assert floor.is_too_slow(1, 0.1)
    assert not floor.is_too_slow(10_000, 10)
    assert not floor.is_too_slow(1, 5)
    assert str(floor) == "less than 1000 bytes a second"
