"""Requests to `/api/v1/preload`; each event is validated against its schema."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from tests.support.openapi import validate
from tests.support.program import Program


class Preload:
    """A preload that runs, as its client sees it."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.events: list[dict[str, Any]] = []

    async def next(self) -> dict[str, Any]:
        """Read the next event."""
        async with asyncio.timeout(20):
            line = await self._response.content.readline()
        assert line, f"no more than {self.events}"
        event: dict[str, Any] = msgspec.json.decode(line)
        validate(event, "PreloadEvent")
        self.events.append(event)
        return event

    async def until(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Read on until there is such an event, and return it."""
        while True:
            event = await self.next()
            if event["event"] == kind and fields.items() <= event.items():
                return event

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of a kind so far."""
        return [event for event in self.events if event["event"] == kind]


@asynccontextmanager
async def preloading(program: Program, *images: Any, **order: Any) -> AsyncIterator[Preload]:
    """Begin a preload; leaving the block hangs up."""
    wanted = [{"image": one} if isinstance(one, str) else one for one in images]
    connector = aiohttp.UnixConnector(str(program.root / "admin.sock"))
    async with (
        aiohttp.ClientSession(connector=connector, read_bufsize=1 << 22) as session,
        session.post("http://localhost/api/v1/preload", json={"images": wanted, **order}) as answer,
    ):
        assert answer.status == 200
        yield Preload(answer)


async def preload(program: Program, *images: Any, **order: Any) -> Preload:
    """Preload to the end."""
    async with preloading(program, *images, **order) as run:
        await run.until("totals")
        return run
