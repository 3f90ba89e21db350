"""When an upstream that fails is left alone. PURE: `now` is monotonic, randomness an argument.

Closed, everybody may ask. After failures in a row it is open, and nobody may, for a while that
grows each time. Then it is half open: one may ask, the probe, and what comes of it closes or opens it
for all. Any answer but a 5xx is a sign of life, a refusal too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

# So many failures in a row, weighed, open it.
THRESHOLD = 5

FIRST_PAUSE = 1.0
MAX_PAUSE = 30.0


class Weight(IntEnum):
    """How much a failure says. A client waits for each, for some much longer than for others."""

    ANSWER = 1
    """A 5xx, a refused or broken connection: known at once, and often gone at once."""
    SILENCE = 2
    """A connection on which no answer came in time."""
    NO_CONNECTION = THRESHOLD
    """No connection within `connect_timeout`: several SYNs were lost, nobody is there."""


@dataclass(frozen=True, slots=True)
class Outage:
    """Why upstream may not be asked. `since` and `until` are times of the clock of `now`."""

    since: float
    until: float
    reason: str


class Breaker:
    """The state of one upstream. `random` returns numbers in [0, 1).

    Whoever `refusal` lets in reports by `succeeded` or `failed`. Who was let in while it is not closed
    is the probe, and reports `abandoned` if it has learnt nothing.
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._failures = 0
        self._openings = 0
        self._outage: Outage | None = None
        self._since = 0.0
        self._is_probed = False

    @property
    def is_closed(self) -> bool:
        """Whether everybody may ask."""
        return self._outage is None

    @property
    def reason(self) -> str:
        """What made it open; empty while it is closed."""
        return self._outage.reason if self._outage else ""

    def refusal(self, now: float) -> Outage | None:
        """Return why upstream may not be asked now; None lets the caller in."""
        if self._outage is None:
            return None
        if self._is_probed or now < self._outage.until:
            return self._outage
        self._is_probed = True
        return None

    def succeeded(self) -> None:
        """Note an answer that shows upstream alive, whenever it was asked for."""
        self._failures = self._openings = 0
        self._outage = None
        self._is_probed = False

    def failed(self, now: float, reason: str, weight: Weight = Weight.ANSWER) -> None:
        """Note a failure."""
        if self._outage is not None and not self._is_probed:
            # Asked for before it opened: what it says is known.
            return
        if not self._failures:
            self._since = now
        self._failures += weight
        if self._is_probed or self._failures >= THRESHOLD:
            ceiling = min(MAX_PAUSE, FIRST_PAUSE * 2**self._openings)
            # Jitter, because many caches that lost the same upstream must not come back at once.
            pause = ceiling * (0.5 + self._random() / 2)
            self._openings = min(self._openings + 1, 16)
            self._outage = Outage(self._since, now + pause, reason)
            self._is_probed = False

    def abandoned(self) -> None:
        """Note that the probe has learnt nothing: the next who asks is the probe."""
        self._is_probed = False
