"""How long an answer is fresh, and how long a stale one may be served."""

import math

import pytest
from hypothesis import given, strategies as st

from proxy.cache.freshness import Freshness, compute_freshness


@pytest.mark.parametrize(
    ("age", "expected"),
    [
        (0, Freshness.FRESH),
        (9.9, Freshness.FRESH),
        (10, Freshness.STALE_WHILE_REVALIDATE),
        (14.9, Freshness.STALE_WHILE_REVALIDATE),
        (15, Freshness.STALE_IF_ERROR),
        (109.9, Freshness.STALE_IF_ERROR),
        (110, Freshness.EXPIRED),
        (-1, Freshness.STALE_IF_ERROR),
    ],
)
def test_an_answer_goes_from_fresh_to_expired(age, expected):
    assert compute_freshness(age, ttl=10, stale_while_revalidate=5, stale_if_error=100) is expected


durations = st.floats(0, 1e9)


@given(st.floats(0, 1e10), st.floats(0, 1e10), durations, durations)
def test_an_older_answer_is_never_fresher(age, more, ttl, stale):
    order = list(Freshness)
    younger = compute_freshness(age, ttl=ttl, stale_while_revalidate=0, stale_if_error=stale)
    older = compute_freshness(age + more, ttl=ttl, stale_while_revalidate=0, stale_if_error=stale)
    assert order.index(younger) <= order.index(older)


@given(st.floats(-1e10, -1e-6), durations, durations)
def test_after_the_clock_was_set_back_nothing_is_fresh(age, ttl, stale):
    assert (
        compute_freshness(age, ttl=ttl, stale_while_revalidate=60, stale_if_error=stale)
        is Freshness.STALE_IF_ERROR
    )


@given(st.floats(-1e9, 1e10))
def test_what_never_moves_is_fresh_at_any_age(age):
    fresh = compute_freshness(age, ttl=math.inf, stale_while_revalidate=0, stale_if_error=0)
    assert fresh is Freshness.FRESH
