"""Requests to `/api/v1/preload`; each event is validated against its schema."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from tests.support.openapi import validate
from tests.support.program import Program


class PreloadStream:
    """The events of a running preload, as its client reads them."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.events: list[dict[str, Any]] = []

    async def next_event(self) -> dict[str, Any]:
        """Read the next event."""
        async with asyncio.timeout(20):
            line = await self._response.content.readline()
        assert line, f"the preload ended after {self.events}"
        event: dict[str, Any] = msgspec.json.decode(line)
        validate(event, "PreloadEvent")
        self.events.append(event)
        return event

    async def wait_for(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Read events up to the first one of this kind with these fields, and return it."""
        while True:
            event = await self.next_event()
            if event["event"] == kind and fields.items() <= event.items():
                return event

    def events_of(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of a kind that were read so far."""
        return [event for event in self.events if event["event"] == kind]


@asynccontextmanager
async def start_preload(
    program: Program, *images: Any, **options: Any
) -> AsyncIterator[PreloadStream]:
    """Start a preload of images, which are names or selections; disconnect at the block's end."""
    selections = [{"image": image} if isinstance(image, str) else image for image in images]
    document = {"images": selections, **options}
    connector = aiohttp.UnixConnector(str(program.root / "admin.sock"))
    async with (
        aiohttp.ClientSession(connector=connector, read_bufsize=1 << 22) as session,
        session.post("http://localhost/api/v1/preload", json=document) as response,
    ):
        assert response.status == 200
        yield PreloadStream(response)


async def run_preload(program: Program, *images: Any, **options: Any) -> PreloadStream:
    """Preload images to the end."""
    async with start_preload(program, *images, **options) as run:
        await run.wait_for("totals")
        return run
