"""Rate limits: which requests a 429 pauses and for how long, and when pulls are scarce."""

from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given, strategies as st

from proxy.upstream.quota import (
    DEFAULT_RETRY_AFTER,
    MAX_RETRY_AFTER,
    MIN_RETRY_AFTER,
    Cooldown,
    Quota,
    parse_ratelimit,
    parse_retry_after,
)

NOW = 1_700_000_000.0


def test_a_429_for_a_pull_pauses_only_pulls():
    quota = Quota()
    quota.start_cooldown(Cooldown(100, 30, "why"), is_pull=True)
    cooldown = quota.active_cooldown(110, is_pull=True)
    assert cooldown
    assert (cooldown.seconds_left(110), cooldown.reason) == (20, "why")
    assert quota.active_cooldown(110, is_pull=False) is None
    assert quota.active_cooldown(130, is_pull=True) is None


def test_a_429_for_anything_else_pauses_everything():
    quota = Quota()
    quota.start_cooldown(Cooldown(100, 30, "abuse"), is_pull=False)
    assert quota.active_cooldown(110, is_pull=True)
    assert quota.active_cooldown(110, is_pull=False)


@given(st.floats(-1e9, 1e9), st.floats(1, 900))
def test_a_clock_jump_never_lengthens_a_cooldown(jump, seconds):
    left = Cooldown(1000, seconds, "").seconds_left(1000 + jump)
    assert 0 <= left <= seconds


@pytest.mark.parametrize(
    ("limit", "remaining", "is_scarce"),
    [
        (None, None, False),
        (100, 100, False),
        (100, 6, False),
        (100, 5, True),
        (100, 0, True),
        (10, 3, False),
        (10, 2, True),
        (1, 1, True),
        (44000, 2200, True),
    ],
)
def test_pulls_are_scarce_from_two_or_a_twentieth(limit, remaining, is_scarce):
    quota = Quota()
    quota.update(limit, remaining)
    assert quota.is_scarce is is_scarce


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
def test_retry_after_is_parsed_in_all_forms_that_registries_send(value, seconds):
    assert parse_retry_after(value, NOW) == seconds


@given(st.integers(0, 10**12))
def test_a_date_and_a_timestamp_are_equivalent(seconds):
    later = NOW + seconds % 10_000
    date = format_datetime(datetime.fromtimestamp(later, UTC), usegmt=True)
    assert parse_retry_after(date, NOW) == parse_retry_after(str(int(later)), NOW)


@given(st.none() | st.text() | st.from_regex(r"[A-Za-z]{3}, \d+ [A-Z][a-z]{2} \d+ \d+:\d+:\d+ \S+"))
def test_any_retry_after_is_parsed_to_a_value_within_the_bounds(value):
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
def test_ratelimit_headers_are_parsed(value, count):
    assert parse_ratelimit(value) == count


@given(st.text())
def test_no_ratelimit_header_makes_the_parser_raise(value):
    count = parse_ratelimit(value)
    assert count is None or count >= 0
