"""Retries have bounded delays with jitter; a transfer below the minimum rate is too slow."""

from itertools import repeat

from hypothesis import given, strategies as st

from proxy.upstream.network.retry import (
    MAX_DELAY,
    TRANSIENT_STATUSES,
    MinRateMonitor,
    backoff_delays,
)


@given(st.integers(1, 30), st.floats(0, 1, exclude_max=True))
def test_delays_grow_and_stay_bounded(attempts, random):
    delays = list(backoff_delays(attempts, repeat(random)))
    assert len(delays) == attempts - 1
    assert delays == sorted(delays)
    assert all(0 < delay <= MAX_DELAY for delay in delays)


def test_delays_have_jitter():
    assert list(backoff_delays(3, repeat(0.0))) == [0.125, 0.25]
    assert list(backoff_delays(3, repeat(0.5))) == [0.1875, 0.375]


def test_only_statuses_that_mean_not_now_are_transient():
    assert {408, 425, 500, 502, 503, 504, 507, 509, 520, 522, 529, 530, 598} <= TRANSIENT_STATUSES
    assert TRANSIENT_STATUSES.isdisjoint((200, 400, 401, 403, 404, 429, 451, 501, 505, 511))


class TestMinRateMonitor:
    """The rate counts bytes per second of waiting for upstream."""

    def test_a_trickle_is_too_slow_after_the_window_and_not_before(self):
        monitor = MinRateMonitor(1024, 60)
        assert [monitor.is_too_slow(1, 1.0) for _ in range(60)] == [False] * 59 + [True]

    def test_a_fast_transfer_is_never_too_slow(self):
        monitor = MinRateMonitor(1024, 60)
        assert not any(monitor.is_too_slow(1100, 1.0) for _ in range(1000))

    def test_a_fast_window_does_not_excuse_a_slow_one(self):
        monitor = MinRateMonitor(1024, 60)
        assert not monitor.is_too_slow(10**9, 60)
        assert any(monitor.is_too_slow(1, 1.0) for _ in range(60))

    def test_bytes_that_arrive_without_waiting_do_not_count_as_slow(self):
        monitor = MinRateMonitor(1024, 60)
        assert not any(monitor.is_too_slow(1, 0.0) for _ in range(1000))

    def test_a_rate_of_zero_accepts_everything(self):
        monitor = MinRateMonitor(0, 1)
        assert not any(monitor.is_too_slow(1, 1000) for _ in range(10))

    def test_each_window_is_judged_on_its_own(self):
        monitor = MinRateMonitor(1000, 10)
        assert not monitor.is_too_slow(1, 9.9)
        assert monitor.is_too_slow(1, 0.1)
        assert not monitor.is_too_slow(10_000, 10)
        assert not monitor.is_too_slow(1, 5)
        assert str(monitor) == "less than 1000 bytes a second"
