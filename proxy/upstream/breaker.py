"""When an upstream that fails is left alone. PURE: `now` is monotonic, randomness an argument.

Closed, everybody may ask. After failures in a row it is open, and nobody may, for a while that
grows each time. Then it is half open: one may ask, the probe, and what comes of it closes or opens it
for all. Any answer but a 5xx is a sign of life, a refusal too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

# So many failures in a row, weighed, open it.
FAILURE_THRESHOLD = 5

INITIAL_BACKOFF = 1.0
MAX_BACKOFF = 30.0


class FailureWeight(IntEnum):
    """How much a failure says. A client waits for each, for some much longer than for others."""

    IMMEDIATE_ERROR = 1
    """A 5xx, a refused or broken connection: known at once, and often gone at once."""
    RESPONSE_TIMEOUT = 2
    """A connection on which no answer came in time."""
    CONNECT_TIMEOUT = FAILURE_THRESHOLD
    """No connection within `connect_timeout`: several SYNs were lost, nobody is there."""


@dataclass(frozen=True, slots=True)
class Outage:
    """Why upstream may not be asked. `since` and `until` are times of the clock of `now`."""

    failing_since: float
    retry_at: float
    reason: str


class Breaker:
    """The state of one upstream. `random` returns numbers in [0, 1).

    Whoever `refusal` lets in reports by `succeeded` or `failed`. Who was let in while it is not closed
    is the probe, and reports `abandoned` if it has learnt nothing.
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
        """Whether everybody may ask."""
        return self._outage is None

    @property
    def reason(self) -> str:
        """What made it open; empty while it is closed."""
        return self._outage.reason if self._outage else ""

    def try_admit(self, now: float) -> Outage | None:
        """Return why upstream may not be asked now; None lets the caller in."""
        if self._outage is None:
            return None
        if self._is_probing or now < self._outage.retry_at:
            return self._outage
        self._is_probing = True
        return None

    def record_success(self) -> None:
        """Note an answer that shows upstream alive, whenever it was asked for."""
        self._failures = self._open_count = 0
        self._outage = None
        self._is_probing = False

    def record_failure(
        self, now: float, reason: str, weight: FailureWeight = FailureWeight.IMMEDIATE_ERROR
    ) -> None:
        """Note a failure."""
        if self._outage is not None and not self._is_probing:
            # Asked for before it opened: what it says is known.
            return
        if not self._failures:
            self._failing_since = now
        self._failures += weight
        if self._is_probing or self._failures >= FAILURE_THRESHOLD:
            ceiling = min(MAX_BACKOFF, INITIAL_BACKOFF * 2**self._open_count)
            # Jitter, because many caches that lost the same upstream must not come back at once.
            pause = ceiling * (0.5 + self._random() / 2)
            self._open_count = min(self._open_count + 1, 16)
            self._outage = Outage(self._failing_since, now + pause, reason)
            self._is_probing = False

    def release_probe(self) -> None:
        """Note that the probe has learnt nothing: the next who asks is the probe."""
        self._is_probing = False
