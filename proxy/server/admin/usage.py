"""`/api/v1/usage`: what takes the space of the store, and what is evicted next."""

import asyncio
from collections.abc import Callable
from typing import Annotated

from msgspec import Meta

from proxy.concurrency import SingleFlight
from proxy.errors import BusyError
from proxy.images.usage import StoreUsage, UsageReporter
from proxy.server.admin.api import AdminRequest, RequestModel, Route

# Repositories in a report that may be an older one.
MAX_CACHED_ROWS = 100
# Seconds that a request for such a report waits for the first one.
FIRST_REPORT_TIMEOUT = 0.1


class UsageQuery(RequestModel, frozen=True):
    """How many repositories are returned (0: all), and how many seconds old the report may be.

    With a `max_age` they are at most `MAX_CACHED_ROWS`. An older report is returned too, while the next one is
    made.
    """

    limit: Annotated[int, Meta(ge=0)] = 0
    max_age: Annotated[float, Meta(ge=0)] = 0.0


class UsageHandlers:
    """The handler of this route. `clock` returns Unix time."""

    def __init__(
        self, reporter: UsageReporter, group: asyncio.TaskGroup, clock: Callable[[], float]
    ) -> None:
        self._reporter = reporter
        self._clock = clock
        self._last: StoreUsage | None = None
        self._reports: SingleFlight[None, StoreUsage] = SingleFlight(group)

    def routes(self) -> list[Route]:
        """Return the route."""
        return [Route("GET", "/api/v1/usage", self.report)]

    async def report(self, request: AdminRequest) -> StoreUsage:
        """Return the usage of the store.

        Raises `BusyError` if an older report would do and the first one takes long.
        """
        query = request.parse_query(UsageQuery)
        if not query.max_age:
            return await self._reporter.report(query.limit)
        last = self._last
        if last and 0 <= self._clock() - last.at < query.max_age:
            return last
        if last:
            self._reports.start(None, self._renew)
            return last
        try:
            async with asyncio.timeout(FIRST_REPORT_TIMEOUT):
                return await self._reports.run(None, self._renew)
        except TimeoutError:
            raise BusyError(
                "the content of the store is being counted; look again in a moment"
            ) from None

    async def _renew(self) -> StoreUsage:
        self._last = await self._reporter.report(MAX_CACHED_ROWS)
        return self._last
