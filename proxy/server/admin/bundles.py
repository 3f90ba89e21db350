"""`/api/v1/export` and `/api/v1/import`: images as bundles, out of the store and into it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from proxy.bundle import local_file
from proxy.bundle.export import Bundle, BundleExporter, ExportedImage
from proxy.bundle.import_ import BundleImporter, ImportReport
from proxy.bundle.local_file import LocalFile
from proxy.concurrency import background
from proxy.errors import FileUnreachableError
from proxy.oci.digest import Digest
from proxy.server.admin.api import AdminRequest, ByteStream, RequestModel, Route

# How often an export to a file, or an import, says how far it is, in seconds.
PROGRESS_INTERVAL = 0.5

T = TypeVar("T")
M = TypeVar("M", bound=RequestModel)


class ExportRequest(RequestModel, frozen=True):
    """What to export; `exclude` are digests to leave out because an earlier bundle has them."""

    images: list[str]
    platforms: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


class ImportQuery(RequestModel, frozen=True):
    """What the image of a bundle is called that does not say it."""

    name: str = ""


class ExportToFileRequest(ExportRequest, frozen=True, kw_only=True):
    """What to export into which file, an empty one."""

    file: LocalFile


class ImportFilesRequest(RequestModel, frozen=True):
    """The files of a bundle, in order, and what its image is called if it does not say it."""

    files: list[LocalFile]
    name: str = ""


class ExportPlan(msgspec.Struct, frozen=True):
    """What an export would hold: `size` bytes, of which there are no less later."""

    size: int
    blobs: int
    images: list[ExportedImage]


class BundleProgress(msgspec.Struct, frozen=True):
    """How many bytes of a bundle were read, or written."""

    done: int


@dataclass(frozen=True, slots=True)
class BundleHandlers:
    """What these routes work with."""

    exporter: BundleExporter
    importer: BundleImporter
    threads: Executor

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("POST", "/api/v1/export", self.export),
            Route("POST", "/api/v1/export/file", self.export_to_file),
            Route("POST", "/api/v1/export/plan", self.plan_export),
            Route("POST", "/api/v1/import", self.import_stream),
            Route("POST", "/api/v1/import/files", self.import_files),
        ]

    async def plan_export(self, request: AdminRequest) -> ExportPlan:
        """Say what an export would hold, and how large it would be."""
        async with self._open_bundle(await request.read_json(ExportRequest)) as (bundle, images):
            return ExportPlan(bundle.size, len(bundle.blobs), images)

    async def export(self, request: AdminRequest) -> ByteStream:
        """Send a bundle."""
        return ByteStream(
            self._export_chunks(await request.read_json(ExportRequest)), "application/x-tar"
        )

    async def export_to_file(self, request: AdminRequest) -> AsyncGenerator[BundleProgress, None]:
        """Write a bundle into a file of this machine; tell how far it is, and at last how large."""
        wanted = await _read_local_request(request, ExportToFileRequest)

        async def work(progress: Callable[[int], None]) -> BundleProgress:
            async with self._open_bundle(wanted) as (bundle, _):
                return BundleProgress(await self.exporter.write(bundle, wanted.file, progress))

        async with aclosing(_with_progress(work)) as events:
            async for event in events:
                yield event

    def import_stream(
        self, request: AdminRequest
    ) -> AsyncGenerator[BundleProgress | ImportReport, None]:
        """Take the body, a bundle, into the store; tell how far it is, and at last what became of it."""
        return self._import_chunks(request.iter_chunks(), request.parse_query(ImportQuery).name)

    async def import_files(
        self, request: AdminRequest
    ) -> AsyncGenerator[BundleProgress | ImportReport, None]:
        """Take a bundle in files of this machine, as `take` does."""
        wanted = await _read_local_request(request, ImportFilesRequest)
        chunks = local_file.read_files(wanted.files, self.threads)
        async with aclosing(chunks), aclosing(self._import_chunks(chunks, wanted.name)) as events:
            async for event in events:
                yield event

    def _import_chunks(
        self, chunks: AsyncIterator[bytes], name: str
    ) -> AsyncGenerator[BundleProgress | ImportReport, None]:
        return _with_progress(
            lambda progress: self.importer.import_bundle(
                chunks, default_name=name, on_progress=progress
            )
        )

    async def _export_chunks(self, request: ExportRequest) -> AsyncGenerator[bytes, None]:
        async with (
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
            request.images, platforms=request.platforms, exclude=exclude
        )


async def _read_local_request(request: AdminRequest, model: type[M]) -> M:
    """Return the document of a call that names files, which only who may open them anyway may do."""
    if not request.is_trusted_local:
        raise FileUnreachableError(
            "files are named by the daemon's user and root, on admin.sock; send the bundle itself"
        )
    return await request.read_json(model)


async def _with_progress(
    work: Callable[[Callable[[int], None]], Awaitable[T]],
) -> AsyncGenerator[BundleProgress | T, None]:
    """Do the work, which says how far it is; tell so from time to time, and at last what came of it."""
    done = told = 0

    def progress(count: int) -> None:
        nonlocal done
        done = count

    async with background(work(progress)) as working:
        while not working.done():
            await asyncio.wait((working,), timeout=PROGRESS_INTERVAL)
            if done > told and not working.done():
                told = done
                yield BundleProgress(done)
        yield await working
