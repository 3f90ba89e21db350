"""Waiting for an upstream that is down or has reached its rate limit.

Clients get an error at once, but a preload can wait.
"""

import math
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from proxy.concurrency import sleep_until
from proxy.errors import OfflineError, ProxyError, RateLimitedError, UpstreamUnavailableError
from proxy.log import get_logger
from proxy.preload.events import UpstreamResumed, UpstreamWaiting

# Seconds to wait for a rate limit (Docker Hub's window is six hours) and for an outage.
RATE_LIMIT_TIMEOUT = 86_400.0
OUTAGE_TIMEOUT = 120.0
# After an error without `retry_after`.
DEFAULT_RETRY_AFTER = 5.0

T = TypeVar("T")

log = get_logger(__name__)


class UpstreamRetrier:
    """Retries the work of one preload; of simultaneous waits for an upstream, it reports one.

    Unless it `waits`, an error is raised at once.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        on_event: Callable[[UpstreamWaiting | UpstreamResumed], None],
        *,
        waits: bool = True,
    ) -> None:
        self._waits = waits
        self._clock = clock
        self._on_event = on_event
        self._waiter_counts: Counter[str] = Counter()

    async def retry_while_unavailable(self, upstream: str, work: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `work`, retried after transient errors until the timeout."""
        started_at = self._clock()
        while True:
            try:
                return await work()
            except (RateLimitedError, UpstreamUnavailableError) as error:
                is_limited = isinstance(error, RateLimitedError)
                timeout = RATE_LIMIT_TIMEOUT if is_limited else OUTAGE_TIMEOUT
                if not (self._waits and is_transient(error)):
                    raise
                if self._clock() - started_at >= timeout:
                    raise
                await self._wait(upstream, error)

    async def _wait(self, upstream: str, error: ProxyError) -> None:
        until = self._clock() + max(1.0, getattr(error, "retry_after", DEFAULT_RETRY_AFTER))
        if not self._waiter_counts[upstream]:
            log.info("preload_paused", upstream=upstream, reason=str(error))
            self._on_event(
                UpstreamWaiting(upstream=upstream, reason=str(error), until=math.ceil(until))
            )
        self._waiter_counts[upstream] += 1
        try:
            await sleep_until(until, self._clock)
        finally:
            self._waiter_counts[upstream] -= 1
            if not self._waiter_counts[upstream]:
                self._on_event(UpstreamResumed(upstream=upstream))


def is_transient(error: ProxyError) -> bool:
    """Tell whether a later attempt may succeed; while the cache is offline, none will."""
    is_unavailable = isinstance(error, (RateLimitedError, UpstreamUnavailableError))
    return is_unavailable and not isinstance(error, OfflineError)
