"""Whether a registry is asked at all: its breaker, told how each request ended."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aiohttp import ConnectionTimeoutError

from proxy.errors import (
    OfflineError,
    ProxyError,
    RateLimitedError,
    UnknownError,
    UpstreamDownError,
    UpstreamTimeoutError,
    UpstreamUnauthorizedError,
)
from proxy.log import get_logger
from proxy.upstream.breaker import Breaker, Outage, Weight

log = get_logger(__name__)


class Health:
    """The health of `peer`, which is what its errors call it. `clock` tells Unix time."""

    def __init__(self, peer: str, clock: Callable[[], float]) -> None:
        self._peer = peer
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
    def admitted(self) -> Iterator[None]:
        """Let the block ask and report, or raise `UpstreamDownError`."""
        now = self._now()
        if outage := self._breaker.refusal(now):
            raise self._down(outage, now)
        is_probe = not self._breaker.is_closed
        try:
            yield
        finally:
            if is_probe:
                self._breaker.abandoned()

    @contextmanager
    def judged(self) -> Iterator[None]:
        """Let the block ask, and report how the whole of it ends. Raises `UpstreamDownError`."""
        with self.admitted():
            try:
                yield
            except (UnknownError, UpstreamUnauthorizedError, RateLimitedError):
                self.succeeded()
                raise
            except ProxyError as error:
                self.failed(error)
                raise
            self.succeeded()

    def succeeded(self) -> None:
        """Note a sign of life."""
        if not self.is_up:
            log.info("upstream_up", upstream=self._peer)
        self._breaker.succeeded()

    def failed(self, error: ProxyError) -> None:
        """Note a failure, weighed by how long somebody has waited for it."""
        if isinstance(error, OfflineError):
            return  # our own doing
        weight = Weight.ANSWER
        if isinstance(error.__cause__, ConnectionTimeoutError):
            weight = Weight.NO_CONNECTION
        elif isinstance(error, UpstreamTimeoutError):
            weight = Weight.SILENCE
        was_up = self.is_up
        reason = str(error).removeprefix(f"{self._peer} ")
        self._breaker.failed(self._now(), reason, weight)
        if was_up and not self.is_up:
            log.warning("upstream_down", upstream=self._peer, reason=reason)

    def _down(self, outage: Outage, now: float) -> UpstreamDownError:
        since = time.gmtime(self._clock() - (now - outage.since))
        wait = max(1.0, outage.until - now)
        return UpstreamDownError(
            f"{self._peer} is down since {time.strftime('%H:%M:%S', since)} UTC, "
            f"next attempt in {wait:.0f} s: {outage.reason}",
            retry_after=wait,
        )
