"""The cap on what all downloads together take from upstream, shared fairly among them.

A download asks before each read, and is granted a piece at a time. While it waits, the kernel's buffers
fill and upstream sends more slowly; the time does not count towards a stall or the minimum rate.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from proxy.config.rates import RateSchedule

# A grant is what the rate allows in this time, in seconds: at a low rate downloads still take turns often
# enough that no registry takes one of them for dead.
GRANT_TIME = 0.05
MIN_GRANT, MAX_GRANT = 4 << 10, 256 << 10
# Seconds that unused capacity is kept, and after which a waiting limiter looks at the time of day again.
BURST_TIME = 0.1
RECHECK_INTERVAL = 1.0

_Waiter = tuple["asyncio.Future[int]", int]


def minute_of_day() -> int:
    """Return the minute of this day, by local time."""
    now = time.localtime()
    return now.tm_hour * 60 + now.tm_min


class RateLimiter:
    """Grants bytes to downloads in turns, at the rate that applies at this time of day."""

    def __init__(
        self, schedule: RateSchedule, get_minute: Callable[[], int] = minute_of_day
    ) -> None:
        self._schedule = schedule
        self._get_minute = get_minute
        self._loop = asyncio.get_running_loop()
        # Downloads that wait, in the order of their turns, each with its waiting reads.
        self._waiting: OrderedDict[object, deque[_Waiter]] = OrderedDict()
        # Bytes that may be granted now; negative after a grant of more than there was.
        self._available = 0.0
        self._refilled_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def configure(self, schedule: RateSchedule) -> None:
        """Apply another schedule, also to downloads that wait."""
        self._schedule = schedule
        self._dispatch()

    async def acquire(self, download: object, most: int) -> int:
        """Wait for a turn of `download`; return how many bytes it may read, at most `most`."""
        if not self._schedule or (rate := self._rate()) is None:
            return most
        if not self._waiting:
            self._refill(rate)
            if self._available > 0:
                return self._grant(rate, most)
        granted: asyncio.Future[int] = self._loop.create_future()
        waiters = self._waiting.setdefault(download, deque())
        waiters.append((granted, most))
        self._set_timer(rate)
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.give_back(granted.result())
            raise

    def give_back(self, count: int) -> None:
        """Return bytes that were granted and not read."""
        if self._schedule and count:
            self._available += count
            self._dispatch()

    def _rate(self) -> int | None:
        return self._schedule.rate_at(self._get_minute())

    def _refill(self, rate: int) -> None:
        now = self._loop.time()
        self._available += (now - self._refilled_at) * rate
        self._available = min(self._available, rate * BURST_TIME)
        self._refilled_at = now

    def _grant(self, rate: int, most: int) -> int:
        granted = min(most, max(MIN_GRANT, min(MAX_GRANT, int(rate * GRANT_TIME))))
        self._available -= granted
        return granted

    def _dispatch(self) -> None:
        """Grant what is available to the downloads in turn, or all that is asked for without a limit."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        rate = self._rate()
        if rate is not None:
            self._refill(rate)
        while self._waiting and (rate is None or self._available > 0):
            download, waiters = self._waiting.popitem(last=False)
            granted, most = waiters.popleft()
            if not granted.done():
                granted.set_result(most if rate is None else self._grant(rate, most))
            if waiters:
                self._waiting[download] = waiters
        if self._waiting and rate is not None:
            self._set_timer(rate)

    def _set_timer(self, rate: int) -> None:
        if self._timer is None:
            delay = min(RECHECK_INTERVAL, max(0.001, -self._available / rate))
            self._timer = self._loop.call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._dispatch()
