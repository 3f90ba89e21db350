"""Whether a registry is asked at all: its breaker, told how each request ended."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aiohttp import ConnectionTimeoutError

from proxy.errors import (
    NotFoundError,
    OfflineError,
    ProxyError,
    RateLimitedError,
    UpstreamDownError,
    UpstreamTimeoutError,
    UpstreamUnauthorizedError,
)
from proxy.log import get_logger
from proxy.upstream.breaker import Breaker, FailureWeight, Outage

log = get_logger(__name__)


class RegistryHealth:
    """The health of `peer`, which is what its errors call it. `clock` tells Unix time."""

    def __init__(self, label: str, clock: Callable[[], float]) -> None:
        self._label = label
        self._clock = clock
        self._breaker = Breaker(random.random)
        self._now = asyncio.get_running_loop().time

    @property
    def is_up(self) -> bool:
        """Whether it is asked, and not left alone because it fails."""
        return self._breaker.is_closed

    @property
    def reason(self) -> str:
        """Why it is left alone; empty while it is asked."""
        return self._breaker.reason

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Let the block ask and report, or raise `UpstreamDownError`."""
        now = self._now()
        if outage := self._breaker.try_admit(now):
            raise self._down_error(outage, now)
        is_probe = not self._breaker.is_closed
        try:
            yield
        finally:
            if is_probe:
                self._breaker.release_probe()

    @contextmanager
    def admit_and_record(self) -> Iterator[None]:
        """Let the block ask, and report how the whole of it ends. Raises `UpstreamDownError`."""
        with self.admit():
            try:
                yield
            except (NotFoundError, UpstreamUnauthorizedError, RateLimitedError):
                self.record_success()
                raise
            except ProxyError as error:
                self.record_failure(error)
                raise
            self.record_success()

    def record_success(self) -> None:
        """Note a sign of life."""
        if not self.is_up:
            log.info("upstream_up", upstream=self._label)
        self._breaker.record_success()

    def record_failure(self, error: ProxyError) -> None:
        """Note a failure, weighed by how long somebody has waited for it."""
        if isinstance(error, OfflineError):
            return  # our own doing
        weight = FailureWeight.IMMEDIATE_ERROR
        if isinstance(error.__cause__, ConnectionTimeoutError):
            weight = FailureWeight.CONNECT_TIMEOUT
        elif isinstance(error, UpstreamTimeoutError):
            weight = FailureWeight.RESPONSE_TIMEOUT
        was_up = self.is_up
        reason = str(error).removeprefix(f"{self._label} ")
        self._breaker.record_failure(self._now(), reason, weight)
        if was_up and not self.is_up:
            log.warning("upstream_down", upstream=self._label, reason=reason)

    def _down_error(self, outage: Outage, now: float) -> UpstreamDownError:
        since = time.gmtime(self._clock() - (now - outage.failing_since))
        wait = max(1.0, outage.retry_at - now)
        return UpstreamDownError(
            f"{self._label} is down since {time.strftime('%H:%M:%S', since)} UTC, "
            f"next attempt in {wait:.0f} s: {outage.reason}",
            retry_after=wait,
        )
