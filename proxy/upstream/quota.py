"""What an upstream says of its limits, and what may be asked meanwhile. PURE: `now` is Unix time.

Docker Hub counts GETs of manifests as pulls, and nothing else; a 429 to anything else is its limit on
abuse, which counts everything. Who goes on asking stays locked out for longer.
"""

from dataclasses import dataclass

# So few pulls are left, or such a share of all, that they are kept for what is not cached.
SCARCE = 2
SCARCE_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Hold:
    """A 429 of the past: nothing of its sort is asked for `seconds` from `since` on."""

    since: float
    seconds: float
    reason: str

    def left(self, now: float) -> float:
        """Return the seconds that are left; 0 also if the clock was turned back meanwhile."""
        age = now - self.since
        return self.seconds - age if 0 <= age < self.seconds else 0.0


class Quota:
    """The limits of one upstream and one user. A *pull* is a GET of a manifest."""

    def __init__(self) -> None:
        self.limit: int | None = None
        self.remaining: int | None = None
        self._pulls: Hold | None = None
        self._all: Hold | None = None

    @property
    def is_scarce(self) -> bool:
        """Whether the pulls that are left should be kept for what is not cached."""
        if self.limit is None or self.remaining is None:
            return False
        return self.remaining <= max(SCARCE, self.limit * SCARCE_SHARE)

    def counted(self, limit: int | None, remaining: int | None) -> None:
        """Note what an answer to a manifest request said; None and None is no limit."""
        self.limit, self.remaining = limit, remaining

    def limited(self, hold: Hold, *, is_pull: bool) -> None:
        """Note a 429."""
        if is_pull:
            self._pulls = hold
        else:
            self._all = hold

    def hold(self, now: float, *, is_pull: bool) -> Hold | None:
        """Return what forbids to ask now, None if nothing does."""
        holds = (self._all, self._pulls if is_pull else None)
        return next((hold for hold in holds if hold and hold.left(now)), None)
