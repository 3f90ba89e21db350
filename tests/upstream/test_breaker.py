"""The breaker: opens after failures in a row, probes once, and comes back with the first answer."""

import pytest
from hypothesis import given, strategies as st

from proxy.upstream.breaker import FIRST_PAUSE, MAX_PAUSE, THRESHOLD, Breaker, Weight


def opened(*, times: int = 1, random: float = 0.999) -> tuple[Breaker, float]:
    """Return a breaker that has opened so many times in a row, and the time it last did."""
    breaker, now = Breaker(lambda: random), 100.0
    for _ in range(THRESHOLD):
        assert breaker.refusal(now) is None
        breaker.failed(now, "refused")
    for _ in range(times - 1):
        now += MAX_PAUSE
        assert breaker.refusal(now) is None
        breaker.failed(now, "refused")
    assert not breaker.is_closed
    return breaker, now


def pause(breaker: Breaker, now: float) -> float:
    outage = breaker.refusal(now)
    assert outage
    return outage.until - now


def test_failures_in_a_row_open_it_and_nobody_gets_through():
    breaker, now = opened()
    assert breaker.refusal(now)
    assert breaker.refusal(now + FIRST_PAUSE / 2 - 0.01)


def test_any_answer_between_failures_keeps_it_closed():
    breaker = Breaker(lambda: 0.5)
    for now in range(100):
        breaker.failed(now, "503")
        if now % (THRESHOLD - 1) == 0:
            breaker.succeeded()
    assert breaker.is_closed


def test_a_connection_that_cannot_be_made_opens_it_at_once():
    breaker = Breaker(lambda: 0.5)
    breaker.failed(0, "black hole", Weight.NO_CONNECTION)
    assert breaker.refusal(0.1)


def test_silence_weighs_more_than_a_refusal_and_does_not_open_it_alone():
    breaker = Breaker(lambda: 0.5)
    breaker.failed(0, "silence", Weight.SILENCE)
    assert breaker.refusal(1) is None
    for now in (1, 2):
        breaker.failed(now, "silence", Weight.SILENCE)
    assert breaker.refusal(2.1)


def test_it_says_since_when_and_why():
    breaker = Breaker(lambda: 0.5)
    for second in range(THRESHOLD):
        breaker.failed(10.0 + second, f"reason {second}")
    outage = breaker.refusal(14)
    assert outage
    assert (outage.since, outage.reason) == (10.0, f"reason {THRESHOLD - 1}")
    assert breaker.refusal(30) is None
    breaker.failed(31, "still")
    later = breaker.refusal(31)
    assert later
    assert (later.since, later.reason) == (10.0, "still")


def test_when_its_time_is_up_one_probes_and_the_others_wait():
    breaker, now = opened()
    now += MAX_PAUSE
    assert breaker.refusal(now) is None
    assert breaker.refusal(now)
    assert breaker.refusal(now + 1000)


def test_a_probe_that_succeeds_closes_it_for_all():
    breaker, now = opened(times=4)
    assert breaker.refusal(now + MAX_PAUSE) is None
    breaker.succeeded()
    assert breaker.is_closed
    assert breaker.refusal(now) is None
    for _ in range(THRESHOLD):
        breaker.failed(now, "again")
    assert pause(breaker, now) <= FIRST_PAUSE


def test_a_probe_that_fails_opens_it_for_longer_up_to_a_bound():
    pauses = [pause(*opened(times=times)) for times in range(1, 12)]
    assert pauses == sorted(pauses)
    assert pauses[1] > 1.9 * pauses[0]
    assert pauses[-1] == pytest.approx(MAX_PAUSE, rel=0.01)


def test_a_probe_that_was_abandoned_leaves_the_place_to_another():
    breaker, now = opened()
    now += MAX_PAUSE
    assert breaker.refusal(now) is None
    breaker.abandoned()
    assert not breaker.is_closed
    assert breaker.refusal(now) is None


def test_failures_that_were_under_way_when_it_opened_count_once():
    breaker, now = opened()
    until = now + pause(breaker, now)
    for _ in range(50):
        breaker.failed(now, "refused")
    assert now + pause(breaker, now) == until


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 40))
def test_each_pause_is_jittered_and_bounded(random, times):
    breaker, now = opened(times=times, random=random)
    ceiling = min(MAX_PAUSE, FIRST_PAUSE * 2 ** (times - 1))
    assert ceiling / 2 <= pause(breaker, now) <= ceiling


@given(st.lists(st.sampled_from(["ask", "fail", "succeed", "abandon", "wait"])))
def test_at_most_one_probes_and_the_way_back_is_never_lost(steps):
    breaker, now, probes = Breaker(lambda: 0.5), 0.0, 0
    for step in steps:
        if step == "ask" and breaker.refusal(now) is None:
            probes += not breaker.is_closed
        elif step == "wait":
            now += MAX_PAUSE
        elif step == "fail":
            breaker.failed(now, "x")
            probes = 0
        elif step == "succeed":
            breaker.succeeded()
            probes = 0
        elif step == "abandon" and probes:
            breaker.abandoned()
            probes = 0
        assert probes <= 1
    breaker.abandoned()
    assert breaker.refusal(now + MAX_PAUSE) is None
