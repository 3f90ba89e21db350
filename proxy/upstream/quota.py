"""A registry's rate limits: the pulls it still allows, and which requests a 429 pauses. Pure.

A 429 pauses requests of the same kind for the same repository, because most registries limit single
operations. Only a limit on pulls that comes with Docker Hub's headers is a matter of the account.
"""

import re
from collections import OrderedDict
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import NamedTuple

# Pulls are scarce at this number left, or at this share of the limit: they are then spent only on
# content that is not cached.
SCARCE_PULLS = 2
SCARCE_SHARE = 0.05

# Bounds of `Retry-After` in seconds.
MIN_RETRY_AFTER = 1.0
MAX_RETRY_AFTER = 900.0
# Seconds of a pause after a 429 without `Retry-After`: at first, doubled with each further 429, at most.
INITIAL_PAUSE = 1.0
MAX_PAUSE = 60.0
# The same after Docker Hub's limit on pulls, whose window is six hours.
ACCOUNT_PAUSE = 60.0
# Pauses that are remembered.
MAX_COOLDOWNS = 1000


ALL_REPOSITORIES = "*"


class RequestClass(NamedTuple):
    """Requests that a 429 to one of them pauses."""

    method: str
    kind: str
    repository: str

    def of_account(self) -> "RequestClass":
        """Return the same requests for all repositories."""
        return self._replace(repository=ALL_REPOSITORIES)


@dataclass(frozen=True, slots=True)
class Cooldown:
    """The pause after a 429: no request of its class for `seconds` from `since` (Unix time) on.

    It is the `count`-th in a row.
    """

    since: float
    seconds: float
    reason: str
    count: int = 1

    def seconds_left(self, now: float) -> float:
        """Return the seconds that are left; 0 also if the clock was set back."""
        age = now - self.since
        return self.seconds - age if 0 <= age < self.seconds else 0.0


class Quota:
    """The rate limits of one user at one registry. A *pull* is a GET of a manifest."""

    def __init__(self) -> None:
        self.limit: int | None = None
        self.remaining: int | None = None
        # Unix time at which all pulls are allowed again, if no other is made.
        self._renewed_at: float | None = None
        self._cooldowns: OrderedDict[RequestClass, Cooldown] = OrderedDict()

    @property
    def renewed_at(self) -> float | None:
        """When all pulls are allowed again, if no other is made, in Unix time; None if unknown."""
        return self._renewed_at

    @property
    def is_scarce(self) -> bool:
        """Whether to save the remaining pulls for content that is not cached."""
        if self.limit is None or self.remaining is None:
            return False
        return self.remaining <= max(SCARCE_PULLS, self.limit * SCARCE_SHARE)

    def update(
        self, limit: int | None, remaining: int | None, *, renewed_at: float | None = None
    ) -> None:
        """Record the limit that the last response reported; None and None for no limit.

        `renewed_at` is the end of the window that began with that response.
        """
        self.limit, self.remaining, self._renewed_at = limit, remaining, renewed_at

    def renew(self, now: float) -> None:
        """Count all pulls as allowed once the window has passed without a response."""
        if self._renewed_at is not None and now >= self._renewed_at:
            self.remaining, self._renewed_at = self.limit, None

    def start_cooldown(
        self, requests: RequestClass, now: float, seconds: float | None, reason: str
    ) -> Cooldown:
        """Record a 429 and return the pause. `seconds` is `Retry-After`, None if there is none."""
        known = self._cooldowns.pop(requests, None)
        if known and known.seconds_left(now):
            # The request was sent before the pause began, so its 429 is no news.
            cooldown = known
            if seconds and seconds > known.seconds_left(now):
                cooldown = Cooldown(now, seconds, reason, known.count)
        else:
            count = known.count + 1 if known else 1
            is_account = requests.repository == ALL_REPOSITORIES
            initial = ACCOUNT_PAUSE if is_account else INITIAL_PAUSE
            pause = min(MAX_PAUSE, initial * 2 ** min(count - 1, 16))
            cooldown = Cooldown(now, seconds or pause, reason, count)
        self._cooldowns[requests] = cooldown
        if len(self._cooldowns) > MAX_COOLDOWNS:
            self._cooldowns.popitem(last=False)
        return cooldown

    def end_cooldown(self, requests: RequestClass, now: float) -> None:
        """Record a response other than 429: after a pause that is over, the next one is short again.

        A response during the pause is to a request that was sent before it.
        """
        for each in (requests, requests.of_account()):
            if (cooldown := self._cooldowns.get(each)) and not cooldown.seconds_left(now):
                del self._cooldowns[each]

    def active_cooldown(self, requests: RequestClass, now: float) -> Cooldown | None:
        """Return the cooldown that forbids a request now, or None. `now` is Unix time."""
        cooldowns = map(self._cooldowns.get, (requests.of_account(), requests))
        return next((each for each in cooldowns if each and each.seconds_left(now)), None)

    def cooldown_end(self, now: float) -> float | None:
        """Return when the last pause after a 429 is over; None if there is none. Unix time."""
        ends = [each.since + each.seconds for each in self._cooldowns.values()]
        return max((end for end in ends if end > now), default=None)

    def active_cooldowns(self, now: float) -> list[tuple[RequestClass, Cooldown]]:
        """Return the pauses of now, those that end last first."""
        found = [(key, one) for key, one in self._cooldowns.items() if one.seconds_left(now)]
        return sorted(found, key=lambda pair: -pair[1].seconds_left(now))


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds that `Retry-After` asks for, between 1 s and 15 minutes.

    Registries send seconds, an HTTP date (RFC 9110 section 10.2.3), or a Unix timestamp. `now` is
    Unix time. Returns None for a missing or unreadable value.
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
            return None
    return min(max(seconds, MIN_RETRY_AFTER), MAX_RETRY_AFTER)


def parse_ratelimit(value: str | None) -> int | None:
    """Return the count in `RateLimit-Limit` or `RateLimit-Remaining` (`100;w=21600`), or None."""
    match = re.match(r"\s*([0-9]{1,12})\s*(?:;|$)", value or "")
    return int(match[1]) if match else None


def parse_ratelimit_window(value: str | None) -> int | None:
    """Return the seconds of the window in `RateLimit-Limit` or `RateLimit-Remaining`, or None."""
    match = re.search(r";\s*w=([0-9]{1,9})\s*(?:;|$)", value or "")
    return int(match[1]) if match else None
