"""When to ask again, and after how long. PURE: randomness and time are arguments."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

# A status that says "not now" rather than "no" (RFC 9110 sections 15.5.9 and 15.6, RFC 8470).
TRANSIENT_STATUSES = frozenset({408, 425, 500, 502, 503, 504})

INITIAL_DELAY = 0.25
MAX_DELAY = 10.0
MIN_RETRY_AFTER = 1.0
MAX_RETRY_AFTER = 900.0
DEFAULT_RETRY_AFTER = 60.0


# So few pulls are left, or such a share of all, that they are kept for what is not cached.
SCARCE_PULLS = 2
SCARCE_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Cooldown:
    """A 429 of the past: nothing of its sort is asked for `seconds` from `since` on."""

    since: float
    seconds: float
    reason: str

    def seconds_left(self, now: float) -> float:
        """Return the seconds that are left; 0 also if the clock was turned back meanwhile."""
        age = now - self.since
        return self.seconds - age if 0 <= age < self.seconds else 0.0


class Quota:
    """The limits of one upstream and one user. A *pull* is a GET of a manifest."""

    def __init__(self) -> None:
        self.limit: int | None = None
        self.remaining: int | None = None
        self._pull_cooldown: Cooldown | None = None
        self._request_cooldown: Cooldown | None = None

    @property
    def is_scarce(self) -> bool:
        """Whether the pulls that are left should be kept for what is not cached."""
        if self.limit is None or self.remaining is None:
            return False
        return self.remaining <= max(SCARCE_PULLS, self.limit * SCARCE_SHARE)

    def update(self, limit: int | None, remaining: int | None) -> None:
        """Note what an answer to a manifest request said; None and None is no limit."""
        self.limit, self.remaining = limit, remaining

    def start_cooldown(self, cooldown: Cooldown, *, is_pull: bool) -> None:
        """Note a 429."""
        if is_pull:
            self._pull_cooldown = cooldown
        else:
            self._request_cooldown = cooldown

    def active_cooldown(self, now: float, *, is_pull: bool) -> Cooldown | None:
        """Return what forbids to ask now, None if nothing does."""
        holds = (self._request_cooldown, self._pull_cooldown if is_pull else None)
        return next((hold for hold in holds if hold and hold.seconds_left(now)), None)


def backoff_delays(attempts: int, rng: Iterator[float]) -> Iterator[float]:
    """Yield the `attempts - 1` waits in seconds between attempts: exponential, jittered.

    `rng` yields numbers in [0, 1). Jitter, because many caches that lost the same upstream must
    not come back at the same moment.
    """
    for attempt, random in zip(range(attempts - 1), rng, strict=False):
        ceiling = min(MAX_DELAY, INITIAL_DELAY * 2**attempt)
        yield ceiling * (0.5 + random / 2)


def parse_retry_after(value: str | None, now: float) -> float:
    """Return the seconds that `Retry-After` asks for, between 1 s and 15 minutes.

    Seen in the wild: seconds, an HTTP date (RFC 9110 section 10.2.3), and a Unix timestamp.
    `now` is Unix time. What cannot be read counts as a minute.
    """
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]{1,12}", text):
        seconds = float(text)
        if seconds > 1e9:
            seconds -= now
    else:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - now
        except (ValueError, OverflowError):
            return DEFAULT_RETRY_AFTER
    return min(max(seconds, MIN_RETRY_AFTER), MAX_RETRY_AFTER)


def parse_ratelimit(value: str | None) -> int | None:
    """Return the count in `ratelimit-limit` or `-remaining` (`100;w=21600`), or None."""
    match = re.match(r"\s*([0-9]{1,12})\s*(?:;|$)", value or "")
    return int(match[1]) if match else None


class MinRateMonitor:
    """Judges a transfer by its progress: `rate` bytes a second over `window` seconds of waiting.

    A rate of 0 is never missed. Silence is not for it to judge: it is told when bytes have come.
    """

    def __init__(self, rate: int, window: float) -> None:
        self._rate = rate
        self._window = window
        self._size = 0
        self._waited = 0.0

    def is_too_slow(self, size: int, waited: float) -> bool:
        """Count `size` bytes that were waited for so long; tell whether they come too slowly."""
        self._size += size
        self._waited += waited
        if self._waited < self._window:
            return False
        is_missed = self._size < self._rate * self._waited
        self._size, self._waited = 0, 0.0
        return is_missed

    def __str__(self) -> str:
        return f"less than {self._rate} bytes a second"
