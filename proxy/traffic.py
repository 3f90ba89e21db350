"""Traffic totals in memory: what clients pulled, and what upstream sent for it, by day and name.

`storage/records/traffic.py` writes them to the index every few seconds.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import msgspec

# What bytes from upstream were fetched for. Prefetches follow a client's pull, so they are its cost.
Purpose = Literal["client", "prefetch", "preload", "repair"]
# What traffic is counted by. The names of images and repositories begin with their upstream.
Scope = Literal["upstream", "repository", "image", "client"]
PullResult = Literal["hit", "partial", "miss"]

# Totals that wait to be written. What has further names is counted without a name.
MAX_PENDING_TOTALS = 10_000

TEST_PULL_AGENT = "pullcache-doctor"
"""The `User-Agent` of the pulls by `pullcache doctor`, which no total counts."""

OTHERS = ""
"""The name that collects the traffic of all names that are not kept individually."""

purpose: ContextVar[Purpose] = ContextVar("purpose", default="client")
"""What this context fetches from upstream for; tasks inherit it."""


@contextmanager
def fetching_for(value: Purpose) -> Iterator[None]:
    """Set the purpose of what is fetched, or started to be fetched, within the block."""
    token = purpose.set(value)
    try:
        yield
    finally:
        purpose.reset(token)


class TrafficCounts(msgspec.Struct):
    """Pulls by result, requests for manifests and blobs, and bytes.

    A pull is the GET of an image's manifest, with what the same client asks for of it within ten
    minutes: a hit if nothing of its content came from upstream, a miss if all of it did. `sent` are
    bytes to clients, `received` those from upstream for clients, `preloaded` those for preloads and
    repairs. `avoided` are requests answered from the store while upstream allowed no more pulls.
    """

    hits: int = 0
    partials: int = 0
    misses: int = 0
    requests: int = 0
    sent: int = 0
    received: int = 0
    preloaded: int = 0
    avoided: int = 0

    @property
    def pulls(self) -> int:
        """All pulls."""
        return self.hits + self.partials + self.misses

    @property
    def saved(self) -> int:
        """The bytes that upstream did not have to send; negative if preloads fetched more."""
        return self.sent - self.received - self.preloaded

    @property
    def hit_ratio(self) -> float | None:
        """The share of the clients' bytes that was not fetched for them; None without any."""
        return max(0.0, 1 - self.received / self.sent) if self.sent else None

    def count_pulls(self, result: PullResult, count: int) -> None:
        """Add pulls with this result; a negative count takes them back."""
        if result == "hit":
            self.hits += count
        elif result == "partial":
            self.partials += count
        else:
            self.misses += count

    def add(self, other: "TrafficCounts") -> None:
        """Add other counts."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class TotalKey(NamedTuple):
    """What a total is about: the local day (`2026-01-31`), the scope and the name."""

    day: str
    scope: Scope
    name: str


class TrafficTally:
    """The totals that are not yet written. `clock` returns Unix time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._totals: dict[TotalKey, TrafficCounts] = {}
        self._pulled: dict[str, float] = {}
        self._minute, self._day = -1, ""

    def today(self) -> str:
        """Return the day in local time."""
        now = self._clock()
        minute = int(now // 60)
        if minute != self._minute:
            self._minute, self._day = minute, time.strftime("%Y-%m-%d", time.localtime(now))
        return self._day

    def counts(self, day: str, scope: Scope, name: str) -> TrafficCounts:
        """Return the counts of a name, to be added to before the next await."""
        key = TotalKey(day, scope, name)
        counts = self._totals.get(key)
        if counts is None:
            if len(self._totals) >= MAX_PENDING_TOTALS and scope != "upstream":
                key = TotalKey(day, scope, OTHERS)
            counts = self._totals.setdefault(key, TrafficCounts())
        return counts

    def count_received(self, upstream: str, repository: str, why: Purpose, size: int) -> None:
        """Count bytes of manifests and blobs from upstream."""
        day = self.today()
        for counts in (
            self.counts(day, "upstream", upstream),
            self.counts(day, "repository", f"{upstream}/{repository}"),
        ):
            if why in ("client", "prefetch"):
                counts.received += size
            else:
                counts.preloaded += size

    def note_pull(self, image: str) -> None:
        """Note that a client pulls an image now."""
        if len(self._pulled) < MAX_PENDING_TOTALS or image in self._pulled:
            self._pulled[image] = self._clock()

    def take_pulled(self) -> dict[str, float]:
        """Return when images were pulled since the last call, in Unix time by full name."""
        pulled, self._pulled = self._pulled, {}
        return pulled

    def take(self) -> dict[TotalKey, TrafficCounts]:
        """Return all totals, and reset them."""
        totals, self._totals = self._totals, {}
        return totals

    def put_back(self, totals: dict[TotalKey, TrafficCounts], pulled: dict[str, float]) -> None:
        """Add totals and pulls that could not be written."""
        self._pulled = pulled | self._pulled
        for key, counts in totals.items():
            self.counts(*key).add(counts)
