"""`/api/v1/pulls` and `/api/v1/downloads`: what clients pulled lately, and what is under way."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from proxy.server.activity.downloads import DownloadMonitor, DownloadStatus
from proxy.server.activity.pull_test import PullTester, PullTestEvent
from proxy.server.activity.recent_pulls import MAX_RECENT_PULLS, ClientRecord, Outcome, PullRecord
from proxy.server.admin.api import AdminRequest, RequestModel, Route
from proxy.server.pulls import PullTracker

# Seconds that a request may wait for changes, and between two looks.
MAX_WAIT = 60.0
LOOK_INTERVAL = 0.5

FAILURES = ("failed", "refused")


class PullsQuery(RequestModel, frozen=True):
    """Selects recent pulls by a part of the image's name, client and result; `problems` are `failed` and `refused`.

    `after` selects those that changed after this revision; without any, the answer waits up to `wait` seconds for
    one. `before` selects those with lower numbers.
    """

    image: str = ""
    client: str = ""
    result: Outcome | Literal["", "problems"] = ""
    after: Annotated[int, Meta(ge=0)] = 0
    before: Annotated[int, Meta(ge=0)] = 0
    wait: Annotated[float, Meta(ge=0, le=MAX_WAIT)] = 0.0
    limit: Annotated[int, Meta(ge=1, le=MAX_RECENT_PULLS)] = 100


class ListQuery(RequestModel, frozen=True):
    """How many entries are returned at most."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 1000


class PullTestRequest(RequestModel, frozen=True):
    """The image of a test pull, and its platform, by default that of the machine; `layers` are optional."""

    image: str
    platform: str = ""
    layers: bool = True


@dataclass(frozen=True, slots=True)
class ActivityHandlers:
    """The handlers of these routes."""

    pulls: PullTracker
    monitor: DownloadMonitor
    tester: PullTester

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("GET", "/api/v1/pulls", self.list_pulls),
            Route("GET", "/api/v1/pulls/clients", self.list_clients),
            Route("POST", "/api/v1/pulls/test", self.test_pull),
            Route("GET", "/api/v1/downloads", self.list_downloads),
        ]

    async def list_pulls(self, request: AdminRequest) -> list[PullRecord]:
        """Return recent pulls, the latest first."""
        return await self.find_pulls(request.parse_query(PullsQuery))

    async def find_pulls(self, query: PullsQuery) -> list[PullRecord]:
        """Return the pulls that a query selects."""
        found = self._select(query)
        for _ in range(int(query.wait / LOOK_INTERVAL)):
            if found:
                break
            await asyncio.sleep(LOOK_INTERVAL)
            found = self._select(query)
        return found

    async def list_clients(self, request: AdminRequest) -> list[ClientRecord]:
        """Return the clients since the start of the daemon, the one that pulled last first."""
        self.pulls.settle()
        return self.pulls.recent.clients(request.parse_query(ListQuery).limit)

    async def list_downloads(self, request: AdminRequest) -> list[DownloadStatus]:
        """Return the downloads under way."""
        return self.monitor.list_downloads(request.parse_query(ListQuery).limit)

    async def test_pull(self, request: AdminRequest) -> AsyncGenerator[PullTestEvent, None]:
        """Pull an image as a client does, and yield its steps and the result."""
        body = await request.read_json(PullTestRequest)
        events = self.tester.pull(body.image, body.platform, with_layers=body.layers)
        async with aclosing(events):
            async for event in events:
                yield event

    def _select(self, query: PullsQuery) -> list[PullRecord]:
        self.pulls.settle()
        results = FAILURES if query.result == "problems" else filter(None, (query.result,))
        return self.pulls.recent.select(
            text=query.image,
            client=query.client,
            results=tuple(results),
            after=query.after,
            before=query.before,
            limit=query.limit,
        )
