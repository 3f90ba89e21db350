"""`/api/v1/preload`: images fetched before anybody asks for them."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated

import msgspec

from proxy.images.selection import ImageSelection
from proxy.preload.events import PreloadEvent
from proxy.preload.preload import Preloader
from proxy.server.admin.api import AdminRequest, RequestModel, Route


class PreloadRequest(RequestModel, frozen=True):
    """What to preload, `jobs` layers at once."""

    images: list[ImageSelection]
    pin: bool = False
    dry_run: bool = False
    jobs: Annotated[int, msgspec.Meta(ge=1)] | None = None


@dataclass(frozen=True, slots=True)
class PreloadHandlers:
    """What this route works with."""

    preloader: Preloader

    def routes(self) -> list[Route]:
        """Return the route."""
        return [Route("POST", "/api/v1/preload", self.preload)]

    async def preload(self, request: AdminRequest) -> AsyncGenerator[PreloadEvent, None]:
        """Fetch images, and tell what happens."""
        order = await request.read_json(PreloadRequest)
        happening = self.preloader.preload(
            order.images, pin=order.pin, dry_run=order.dry_run, jobs=order.jobs
        )
        async with aclosing(happening) as events:
            async for event in events:
                yield event
