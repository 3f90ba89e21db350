"""The health of a registry: its breaker, fed with the outcome of each request."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aiohttp import ConnectionTimeoutError

from proxy.errors import (
    LoopDetectedError,
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
    """The health of one registry or mirror, named `label` in errors. `clock` is Unix time."""

    def __init__(self, label: str, clock: Callable[[], float]) -> None:
        self._label = label
        self._clock = clock
        self._breaker = Breaker(random.random)
        self._now = asyncio.get_running_loop().time
        # Unix times of the last response and the last failure, and the latter's reason.
        self.last_success_at: float | None = None
        self.last_failure_at: float | None = None
        self.last_failure = ""

    @property
    def is_up(self) -> bool:
        """Whether requests are sent, that is, whether the breaker is closed."""
        return self._breaker.is_closed

    @property
    def reason(self) -> str:
        """Why no requests are sent; empty while they are."""
        return self._breaker.reason

    @property
    def retry_at(self) -> float | None:
        """When one request is sent to see whether it is up again, in Unix time; None while it is up."""
        outage = self._breaker.outage
        return self._clock() + max(0.0, outage.retry_at - self._now()) if outage else None

    @property
    def outage_times(self) -> tuple[float, float] | None:
        """Since when it fails and when it may be asked again, in Unix time; None while it is up."""
        outage = self._breaker.outage
        if outage is None:
            return None
        offset = self._clock() - self._now()
        return outage.failing_since + offset, max(outage.retry_at, self._now()) + offset

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Run the block, which must record its outcome, or raise `UpstreamDownError`."""
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
        """Run the block and record its outcome, or raise `UpstreamDownError`."""
        with self.admit():
            try:
                yield
            except (
                NotFoundError,
                UpstreamUnauthorizedError,
                RateLimitedError,
                LoopDetectedError,
            ):
                self.record_success()
                raise
            except ProxyError as error:
                self.record_failure(error)
                raise
            self.record_success()

    def record_success(self) -> None:
        """Record a response that shows the registry alive."""
        if not self.is_up:
            log.info("upstream_up", upstream=self._label)
        self.last_success_at = self._clock()
        self._breaker.record_success()

    def record_failure(self, error: ProxyError) -> None:
        """Record a failure, weighed by how long clients waited for it."""
        if isinstance(error, OfflineError):
            return  # ours, not the registry's
        weight = FailureWeight.IMMEDIATE_ERROR
        if isinstance(error.__cause__, ConnectionTimeoutError):
            weight = FailureWeight.CONNECT_TIMEOUT
        elif isinstance(error, UpstreamTimeoutError):
            weight = FailureWeight.RESPONSE_TIMEOUT
        was_up = self.is_up
        reason = str(error).removeprefix(f"{self._label} ")
        self.last_failure_at, self.last_failure = self._clock(), reason
        self._breaker.record_failure(self._now(), reason, weight)
        if was_up and not self.is_up:
            log.warning("upstream_down", upstream=self._label, reason=reason)

    def _down_error(self, outage: Outage, now: float) -> UpstreamDownError:
        since = time.gmtime(self._clock() - (now - outage.failing_since))
        wait = max(1.0, outage.retry_at - now)
        return UpstreamDownError(
            f"{self._label} has been down since {time.strftime('%H:%M:%S', since)} UTC, "
            f"next attempt in {wait:.0f} s: {outage.reason}",
            retry_after=wait,
        )
