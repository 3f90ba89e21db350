"""Waiting for an upstream whose limits are used up, or that is down, by those who are in no hurry."""

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from proxy.concurrency import reached
from proxy.errors import OfflineError, ProxyError, RateLimitedError, UpstreamUnavailableError
from proxy.log import get_logger
from proxy.preload.events import Resumed, Waiting

# How long upstream is waited for, in seconds: its limits (Docker Hub counts six hours), and an outage.
LIMITS = 86_400.0
OUTAGE = 120.0
# After a failure that names no time.
PAUSE = 5.0

T = TypeVar("T")

log = get_logger(__name__)


class Waits:
    """The waits of one preload, each told once, however many wait for the same upstream."""

    def __init__(
        self, clock: Callable[[], float], tell: Callable[[Waiting | Resumed], None]
    ) -> None:
        self._clock = clock
        self._tell = tell
        self._waiting: Counter[str] = Counter()

    async def patiently(self, upstream: str, work: Callable[[], Awaitable[T]]) -> T:
        """Return what `work` gives, tried again as long as upstream may answer otherwise in a while."""
        began = self._clock()
        while True:
            try:
                return await work()
            except (RateLimitedError, UpstreamUnavailableError) as error:
                patience = LIMITS if isinstance(error, RateLimitedError) else OUTAGE
                if not is_passing(error) or self._clock() - began >= patience:
                    raise
                await self._wait(upstream, error)

    async def _wait(self, upstream: str, error: ProxyError) -> None:
        until = self._clock() + max(1.0, getattr(error, "retry_after", PAUSE))
        if not self._waiting[upstream]:
            log.info("preload_waits", upstream=upstream, reason=str(error))
            self._tell(Waiting(upstream=upstream, reason=str(error), until=until))
        self._waiting[upstream] += 1
        try:
            await reached(until, self._clock)
        finally:
            self._waiting[upstream] -= 1
            if not self._waiting[upstream]:
                self._tell(Resumed(upstream=upstream))


def is_passing(error: ProxyError) -> bool:
    """Tell whether upstream may answer otherwise in a while."""
    is_passing = isinstance(error, (RateLimitedError, UpstreamUnavailableError))
    return is_passing and not isinstance(error, OfflineError)
