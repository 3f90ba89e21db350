"""A registry's rate limits: the pulls it still allows, and how long a 429 pauses requests. PURE."""

import re
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

# Pulls are scarce at this number left, or at this share of the limit: they are then spent only on
# content that is not cached.
SCARCE_PULLS = 2
SCARCE_SHARE = 0.05

# Bounds of `Retry-After`, and what a missing or unreadable one counts as, in seconds.
MIN_RETRY_AFTER = 1.0
MAX_RETRY_AFTER = 900.0
DEFAULT_RETRY_AFTER = 60.0


@dataclass(frozen=True, slots=True)
class Cooldown:
    """The pause after a 429: no request of its kind for `seconds` from `since` (Unix time) on."""

    since: float
    seconds: float
    reason: str

    def seconds_left(self, now: float) -> float:
        """Return the seconds that are left; 0 also if the clock was set back."""
        age = now - self.since
        return self.seconds - age if 0 <= age < self.seconds else 0.0


class Quota:
    """The rate limits of one user at one registry. A *pull* is a GET of a manifest."""

    def __init__(self) -> None:
        self.limit: int | None = None
        self.remaining: int | None = None
        self._pull_cooldown: Cooldown | None = None
        self._request_cooldown: Cooldown | None = None

    @property
    def is_scarce(self) -> bool:
        """Whether to save the remaining pulls for content that is not cached."""
        if self.limit is None or self.remaining is None:
            return False
        return self.remaining <= max(SCARCE_PULLS, self.limit * SCARCE_SHARE)

    def update(self, limit: int | None, remaining: int | None) -> None:
        """Record the limit that the last response reported; None and None for no limit."""
        self.limit, self.remaining = limit, remaining

    def start_cooldown(self, cooldown: Cooldown, *, is_pull: bool) -> None:
        """Record a 429: one for a pull pauses pulls, any other pauses every request."""
        if is_pull:
            self._pull_cooldown = cooldown
        else:
            self._request_cooldown = cooldown

    def active_cooldown(self, now: float, *, is_pull: bool) -> Cooldown | None:
        """Return the cooldown that forbids a request now, or None. `now` is Unix time."""
        cooldowns = (self._request_cooldown, self._pull_cooldown if is_pull else None)
        return next((each for each in cooldowns if each and each.seconds_left(now)), None)


def parse_retry_after(value: str | None, now: float) -> float:
    """Return the seconds that `Retry-After` asks for, between 1 s and 15 minutes.

    Registries send seconds, an HTTP date (RFC 9110 section 10.2.3), or a Unix timestamp. `now` is
    Unix time. A missing or unreadable value counts as one minute.
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
    """Return the count in `RateLimit-Limit` or `RateLimit-Remaining` (`100;w=21600`), or None."""
    match = re.match(r"\s*([0-9]{1,12})\s*(?:;|$)", value or "")
    return int(match[1]) if match else None
