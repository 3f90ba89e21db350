"""`/api/v1/preload`: fetch images before clients pull them, and read lists of images."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated

import msgspec

from proxy.images.selection import ImageSelection
from proxy.preload.events import PreloadEvent
from proxy.preload.lists import parse_list
from proxy.preload.lists.result import ProblemKind
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


class ListRequest(RequestModel, frozen=True):
    """An image list in any format that `preload -f` takes."""

    text: str


class ListedImage(msgspec.Struct, frozen=True):
    """An image of a list, by line; without `platforms` the list names none for it."""

    line: int
    image: str
    platforms: Sequence[str]


class ListedProblem(msgspec.Struct, frozen=True):
    """An entry of a list that is no image; a `note` is about one that has nothing to pull."""

    line: int
    kind: ProblemKind
    message: str


class ParsedList(msgspec.Struct, frozen=True):
    """What a list contains; `format` is empty for an empty one."""

    format: str
    images: list[ListedImage]
    problems: list[ListedProblem]


@dataclass(frozen=True, slots=True)
class PreloadHandlers:
    """The handlers of these routes."""

    preloader: Preloader
    acts: ActRecorder

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("POST", "/api/v1/preload", self.preload),
            Route("POST", "/api/v1/preload/list", self.read_list, is_read=True),
        ]

    async def read_list(self, request: AdminRequest) -> ParsedList:
        """Return the images of a list, and what is wrong with it."""
        text = (await request.read_json(ListRequest)).text
        # Large ones take seconds.
        parsed = await asyncio.to_thread(parse_list, text)
        return ParsedList(
            parsed.format,
            [ListedImage(one.line, one.reference, one.platforms) for one in parsed.entries],
            [ListedProblem(one.line, one.kind, one.message) for one in parsed.problems],
        )

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
