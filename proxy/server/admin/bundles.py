"""`/api/v1/export` and `/api/v1/import`: write images to bundles, and read them back."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import Literal, TypeVar

import msgspec

from proxy.bundle import local_file
from proxy.bundle.compress import compress
from proxy.bundle.export import Bundle, BundleExporter, ExportedImage
from proxy.bundle.import_ import BundleImporter, ImportReport
from proxy.bundle.local_file import LocalFile
from proxy.concurrency import background
from proxy.errors import FileUnreachableError
from proxy.oci.digest import Digest
from proxy.server.admin.actor import Actor
from proxy.server.admin.api import AdminRequest, ByteStream, RequestModel, Route
from proxy.server.admin.recording import ActRecorder

# Seconds between two progress events of an import or of an export to a file.
PROGRESS_INTERVAL = 0.5

T = TypeVar("T")
M = TypeVar("M", bound=RequestModel)


class ExportRequest(RequestModel, frozen=True):
    """What to export; `exclude` are digests to leave out because an earlier bundle has them.

    `facts` adds what is known about the images to the bundle.
    """

    images: list[str]
    platforms: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    facts: bool = False


class StreamedExportRequest(ExportRequest, frozen=True):
    """What to export, and how the bundle is compressed as a whole."""

    compression: Literal["", "zstd"] = ""


class ImportQuery(RequestModel, frozen=True):
    """The name for an image that has none in the bundle."""

    name: str = ""


class ExportToFileRequest(ExportRequest, frozen=True, kw_only=True):
    """What to export, and the empty file to write it to."""

    file: LocalFile


class ImportFilesRequest(RequestModel, frozen=True):
    """The files of a bundle in order, and the name for an image that has none in it."""

    files: list[LocalFile]
    name: str = ""


class ExportPlan(msgspec.Struct, frozen=True):
    """The content that an export would have; `size` is the exact size of the bundle in bytes."""

    size: int
    blobs: int
    images: list[ExportedImage]


class BundleProgress(msgspec.Struct, frozen=True):
    """Bytes of a bundle that were read or written so far."""

    done: int


@dataclass(frozen=True, slots=True)
class BundleHandlers:
    """The handlers of these routes."""

    exporter: BundleExporter
    importer: BundleImporter
    threads: Executor
    acts: ActRecorder

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("POST", "/api/v1/export", self.export),
            Route("POST", "/api/v1/export/file", self.export_to_file),
            Route("POST", "/api/v1/export/plan", self.plan_export, is_read=True),
            Route("POST", "/api/v1/import", self.import_stream),
            Route("POST", "/api/v1/import/files", self.import_files),
        ]

    async def plan_export(self, request: AdminRequest) -> ExportPlan:
        """Return the content and the size that an export would have."""
        async with self._open_bundle(await request.read_json(ExportRequest)) as (bundle, images):
            return ExportPlan(bundle.size, len(bundle.blobs), images)

    async def export(self, request: AdminRequest) -> ByteStream:
        """Send a bundle."""
        body = await request.read_json(StreamedExportRequest)
        chunks = self._export_chunks(body, request.actor)
        if body.compression == "zstd":
            chunks = compress(chunks, self.threads)
            return ByteStream(chunks, "application/zstd", "pullcache-bundle.tar.zst")
        return ByteStream(chunks, "application/x-tar", "pullcache-bundle.tar")

    async def export_to_file(self, request: AdminRequest) -> AsyncGenerator[BundleProgress, None]:
        """Write a bundle to a file on this machine; the last progress event has its size."""
        body = await _read_local_request(request, ExportToFileRequest)

        async def work(on_progress: Callable[[int], None]) -> BundleProgress:
            async with self._open_bundle(body) as (bundle, _):
                return BundleProgress(await self.exporter.write(bundle, body.file, on_progress))

        recorded = self.acts.recording("export", request.actor, body.images)
        async with recorded as act, aclosing(_with_progress(work)) as events:
            act.detail = f"to {body.file}"
            async for event in events:
                yield event

    def import_stream(
        self, request: AdminRequest
    ) -> AsyncGenerator[BundleProgress | ImportReport, None]:
        """Import the bundle in the body; the last event is the report."""
        name = request.parse_query(ImportQuery).name
        return self._import_chunks(request.iter_chunks(), name, request.actor)

    async def import_files(
        self, request: AdminRequest
    ) -> AsyncGenerator[BundleProgress | ImportReport, None]:
        """Import a bundle from files on this machine; the last event is the report."""
        body = await _read_local_request(request, ImportFilesRequest)
        chunks = local_file.read_files(body.files, self.threads)
        async with (
            aclosing(chunks),
            aclosing(self._import_chunks(chunks, body.name, request.actor)) as events,
        ):
            async for event in events:
                yield event

    async def _import_chunks(
        self, chunks: AsyncIterator[bytes], name: str, actor: Actor
    ) -> AsyncGenerator[BundleProgress | ImportReport, None]:
        imported = _with_progress(
            lambda on_progress: self.importer.import_bundle(
                chunks, default_name=name, on_progress=on_progress
            )
        )
        async with self.acts.recording("import", actor) as act, aclosing(imported) as events:
            async for event in events:
                if isinstance(event, ImportReport):
                    act.images = self.acts.full_names(
                        image.name for image in event.images if image.is_complete
                    )
                yield event

    async def _export_chunks(
        self, request: ExportRequest, actor: Actor
    ) -> AsyncGenerator[bytes, None]:
        async with (
            self.acts.recording("export", actor, request.images),
            self._open_bundle(request) as (bundle, _),
            aclosing(self.exporter.stream(bundle)) as chunks,
        ):
            async for chunk in chunks:
                yield chunk

    def _open_bundle(
        self, request: ExportRequest
    ) -> AbstractAsyncContextManager[tuple[Bundle, list[ExportedImage]]]:
        exclude = frozenset(map(Digest.parse, request.exclude))
        return self.exporter.open_bundle(
            request.images,
            platforms=request.platforms,
            exclude=exclude,
            with_facts=request.facts,
        )


async def _read_local_request(request: AdminRequest, model: type[M]) -> M:
    """Return the body of a request that names files, which needs a client that may open them."""
    if not request.actor.is_trusted_local:
        raise FileUnreachableError(
            "only the daemon's user and root may name files, and only on admin.sock; "
            "send the bundle itself"
        )
    return await request.read_json(model)


async def _with_progress(
    work: Callable[[Callable[[int], None]], Awaitable[T]],
) -> AsyncGenerator[BundleProgress | T, None]:
    """Run `work` with a progress callback; yield its progress at intervals, and last its result."""
    done = reported = 0

    def on_progress(count: int) -> None:
        nonlocal done
        done = count

    async with background(work(on_progress)) as task:
        while not task.done():
            await asyncio.wait((task,), timeout=PROGRESS_INTERVAL)
            if done > reported and not task.done():
                reported = done
                yield BundleProgress(done)
        yield await task
