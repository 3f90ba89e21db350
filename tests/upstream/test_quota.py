"""Rate limits: which requests a 429 pauses and for how long, and when pulls are scarce."""

import asyncio
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given, strategies as st

from proxy.cli.api_client import AdminClient
from proxy.upstream.quota import (
    MAX_COOLDOWNS,
    MAX_RETRY_AFTER,
    MIN_RETRY_AFTER,
    Cooldown,
    Quota,
    RequestClass,
    parse_ratelimit,
    parse_ratelimit_window,
    parse_retry_after,
)

NOW = 1_700_000_000.0


BLOBS = RequestClass("GET", "blob", "me/app")
PULLS = RequestClass("GET", "manifest", "me/app")
OTHERS = [
    RequestClass("GET", "blob", "me/other"),
    RequestClass("HEAD", "blob", "me/app"),
    RequestClass("GET", "manifest", "me/app"),
    RequestClass("GET", "tags", "me/app"),
    RequestClass("GET", "referrers", "me/app"),
]


def test_a_429_pauses_requests_of_its_kind_for_its_repository():
    quota = Quota()
    quota.start_cooldown(BLOBS, 100, 30, "why")
    cooldown = quota.active_cooldown(BLOBS, 110)
    assert cooldown
    assert (cooldown.seconds_left(110), cooldown.reason) == (20, "why")
    assert not any(quota.active_cooldown(other, 110) for other in OTHERS)
    assert quota.active_cooldown(BLOBS, 130) is None


def test_a_429_for_the_accounts_pulls_pauses_the_pulls_of_all_repositories():
    quota = Quota()
    quota.start_cooldown(PULLS.of_account(), 100, 30, "limit")
    assert quota.active_cooldown(PULLS, 110)
    assert quota.active_cooldown(RequestClass("GET", "manifest", "me/other"), 110)
    assert not quota.active_cooldown(BLOBS, 110)
    assert not quota.active_cooldown(RequestClass("HEAD", "manifest", "me/app"), 110)


@pytest.mark.parametrize(
    ("requests", "pauses"),
    [
        (BLOBS, [1, 2, 4, 8, 16, 32, 60, 60]),
        (PULLS, [1, 2, 4, 8, 16, 32, 60, 60]),
        (PULLS.of_account(), [60, 60, 60]),
    ],
)
def test_without_retry_after_each_429_in_a_row_pauses_longer(requests, pauses):
    quota, now = Quota(), 1000.0
    for pause in pauses:
        assert quota.start_cooldown(requests, now, None, "").seconds == pause
        now += pause
    quota.end_cooldown(requests, now)
    assert quota.start_cooldown(requests, now, None, "").seconds == pauses[0]


def test_a_429_to_a_request_from_before_the_pause_lengthens_it_only_by_its_retry_after():
    quota = Quota()
    quota.start_cooldown(BLOBS, 100, 10, "")
    assert quota.start_cooldown(BLOBS, 101, None, "").seconds_left(101) == 9
    assert quota.start_cooldown(BLOBS, 102, 5, "").seconds_left(102) == 8
    assert quota.start_cooldown(BLOBS, 103, 30, "").seconds_left(103) == 30


def test_a_success_during_a_pause_does_not_end_it():
    quota = Quota()
    quota.start_cooldown(BLOBS, 100, 10, "")
    quota.end_cooldown(BLOBS, 101)
    assert quota.active_cooldown(BLOBS, 101)


def test_pauses_are_remembered_up_to_a_bound():
    quota = Quota()
    for number in range(MAX_COOLDOWNS + 1):
        quota.start_cooldown(BLOBS._replace(repository=f"me/{number}"), 100, 10, "")
    assert not quota.active_cooldown(BLOBS._replace(repository="me/0"), 101)
    assert quota.active_cooldown(BLOBS._replace(repository="me/1"), 101)


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
        (None, None),
        ("", None),
        ("-5", None),
        ("1.5", None),
        ("880.092\u00b5s, allowed: 44000/minute", None),
        ("9" * 400, None),
        ("\u0663\u0660", None),
        ("Tue, 99 Nov 2023 22:14:20 GMT", None),
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
    seconds = parse_retry_after(value, NOW)
    assert seconds is None or MIN_RETRY_AFTER <= seconds <= MAX_RETRY_AFTER


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


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("100;w=21600", 21_600),
        ("76 ; w=1 ", 1),
        ("100;w=3600;policy=x", 3600),
        ("100", None),
        ("100;w=", None),
        ("", None),
        (None, None),
    ],
)
def test_the_window_of_a_limit_is_read(value, seconds):
    assert parse_ratelimit_window(value) == seconds


def test_after_its_window_all_pulls_are_allowed_again():
    quota = Quota()
    quota.update(100, 2, renewed_at=1000.0)
    quota.renew(999.9)
    assert (quota.remaining, quota.is_scarce) == (2, True)
    quota.renew(1000.0)
    assert (quota.remaining, quota.is_scarce) == (100, False)
    quota.update(None, None)
    quota.renew(2000.0)
    assert quota.remaining is None


async def test_the_status_and_the_metric_forget_a_limit_after_its_window(registry, program):
    await program.pull(registry.add_image("me/app"))
    left = await program.metric("pullcache_upstream_ratelimit_remaining")
    assert left < await program.metric("pullcache_upstream_ratelimit_limit")
    program.clock.advance(21_599)
    assert await program.metric("pullcache_upstream_ratelimit_remaining") == left
    program.clock.advance(2)
    assert await program.metric("pullcache_upstream_ratelimit_remaining") == 100
    status = await asyncio.to_thread(AdminClient(program.root).get, "/api/v1/status")
    assert status["upstreams"][0]["ratelimit_remaining"] == 100
