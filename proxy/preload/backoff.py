"""Waiting for an upstream whose limits are used up, or that is down, by those who are in no hurry."""

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from proxy.concurrency import sleep_until
from proxy.errors import OfflineError, ProxyError, RateLimitedError, UpstreamUnavailableError
from proxy.log import get_logger
from proxy.preload.events import UpstreamResumed, UpstreamWaiting

# How long upstream is waited for, in seconds: its limits (Docker Hub counts six hours), and an outage.
RATE_LIMIT_TIMEOUT = 86_400.0
OUTAGE_TIMEOUT = 120.0
# After a failure that names no time.
DEFAULT_RETRY_AFTER = 5.0

T = TypeVar("T")

log = get_logger(__name__)


class UpstreamRetrier:
    """The waits of one preload, each told once, however many wait for the same upstream."""

    def __init__(
        self,
        clock: Callable[[], float],
        on_event: Callable[[UpstreamWaiting | UpstreamResumed], None],
    ) -> None:
        self._clock = clock
        self._on_event = on_event
        self._waiter_counts: Counter[str] = Counter()

    async def retry_while_unavailable(self, upstream: str, work: Callable[[], Awaitable[T]]) -> T:
        """Return what `work` gives, tried again as long as upstream may answer otherwise in a while."""
        began = self._clock()
        while True:
            try:
                return await work()
            except (RateLimitedError, UpstreamUnavailableError) as error:
                patience = (
                    RATE_LIMIT_TIMEOUT if isinstance(error, RateLimitedError) else OUTAGE_TIMEOUT
                )
                if not is_transient(error) or self._clock() - began >= patience:
                    raise
                await self._wait_for_upstream(upstream, error)

    async def _wait_for_upstream(self, upstream: str, error: ProxyError) -> None:
        until = self._clock() + max(1.0, getattr(error, "retry_after", DEFAULT_RETRY_AFTER))
        if not self._waiter_counts[upstream]:
            log.info("preload_paused", upstream=upstream, reason=str(error))
            self._on_event(UpstreamWaiting(upstream=upstream, reason=str(error), until=until))
        self._waiter_counts[upstream] += 1
        try:
            await sleep_until(until, self._clock)
        finally:
            self._waiter_counts[upstream] -= 1
            if not self._waiter_counts[upstream]:
                self._on_event(UpstreamResumed(upstream=upstream))


def is_transient(error: ProxyError) -> bool:
    """Tell whether upstream may answer otherwise in a while."""
    is_passing = isinstance(error, (RateLimitedError, UpstreamUnavailableError))
    return is_passing and not isinstance(error, OfflineError)
