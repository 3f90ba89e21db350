"""Limits: what forbids to ask, for how long, and when pulls are worth keeping."""

import pytest
from hypothesis import given, strategies as st

from proxy.upstream.retry import Cooldown, Quota


def test_a_limit_on_pulls_leaves_everything_else_free():
    quota = Quota()
    quota.start_cooldown(Cooldown(100, 30, "why"), is_pull=True)
    hold = quota.active_cooldown(110, is_pull=True)
    assert hold
    assert (hold.seconds_left(110), hold.reason) == (20, "why")
    assert quota.active_cooldown(110, is_pull=False) is None
    assert quota.active_cooldown(130, is_pull=True) is None


def test_a_limit_on_what_is_no_pull_is_one_on_everything():
    quota = Quota()
    quota.start_cooldown(Cooldown(100, 30, "abuse"), is_pull=False)
    assert quota.active_cooldown(110, is_pull=True)
    assert quota.active_cooldown(110, is_pull=False)


@given(st.floats(-1e9, 1e9), st.floats(1, 900))
def test_a_clock_that_jumps_never_makes_a_hold_longer(jump, seconds):
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
def test_few_pulls_are_two_or_a_twentieth(limit, remaining, is_scarce):
    quota = Quota()
    quota.update(limit, remaining)
    assert quota.is_scarce is is_scarce
