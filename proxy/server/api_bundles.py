"""`/api/v1/export` and `/api/v1/import`: images as bundles, out of the store and into it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass

import msgspec

from proxy.cache.exporting import Bundle, Exported, Exporter
from proxy.cache.importing import Importer, Report
from proxy.flight import beside
from proxy.oci.digest import Digest
from proxy.server.api import Call, Download, Input, Route

# How often an import says how far it is, in seconds.
INTERVAL = 1.0


class Wanted(Input, frozen=True):
    """What to export; `without` are digests that are left out, because an earlier bundle has them."""

    images: list[str]
    platforms: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


class Named(Input, frozen=True):
    """What the image of a bundle is called that does not say it."""

    name: str = ""


class Plan(msgspec.Struct, frozen=True):
    """What an export would hold: `size` bytes, of which there are no less later."""

    size: int
    blobs: int
    images: list[Exported]


class Progress(msgspec.Struct, frozen=True):
    """How many bytes of an upload were read."""

    read: int


@dataclass(frozen=True, slots=True)
class Operations:
    """What these routes work with."""

    exporter: Exporter
    importer: Importer

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("POST", "/api/v1/export", self.export),
            Route("POST", "/api/v1/export/plan", self.plan),
            Route("POST", "/api/v1/import", self.take),
        ]

    async def plan(self, call: Call) -> Plan:
        """Say what an export would hold, and how large it would be."""
        async with self._opened(await call.document(Wanted)) as (bundle, images):
            return Plan(bundle.size, len(bundle.blobs), images)

    async def export(self, call: Call) -> Download:
        """Send a bundle."""
        return Download(self._chunks(await call.document(Wanted)), "application/x-tar")

    async def take(self, call: Call) -> AsyncGenerator[Progress | Report, None]:
        """Take the body, a bundle, into the store; tell how far it is, and at last what became of it."""
        read = told = 0

        def progress(count: int) -> None:
            nonlocal read
            read = count

        name = call.query(Named).name
        work = self.importer.take(call.chunks(), name=name, progress=progress)
        async with beside(work) as taking:
            while not taking.done():
                await asyncio.wait((taking,), timeout=INTERVAL)
                if read > told and not taking.done():
                    told = read
                    yield Progress(read)
            yield await taking

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
