"""What the index remembers of packages in images, and of what scanners found."""

import sqlite3
from collections.abc import Callable, Sequence
from typing import TypeVar

from backports import zstd

from proxy.concurrency import run_in_thread
from proxy.oci.digest import Digest
from proxy.storage.index import Index
from proxy.storage.records import contents_rows
from proxy.storage.records.contents_rows import PackageRow
from proxy.storage.space import SpaceManager

R = TypeVar("R")

# The most that all of this may take of the store.
MAX_CONTENTS_SHARE = 0.05
# Packages that one transaction adds, so that other writes do not wait.
_PACKAGES_PER_WRITE = 500


class ContentsRecords:
    """Documents by digest, and the packages that questions are about. Methods raise `StorageError`.

    What has no room in the store is not kept.
    """

    def __init__(self, index: Index, space: SpaceManager, clock: Callable[[], float]) -> None:
        self._index = index
        self._space = space
        self._clock = clock

    async def layer(self, digest: Digest, version: int) -> bytes | None:
        """Return what a reader of this version has read of a layer."""
        return await self._document(
            "SELECT document FROM layer_contents WHERE digest = ? AND version = ?", digest, version
        )

    async def image(self, digest: Digest, version: int) -> bytes | None:
        """Return what a reader of this version has read of a manifest of an image."""
        return await self._document(
            "SELECT document FROM image_contents WHERE digest = ? AND version = ?", digest, version
        )

    async def report(self, digest: Digest) -> bytes | None:
        """Return what the scanner has found in a manifest of an image."""
        return await self._document("SELECT document FROM scan_reports WHERE digest = ?", digest)

    async def _document(self, query: str, digest: Digest, *parameters: int) -> bytes | None:
        row = await self._index.read(
            lambda connection: connection.execute(query, (str(digest), *parameters)).fetchone()
        )
        if row is None:
            return None
        return await run_in_thread(self._index.list_threads, zstd.decompress, row[0])

    async def put_layer(self, digest: Digest, version: int, document: bytes) -> None:
        """Keep what was read of a layer."""
        packed = await self._pack(document)
        await self._write(
            len(packed), 1, contents_rows.put_layer, str(digest), version, self._clock(), packed,
            self._max_bytes,
        )  # fmt: skip

    async def put_report(self, digest: Digest, document: bytes) -> None:
        """Keep what the scanner has found in a manifest of an image."""
        packed = await self._pack(document)
        await self._write(
            len(packed), 1, contents_rows.put_report, str(digest), self._clock(), packed,
            self._max_bytes,
        )  # fmt: skip

    async def put_image(
        self,
        digest: Digest,
        platform: str,
        version: int,
        document: bytes,
        packages: Sequence[PackageRow],
    ) -> None:
        """Keep what was read of a manifest of an image, and its packages."""
        packed = await self._pack(document)
        image = await self._write(
            len(packed), 1, contents_rows.begin_image, str(digest), platform, self._clock(), packed,
            len(packages),
        )  # fmt: skip
        if image is None:
            return
        for start in range(0, len(packages), _PACKAGES_PER_WRITE):
            some = packages[start : start + _PACKAGES_PER_WRITE]
            await self._write(0, len(some), contents_rows.add_packages, image, some)
        await self._write(0, 1, contents_rows.finish_image, image, version, self._max_bytes)

    async def read(self, work: Callable[[sqlite3.Connection], R]) -> R:
        """Return what a function of `contents_rows` reads."""
        return await self._index.read(work)

    @property
    def _max_bytes(self) -> int:
        return int(self._space.max_size * MAX_CONTENTS_SHARE)

    async def _pack(self, document: bytes) -> bytes:
        return await run_in_thread(self._index.list_threads, zstd.compress, document)

    async def _write(self, size: int, rows: int, work: Callable[..., R], *args: object) -> R | None:
        """Run a write that adds `size` bytes and `rows` rows; None if they have no room in the store."""
        if size > self._max_bytes:
            return None
        reservation = await self._space.reserve_manifests(size, rows)
        if reservation is None:
            return None
        try:
            return await self._index.transact(work, *args, keeps_rows=True)
        finally:
            self._space.release(reservation)
