"""`/api/v1/images`: list, inspect, check, remove and pin the images in the store."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from proxy.errors import StorageError
from proxy.images.check import ImageCheck, OfflineChecker
from proxy.images.inspect import ImageDetail, ImageInspector
from proxy.images.manage import ImageBrief, ImageManager, ImageSummary, PinnedImages, RemovedImages
from proxy.images.selection import ImageSelection
from proxy.server.admin.api import AdminRequest, RequestModel, Route
from proxy.server.admin.recording import ActRecorder
from proxy.storage.image_table import ImageFilter, ImageOrder, TableState

# Images in one answer of `/api/v1/images/rows`.
MAX_ROWS = 1000


class ListImagesQuery(RequestModel, frozen=True):
    """Selects images by a part of their names, or by a glob: at most `limit` that follow `after`.

    Other orders than that of the names take no globs, and neither do the other fields: in a large
    store, they are answered from a table of all images that may be minutes old.
    """

    filter: str = ""
    after: str = ""
    limit: Annotated[int, msgspec.Meta(ge=0)] = 0
    order: ImageOrder = "name"
    upstream: str = ""
    badge: str = ""
    platform: str = ""
    state: TableState | Literal[""] = ""
    pinned: bool | None = None
    pulled: bool | None = None

    @property
    def selection(self) -> ImageFilter:
        """The filter of the table of images."""
        return ImageFilter(
            text=self.filter,
            upstream=self.upstream,
            badge=self.badge,
            platform=self.platform,
            state=self.state,
            pinned=self.pinned,
            pulled=self.pulled,
        )


class InspectQuery(RequestModel, frozen=True):
    """The image to inspect."""

    image: str


class ImagesRequest(RequestModel, frozen=True):
    """The images to pin or unpin."""

    images: list[str]


class RemoveRequest(ImagesRequest, frozen=True):
    """The images to remove; `force` includes pinned ones."""

    dry_run: bool = False
    force: bool = False


class CheckRequest(RequestModel, frozen=True):
    """The images and platforms to check."""

    images: list[ImageSelection]


class UnpinResponse(msgspec.Struct, frozen=True):
    """The images whose pin was removed."""

    images: list[str]


@dataclass(frozen=True, slots=True)
class ImageHandlers:
    """The handlers of these routes."""

    images: ImageManager
    checker: OfflineChecker
    inspector: ImageInspector
    acts: ActRecorder
    write_totals: Callable[[], Awaitable[None]]

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("GET", "/api/v1/images", self.list_images),
            Route("GET", "/api/v1/images/rows", self.list_rows),
            Route("GET", "/api/v1/images/platforms", self.platforms),
            Route("GET", "/api/v1/images/inspect", self.inspect),
            Route("POST", "/api/v1/images/check", self.check, is_read=True),
            Route("POST", "/api/v1/images/remove", self.remove),
            Route("POST", "/api/v1/images/pin", self.pin),
            Route("POST", "/api/v1/images/unpin", self.unpin),
        ]

    async def list_images(self, request: AdminRequest) -> AsyncGenerator[ImageSummary, None]:
        """List images."""
        query = request.parse_query(ListImagesQuery)
        await self._write_pulls()
        if query.order == "name" and query.selection == ImageFilter(text=query.filter):
            found = self.images.list_images(query.filter, after=query.after, limit=query.limit)
        else:
            found = self.images.list_selected(
                query.selection, query.order, after=query.after, limit=query.limit
            )
        async with aclosing(found):
            async for image in found:
                yield image

    async def list_rows(self, request: AdminRequest) -> list[ImageBrief]:
        """Return what a list shows of images, from the table of all images; at most 1000."""
        query = request.parse_query(ListImagesQuery)
        await self._write_pulls()
        limit = min(query.limit or MAX_ROWS, MAX_ROWS)
        return await self.images.list_rows(
            query.selection, query.order, after=query.after, limit=limit
        )

    async def platforms(self, _request: AdminRequest) -> Sequence[str]:
        """Return the platforms that stored images are for, the most common first."""
        return await self.images.platforms()

    async def inspect(self, request: AdminRequest) -> ImageDetail:
        """Return the details of an image."""
        image = request.parse_query(InspectQuery).image
        await self._write_pulls()
        return await self.inspector.inspect(image)

    async def _write_pulls(self) -> None:
        with suppress(StorageError):  # then the last seconds are missing
            await self.write_totals()

    async def check(self, request: AdminRequest) -> AsyncGenerator[ImageCheck, None]:
        """Yield for each image and platform whether it could be pulled without upstream."""
        body = await request.read_json(CheckRequest)
        async for check in self.checker.check(body.images):
            yield check

    async def remove(self, request: AdminRequest) -> RemovedImages:
        """Remove images, or return what that would free."""
        body = await request.read_json(RemoveRequest)
        if body.dry_run:
            return await self.images.remove(body.images, dry_run=True, force=body.force)
        async with self.acts.recording("remove", request.actor, body.images) as act:
            removed = await self.images.remove(body.images, force=body.force)
            act.images = self.acts.full_names(removed.images)
            act.detail = f"freed {removed.bytes} bytes in {removed.blobs} blobs"
        return removed

    async def pin(self, request: AdminRequest) -> PinnedImages:
        """Pin images, so that they are not evicted."""
        body = await request.read_json(ImagesRequest)
        async with self.acts.recording("pin", request.actor, body.images):
            return await self.images.pin(body.images)

    async def unpin(self, request: AdminRequest) -> UnpinResponse:
        """Unpin images."""
        body = await request.read_json(ImagesRequest)
        async with self.acts.recording("unpin", request.actor, body.images):
            return UnpinResponse(await self.images.unpin(body.images))
