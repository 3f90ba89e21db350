"""The breaker: opens after failures in a row, probes once, and comes back with the first answer."""

import pytest
from hypothesis import given, strategies as st

from proxy.upstream.breaker import (
    FAILURE_THRESHOLD,
    INITIAL_BACKOFF,
    MAX_BACKOFF,
    Breaker,
    FailureWeight,
)


def opened(*, times: int = 1, random: float = 0.999) -> tuple[Breaker, float]:
    """Return a breaker that has opened so many times in a row, and the time it last did."""
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


def pause(breaker: Breaker, now: float) -> float:
    outage = breaker.try_admit(now)
    assert outage
    return outage.retry_at - now


def test_failures_in_a_row_open_it_and_nobody_gets_through():
    breaker, now = opened()
    assert breaker.try_admit(now)
    assert breaker.try_admit(now + INITIAL_BACKOFF / 2 - 0.01)


def test_any_answer_between_failures_keeps_it_closed():
    breaker = Breaker(lambda: 0.5)
    for now in range(100):
        breaker.record_failure(now, "503")
        if now % (FAILURE_THRESHOLD - 1) == 0:
            breaker.record_success()
    assert breaker.is_closed


def test_a_connection_that_cannot_be_made_opens_it_at_once():
    breaker = Breaker(lambda: 0.5)
    breaker.record_failure(0, "black hole", FailureWeight.CONNECT_TIMEOUT)
    assert breaker.try_admit(0.1)


def test_silence_weighs_more_than_a_refusal_and_does_not_open_it_alone():
    breaker = Breaker(lambda: 0.5)
    breaker.record_failure(0, "silence", FailureWeight.RESPONSE_TIMEOUT)
    assert breaker.try_admit(1) is None
    for now in (1, 2):
        breaker.record_failure(now, "silence", FailureWeight.RESPONSE_TIMEOUT)
    assert breaker.try_admit(2.1)


def test_it_says_since_when_and_why():
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


def test_when_its_time_is_up_one_probes_and_the_others_wait():
    breaker, now = opened()
    now += MAX_BACKOFF
    assert breaker.try_admit(now) is None
    assert breaker.try_admit(now)
    assert breaker.try_admit(now + 1000)


def test_a_probe_that_succeeds_closes_it_for_all():
    breaker, now = opened(times=4)
    assert breaker.try_admit(now + MAX_BACKOFF) is None
    breaker.record_success()
    assert breaker.is_closed
    assert breaker.try_admit(now) is None
    for _ in range(FAILURE_THRESHOLD):
        breaker.record_failure(now, "again")
    assert pause(breaker, now) <= INITIAL_BACKOFF


def test_a_probe_that_fails_opens_it_for_longer_up_to_a_bound():
    pauses = [pause(*opened(times=times)) for times in range(1, 12)]
    assert pauses == sorted(pauses)
    assert pauses[1] > 1.9 * pauses[0]
    assert pauses[-1] == pytest.approx(MAX_BACKOFF, rel=0.01)


def test_a_probe_that_was_abandoned_leaves_the_place_to_another():
    breaker, now = opened()
    now += MAX_BACKOFF
    assert breaker.try_admit(now) is None
    breaker.release_probe()
    assert not breaker.is_closed
    assert breaker.try_admit(now) is None


def test_failures_that_were_under_way_when_it_opened_count_once():
    breaker, now = opened()
    until = now + pause(breaker, now)
    for _ in range(50):
        breaker.record_failure(now, "refused")
    assert now + pause(breaker, now) == until


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 40))
def test_each_pause_is_jittered_and_bounded(random, times):
    breaker, now = opened(times=times, random=random)
    ceiling = min(MAX_BACKOFF, INITIAL_BACKOFF * 2 ** (times - 1))
    assert ceiling / 2 <= pause(breaker, now) <= ceiling


@given(st.lists(st.sampled_from(["ask", "fail", "succeed", "abandon", "wait"])))
def test_at_most_one_probes_and_the_way_back_is_never_lost(steps):
    breaker, now, probes = Breaker(lambda: 0.5), 0.0, 0
    for step in steps:
        if step == "ask" and breaker.try_admit(now) is None:
            probes += not breaker.is_closed
        elif step == "wait":
            now += MAX_BACKOFF
        elif step == "fail":
            breaker.record_failure(now, "x")
            probes = 0
        elif step == "succeed":
            breaker.record_success()
            probes = 0
        elif step == "abandon" and probes:
            breaker.release_probe()
            probes = 0
        assert probes <= 1
    breaker.release_probe()
    assert breaker.try_admit(now + MAX_BACKOFF) is None
