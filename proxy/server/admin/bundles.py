"""`/api/v1/export` and `/api/v1/import`: images as bundles, out of the store and into it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from proxy.bundle import local_file
from proxy.bundle.export import Bundle, Exported, Exporter
from proxy.bundle.import_ import Importer, Report
from proxy.bundle.local_file import File
from proxy.concurrency import beside
from proxy.errors import FileUnreachableError
from proxy.oci.digest import Digest
from proxy.server.admin.api import Call, Download, Input, Route

# How often an export to a file, or an import, says how far it is, in seconds.
INTERVAL = 0.5

T = TypeVar("T")
K = TypeVar("K", bound=Input)


class Wanted(Input, frozen=True):
    """What to export; `without` are digests that are left out, because an earlier bundle has them."""

    images: list[str]
    platforms: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


class Named(Input, frozen=True):
    """What the image of a bundle is called that does not say it."""

    name: str = ""


class Target(Wanted, frozen=True, kw_only=True):
    """What to export into which file, an empty one."""

    file: File


class Sources(Input, frozen=True):
    """The files of a bundle, in order, and what its image is called if it does not say it."""

    files: list[File]
    name: str = ""


class Plan(msgspec.Struct, frozen=True):
    """What an export would hold: `size` bytes, of which there are no less later."""

    size: int
    blobs: int
    images: list[Exported]


class Progress(msgspec.Struct, frozen=True):
    """How many bytes of a bundle were read, or written."""

    done: int


@dataclass(frozen=True, slots=True)
class Operations:
    """What these routes work with."""

    exporter: Exporter
    importer: Importer
    threads: Executor

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("POST", "/api/v1/export", self.export),
            Route("POST", "/api/v1/export/file", self.write),
            Route("POST", "/api/v1/export/plan", self.plan),
            Route("POST", "/api/v1/import", self.take),
            Route("POST", "/api/v1/import/files", self.read),
        ]

    async def plan(self, call: Call) -> Plan:
        """Say what an export would hold, and how large it would be."""
        async with self._opened(await call.document(Wanted)) as (bundle, images):
            return Plan(bundle.size, len(bundle.blobs), images)

    async def export(self, call: Call) -> Download:
        """Send a bundle."""
        return Download(self._chunks(await call.document(Wanted)), "application/x-tar")

    async def write(self, call: Call) -> AsyncGenerator[Progress, None]:
        """Write a bundle into a file of this machine; tell how far it is, and at last how large."""
        wanted = await _local(call, Target)

        async def work(progress: Callable[[int], None]) -> Progress:
            async with self._opened(wanted) as (bundle, _):
                return Progress(await self.exporter.write(bundle, wanted.file, progress))

        async with aclosing(_watched(work)) as events:
            async for event in events:
                yield event

    def take(self, call: Call) -> AsyncGenerator[Progress | Report, None]:
        """Take the body, a bundle, into the store; tell how far it is, and at last what became of it."""
        return self._take(call.chunks(), call.query(Named).name)

    async def read(self, call: Call) -> AsyncGenerator[Progress | Report, None]:
        """Take a bundle in files of this machine, as `take` does."""
        wanted = await _local(call, Sources)
        chunks = local_file.read(wanted.files, self.threads)
        async with aclosing(chunks), aclosing(self._take(chunks, wanted.name)) as events:
            async for event in events:
                yield event

    def _take(
        self, chunks: AsyncIterator[bytes], name: str
    ) -> AsyncGenerator[Progress | Report, None]:
        return _watched(lambda progress: self.importer.take(chunks, name=name, progress=progress))

    async def _chunks(self, wanted: Wanted) -> AsyncGenerator[bytes, None]:
        async with (
            self._opened(wanted) as (bundle, _),
            aclosing(self.exporter.chunks(bundle)) as chunks,
        ):
            async for chunk in chunks:
                yield chunk

    def _opened(self, wanted: Wanted) -> AbstractAsyncContextManager[tuple[Bundle, list[Exported]]]:
        without = frozenset(map(Digest.parse, wanted.without))
        return self.exporter.open(wanted.images, platforms=wanted.platforms, without=without)


async def _local(call: Call, kind: type[K]) -> K:
    """Return the document of a call that names files, which only who may open them anyway may do."""
    if not call.is_local:
        raise FileUnreachableError(
            "files are named by the daemon's user and root, on admin.sock; send the bundle itself"
        )
    return await call.document(kind)


async def _watched(
    work: Callable[[Callable[[int], None]], Awaitable[T]],
) -> AsyncGenerator[Progress | T, None]:
    """Do the work, which says how far it is; tell so from time to time, and at last what came of it."""
    done = told = 0

    def progress(count: int) -> None:
        nonlocal done
        done = count

    async with beside(work(progress)) as working:
        while not working.done():
            await asyncio.wait((working,), timeout=INTERVAL)
            if done > told and not working.done():
                told = done
                yield Progress(done)
        yield await working
