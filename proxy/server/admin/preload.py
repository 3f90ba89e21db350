"""`/api/v1/preload`: fetch images before clients pull them."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated

import msgspec

from proxy.images.selection import ImageSelection
from proxy.preload.events import PreloadEvent
from proxy.preload.preload import Preloader
from proxy.preload.report import PreloadRecord
from proxy.server.admin.api import AdminRequest, RequestModel, Route
from proxy.server.admin.recording import ActRecorder


class PreloadRequest(RequestModel, frozen=True):
    """What to preload; `jobs` is the number of layers at a time.

    Unless it `waits`, an upstream that is down or limits requests fails its images at once.
    """

    images: list[ImageSelection]
    pin: bool = False
    dry_run: bool = False
    jobs: Annotated[int, msgspec.Meta(ge=1)] | None = None
    waits: bool = True


@dataclass(frozen=True, slots=True)
class PreloadHandlers:
    """The handler of this route."""

    preloader: Preloader
    acts: ActRecorder

    def routes(self) -> list[Route]:
        """Return the route."""
        return [Route("POST", "/api/v1/preload", self.preload)]

    async def preload(self, request: AdminRequest) -> AsyncGenerator[PreloadEvent, None]:
        """Preload images, and yield the events of the run."""
        body = await request.read_json(PreloadRequest)
        events = self.preloader.preload(
            body.images, pin=body.pin, dry_run=body.dry_run, jobs=body.jobs, waits=body.waits
        )
        if body.dry_run:
            async with aclosing(events):
                async for event in events:
                    yield event
            return
        images = [selection.image for selection in body.images]
        recorded = self.acts.recording("preload", request.actor, images)
        async with recorded as act, aclosing(events):
            record = PreloadRecord(act, self.acts.names)
            async for event in events:
                record.add(event)
                if record.failure:  # with the totals, the last event
                    await self.acts.trail.add(record.failure)
                yield event
