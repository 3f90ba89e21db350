"""`/api/v1/traffic`: what clients have pulled, and what it saved, by day and name."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Self

import msgspec
from msgspec import Meta

from proxy.server.admin.api import AdminRequest, RequestModel, Route
from proxy.storage.records.traffic import KEPT_DAYS, TopOrder, TrafficRecords
from proxy.traffic import Scope, TrafficCounts

# The periods that are summed up, in days; today is a day.
PERIODS = (1, 7, 30)
MAX_TOP = 1000


class TrafficDaysQuery(RequestModel, frozen=True):
    """Selects the last `days` days, today included."""

    days: Annotated[int, Meta(ge=1, le=KEPT_DAYS["upstream"])] = 30


class TopQuery(RequestModel, frozen=True):
    """Selects the names of one kind with the most pulls, or bytes, in the last `days` days."""

    of: Scope = "image"
    by: TopOrder = "pulls"
    days: Annotated[int, Meta(ge=1, le=KEPT_DAYS["upstream"])] = 7
    limit: Annotated[int, Meta(ge=1, le=MAX_TOP)] = 20


class TrafficSummary(msgspec.Struct, frozen=True, omit_defaults=True):
    """Pulls, requests and bytes; `TrafficCounts` explains them. A `name`, a `day` or a number of `days`."""

    pulls: int = msgspec.field()
    hits: int = msgspec.field()
    partials: int = msgspec.field()
    misses: int = msgspec.field()
    requests: int = msgspec.field()
    sent_bytes: int = msgspec.field()
    received_bytes: int = msgspec.field()
    preloaded_bytes: int = msgspec.field()
    saved_bytes: int = msgspec.field()
    hit_ratio: float | None = msgspec.field()
    avoided: int = msgspec.field()
    name: str = ""
    day: str = ""
    days: int = 0

    @classmethod
    def of(cls, counts: TrafficCounts, *, name: str = "", day: str = "", days: int = 0) -> Self:
        """Return a summary of counts."""
        return cls(
            pulls=counts.pulls,
            hits=counts.hits,
            partials=counts.partials,
            misses=counts.misses,
            requests=counts.requests,
            sent_bytes=counts.sent,
            received_bytes=counts.received,
            preloaded_bytes=counts.preloaded,
            saved_bytes=counts.saved,
            hit_ratio=counts.hit_ratio,
            avoided=counts.avoided,
            name=name,
            day=day,
            days=days,
        )


@dataclass(frozen=True, slots=True)
class TrafficHandlers:
    """The handlers of these routes. `write_totals` writes what is still in memory."""

    records: TrafficRecords
    write_totals: Callable[[], Awaitable[None]]

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("GET", "/api/v1/traffic", self.days),
            Route("GET", "/api/v1/traffic/top", self.top),
        ]

    async def days(self, request: AdminRequest) -> list[TrafficSummary]:
        """Return the traffic of each upstream on each day, the latest first."""
        query = request.parse_query(TrafficDaysQuery)
        await self.write_totals()
        return [
            TrafficSummary.of(one.counts, name=one.name, day=one.day)
            for one in self.records.by_day(query.days)
        ]

    async def top(self, request: AdminRequest) -> list[TrafficSummary]:
        """Return the names with the most pulls, or bytes to clients."""
        query = request.parse_query(TopQuery)
        await self.write_totals()
        return [
            TrafficSummary.of(one.counts, name=one.name)
            for one in await self.records.top(query.of, query.days, query.by, query.limit)
        ]


def summarize_periods(records: TrafficRecords) -> list[TrafficSummary]:
    """Return the traffic of today and of the last 7 and 30 days. Raises `StorageError`."""
    return [TrafficSummary.of(records.sum_days(days), days=days) for days in PERIODS]
