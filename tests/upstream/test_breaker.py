"""The breaker opens after consecutive failures, admits one probe, and closes on any success."""

import pytest
from hypothesis import given, strategies as st

from proxy.upstream.breaker import (
    FAILURE_THRESHOLD,
    INITIAL_BACKOFF,
    MAX_BACKOFF,
    Breaker,
    FailureWeight,
)


def open_breaker(*, times: int = 1, random: float = 0.999) -> tuple[Breaker, float]:
    """Return a breaker that has opened `times` times in a row, and the time of the last opening."""
    breaker, now = Breaker(lambda: random), 100.0
    for _ in range(FAILURE_THRESHOLD):
        assert breaker.try_admit(now) is None
        breaker.record_failure(now, "refused")
    for _ in range(times - 1):
        now += MAX_BACKOFF
        assert breaker.try_admit(now) is None
        breaker.record_failure(now, "refused")
    assert not breaker.is_closed
    return breaker, now


def backoff(breaker: Breaker, now: float) -> float:
    outage = breaker.try_admit(now)
    assert outage
    return outage.retry_at - now


def test_consecutive_failures_open_the_breaker():
    breaker, now = open_breaker()
    assert breaker.try_admit(now)
    assert breaker.try_admit(now + INITIAL_BACKOFF / 2 - 0.01)


def test_a_success_between_failures_keeps_it_closed():
    breaker = Breaker(lambda: 0.5)
    for now in range(100):
        breaker.record_failure(now, "503")
        if now % (FAILURE_THRESHOLD - 1) == 0:
            breaker.record_success()
    assert breaker.is_closed


def test_a_connect_timeout_opens_it_at_once():
    breaker = Breaker(lambda: 0.5)
    breaker.record_failure(0, "no connection", FailureWeight.CONNECT_TIMEOUT)
    assert breaker.try_admit(0.1)


def test_a_response_timeout_weighs_more_than_an_error_but_does_not_open_it_alone():
    breaker = Breaker(lambda: 0.5)
    breaker.record_failure(0, "no response", FailureWeight.RESPONSE_TIMEOUT)
    assert breaker.try_admit(1) is None
    for now in (1, 2):
        breaker.record_failure(now, "no response", FailureWeight.RESPONSE_TIMEOUT)
    assert breaker.try_admit(2.1)


def test_an_outage_has_its_start_and_its_latest_reason():
    breaker = Breaker(lambda: 0.5)
    for second in range(FAILURE_THRESHOLD):
        breaker.record_failure(10.0 + second, f"reason {second}")
    outage = breaker.try_admit(14)
    assert outage
    assert (outage.failing_since, outage.reason) == (10.0, f"reason {FAILURE_THRESHOLD - 1}")
    assert breaker.try_admit(30) is None
    breaker.record_failure(31, "still")
    later = breaker.try_admit(31)
    assert later
    assert (later.failing_since, later.reason) == (10.0, "still")


def test_after_the_backoff_only_one_probe_is_admitted():
    breaker, now = open_breaker()
    now += MAX_BACKOFF
    assert breaker.try_admit(now) is None
    assert breaker.try_admit(now)
    assert breaker.try_admit(now + 1000)


def test_a_successful_probe_closes_the_breaker():
    breaker, now = open_breaker(times=4)
    assert breaker.try_admit(now + MAX_BACKOFF) is None
    breaker.record_success()
    assert breaker.is_closed
    assert breaker.try_admit(now) is None
    for _ in range(FAILURE_THRESHOLD):
        breaker.record_failure(now, "again")
    assert backoff(breaker, now) <= INITIAL_BACKOFF


def test_failed_probes_lengthen_the_backoff_up_to_the_maximum():
    backoffs = [backoff(*open_breaker(times=times)) for times in range(1, 12)]
    assert backoffs == sorted(backoffs)
    assert backoffs[1] > 1.9 * backoffs[0]
    assert backoffs[-1] == pytest.approx(MAX_BACKOFF, rel=0.01)


def test_after_a_released_probe_the_next_caller_probes():
    breaker, now = open_breaker()
    now += MAX_BACKOFF
    assert breaker.try_admit(now) is None
    breaker.release_probe()
    assert not breaker.is_closed
    assert breaker.try_admit(now) is None


def test_failures_of_requests_from_before_the_opening_do_not_lengthen_it():
    breaker, now = open_breaker()
    retry_at = now + backoff(breaker, now)
    for _ in range(50):
        breaker.record_failure(now, "refused")
    assert now + backoff(breaker, now) == retry_at


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 40))
def test_each_backoff_has_jitter_and_a_bound(random, times):
    breaker, now = open_breaker(times=times, random=random)
    ceiling = min(MAX_BACKOFF, INITIAL_BACKOFF * 2 ** (times - 1))
    assert ceiling / 2 <= backoff(breaker, now) <= ceiling


@given(st.lists(st.sampled_from(["admit", "failure", "success", "release", "wait"])))
def test_there_is_at_most_one_probe_and_always_a_way_to_recover(steps):
    breaker, now, probes = Breaker(lambda: 0.5), 0.0, 0
    for step in steps:
        if step == "admit" and breaker.try_admit(now) is None:
            probes += not breaker.is_closed
        elif step == "wait":
            now += MAX_BACKOFF
        elif step == "failure":
            breaker.record_failure(now, "x")
            probes = 0
        elif step == "success":
            breaker.record_success()
            probes = 0
        elif step == "release" and probes:
            breaker.release_probe()
            probes = 0
        assert probes <= 1
    breaker.release_probe()
    assert breaker.try_admit(now + MAX_BACKOFF) is None
