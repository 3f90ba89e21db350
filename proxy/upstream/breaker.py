"""The circuit breaker of one upstream. Pure: `now` is monotonic time, randomness is an argument.

Closed, it admits every request. After consecutive failures it opens and admits none, for a backoff
that grows with each opening. Then it is half open and admits one request, the probe, whose outcome
closes or reopens it. Any response except a 5xx counts as a success, even a refusal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

# Consecutive failures, weighed by `FailureWeight`, that open the breaker.
FAILURE_THRESHOLD = 5

# Seconds for which the breaker stays open: at first, and at most.
INITIAL_BACKOFF = 1.0
MAX_BACKOFF = 30.0


class FailureWeight(IntEnum):
    """How much a failure counts: the longer clients wait for it, the more."""

    IMMEDIATE_ERROR = 1
    """A 5xx, or a connection that is refused or breaks: noticed at once, and often short-lived."""
    RESPONSE_TIMEOUT = 2
    """Connected, but no response in time."""
    CONNECT_TIMEOUT = FAILURE_THRESHOLD
    """No connection within `connect_timeout`: several SYNs were lost, the host is unreachable."""


@dataclass(frozen=True, slots=True)
class Outage:
    """Why requests are not admitted. The times are of the clock of `now`."""

    failing_since: float
    retry_at: float
    reason: str


class Breaker:
    """The state of one upstream. `random` returns numbers in [0, 1).

    A caller that `try_admit` lets in reports `record_success` or `record_failure`. A probe that
    learned nothing, for instance because it was cancelled, reports `release_probe`.
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._failures = 0
        self._open_count = 0
        self._outage: Outage | None = None
        self._failing_since = 0.0
        self._is_probing = False

    @property
    def is_closed(self) -> bool:
        """Whether every request is admitted."""
        return self._outage is None

    @property
    def outage(self) -> Outage | None:
        """Why requests are not admitted; None while the breaker is closed."""
        return self._outage

    @property
    def reason(self) -> str:
        """The failure that opened the breaker; empty while it is closed."""
        return self._outage.reason if self._outage else ""

    def try_admit(self, now: float) -> Outage | None:
        """Return None to admit the caller, or the outage that forbids its request."""
        if self._outage is None:
            return None
        if self._is_probing or now < self._outage.retry_at:
            return self._outage
        self._is_probing = True
        return None

    def record_success(self) -> None:
        """Close the breaker: upstream responded, whenever the request was sent."""
        self._failures = self._open_count = 0
        self._outage = None
        self._is_probing = False

    def record_failure(
        self, now: float, reason: str, weight: FailureWeight = FailureWeight.IMMEDIATE_ERROR
    ) -> None:
        """Count a failure, and open the breaker if it was the probe's or reached the threshold."""
        if self._outage is not None and not self._is_probing:
            # The request was sent before the breaker opened; its failure is already known.
            return
        if not self._failures:
            self._failing_since = now
        self._failures += weight
        if self._is_probing or self._failures >= FAILURE_THRESHOLD:
            ceiling = min(MAX_BACKOFF, INITIAL_BACKOFF * 2**self._open_count)
            # Jitter keeps many caches that lost the same upstream from returning at the same
            # moment.
            backoff = ceiling * (0.5 + self._random() / 2)
            self._open_count = min(self._open_count + 1, 16)
            self._outage = Outage(self._failing_since, now + backoff, reason)
            self._is_probing = False

    def release_probe(self) -> None:
        """Record that the probe learned nothing: the next caller becomes the probe."""
        self._is_probing = False
