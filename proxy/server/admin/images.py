"""`/api/v1/images`: what is in the store, as images."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

import msgspec

from proxy.images.check import ImageCheck, OfflineChecker
from proxy.images.inspect import ImageDetail, ImageInspector
from proxy.images.manage import ImageManager, ImageSummary, RemovedImages
from proxy.images.selection import ImageSelection
from proxy.server.admin.api import AdminRequest, RequestModel, Route


class ListImagesQuery(RequestModel, frozen=True):
    """Which images: a part of their names, or a glob."""

    filter: str = ""


class InspectQuery(RequestModel, frozen=True):
    """One image."""

    image: str


class ImagesRequest(RequestModel, frozen=True):
    """Some images."""

    images: list[str]


class RemoveRequest(ImagesRequest, frozen=True):
    """What is to go. `force` takes pinned images too."""

    dry_run: bool = False
    force: bool = False


class CheckRequest(RequestModel, frozen=True):
    """What is to be checked."""

    images: list[ImageSelection]


class PinResponse(msgspec.Struct, frozen=True):
    """The images whose pin was set, or taken away."""

    images: list[str]


@dataclass(frozen=True, slots=True)
class ImageHandlers:
    """What these routes work with."""

    images: ImageManager
    checker: OfflineChecker
    inspector: ImageInspector

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("GET", "/api/v1/images", self.list_images),
            Route("GET", "/api/v1/images/inspect", self.inspect),
            Route("POST", "/api/v1/images/check", self.check),
            Route("POST", "/api/v1/images/remove", self.remove),
            Route("POST", "/api/v1/images/pin", self.pin),
            Route("POST", "/api/v1/images/unpin", self.unpin),
        ]

    def list_images(self, request: AdminRequest) -> AsyncGenerator[ImageSummary, None]:
        """List images."""
        return self.images.list_images(request.parse_query(ListImagesQuery).filter)

    async def inspect(self, request: AdminRequest) -> ImageDetail:
        """Look closely at one."""
        return await self.inspector.inspect(request.parse_query(InspectQuery).image)

    async def check(self, request: AdminRequest) -> AsyncGenerator[ImageCheck, None]:
        """Say what could be pulled with the network unplugged."""
        wanted = await request.read_json(CheckRequest)
        async for check in self.checker.check(wanted.images):
            yield check

    async def remove(self, request: AdminRequest) -> RemovedImages:
        """Remove images, or say what that would free."""
        wanted = await request.read_json(RemoveRequest)
        return await self.images.remove(wanted.images, dry_run=wanted.dry_run, force=wanted.force)

    async def pin(self, request: AdminRequest) -> PinResponse:
        """Keep images from being evicted."""
        return PinResponse(await self.images.pin((await request.read_json(ImagesRequest)).images))

    async def unpin(self, request: AdminRequest) -> PinResponse:
        """Let images be evicted again."""
        return PinResponse(await self.images.unpin((await request.read_json(ImagesRequest)).images))
