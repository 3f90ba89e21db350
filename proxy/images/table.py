"""Keeps the table of images by which lists are filtered and sorted, and makes it anew.

A small store has a new table for each list. In a large one it takes many seconds; lists then get the last one,
and a new one is made in the background.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from proxy.concurrency import run_in_thread, start_threads
from proxy.errors import BusyError, InvalidManifestError, InvalidRequestError, StorageError
from proxy.images.store import ImageStore
from proxy.oci.digest import Digest
from proxy.oci.platform import is_runnable
from proxy.storage.image_table import ImageFilter, ImageOrder, ImageTable, TableRow

# A table that is made faster than this is made for each list; seconds.
QUICK_BUILD_TIME = 0.2
# No first table is waited for if the index has more bytes: it is made slower than that.
QUICK_INDEX_SIZE = 8 << 20
# Seconds before the first table of a large store is begun: the list that asked for it is shown first.
START_DELAY = 0.5
# Otherwise it is made anew after this many times the time that it takes.
REBUILD_FACTOR = 30
# Manifests whose platforms are remembered.
MAX_KNOWN_PLATFORMS = 200_000
# Manifests that are read without a break, and the break in seconds: the event loop runs in it.
_READS_PER_BREAK = 8
_BREAK = 0.001

_NOT_READY = "the sizes of all images are being added up; try again in a moment"


@dataclass(eq=False)
class ImageTableKeeper:
    """The last table, and the thread that makes tables."""

    group: asyncio.TaskGroup
    _table: ImageTable | None = None
    _mark: int = -1
    _made_at: float = 0.0
    _build_time: float = 0.0
    _building: asyncio.Task[None] | None = None
    _error: StorageError | None = None
    # The platforms below each image: digests of manifests and names.
    _platforms: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._thread = start_threads(1, "image-table")

    def close(self) -> None:
        """Close the table."""
        self._thread.shutdown()
        if self._table:
            self._table.close()

    async def rows(
        self, store: ImageStore, wanted: ImageFilter, order: ImageOrder, after: str, limit: int
    ) -> list[TableRow]:
        """Return what `find` returns, without the table."""
        return (await self.find(store, wanted, order, after, limit))[1]

    async def find(
        self, store: ImageStore, wanted: ImageFilter, order: ImageOrder, after: str, limit: int
    ) -> tuple[ImageTable, list[TableRow]]:
        """Return the table, and at most `limit` images of it that follow the one named `after`.

        Raises `BusyError` while the first table of a large store is made, `InvalidRequestError` if there
        is no such image, and `StorageError`.
        """
        table = await self._current(store)
        if wanted.platform and not table.has_platforms:
            raise BusyError("the platforms of all images are being read; try again in a moment")
        executor = store.index.list_threads
        rows = await run_in_thread(executor, table.rows, wanted, order, after, limit)
        if rows is None:
            raise InvalidRequestError(f"{after[:100]} is no longer listed; start again")
        return table, rows

    async def platforms(self, store: ImageStore) -> Sequence[str]:
        """Return the platforms of all images that were read so far, the most common first."""
        table = self._table
        return await run_in_thread(store.index.list_threads, table.platforms) if table else ()

    async def _current(self, store: ImageStore) -> ImageTable:
        if self._building is None and await self._is_due(store):
            self._building = self.group.create_task(self._build(store))
        # It may end, and be forgotten, during the next await.
        building = self._building
        if building and await self._may_be_quick(store):
            with suppress(TimeoutError):
                async with asyncio.timeout(3 * QUICK_BUILD_TIME):
                    await asyncio.wait([building])
        if self._table is None:
            raise self._error or BusyError(_NOT_READY)
        return self._table

    async def _may_be_quick(self, store: ImageStore) -> bool:
        """Tell whether the table that is being made is worth waiting for."""
        if self._table is not None:
            return self._build_time < QUICK_BUILD_TIME
        size = await run_in_thread(
            store.index.list_threads, lambda: store.index.path.stat().st_size
        )
        return size <= QUICK_INDEX_SIZE

    async def _is_due(self, store: ImageStore) -> bool:
        if self._table is None:
            return True
        age = time.monotonic() - self._made_at
        if self._build_time >= QUICK_BUILD_TIME and age < REBUILD_FACTOR * self._build_time:
            return False
        mark = await run_in_thread(store.index.list_threads, lambda: _mark_of(self._table))
        return mark != self._mark

    async def _build(self, store: ImageStore) -> None:
        try:
            if self._table is None and not await self._may_be_quick(store):
                await asyncio.sleep(START_DELAY)
            with suppress(StorageError):  # then the times of use are older
                await store.index.flush()
            started = time.monotonic()
            table = await run_in_thread(self._thread, ImageTable, store.index.path)
            self._mark = await run_in_thread(self._thread, lambda: _mark_of(table))
            self._build_time = time.monotonic() - started
            self._made_at, self._error = time.monotonic(), None
            is_quick = self._build_time < QUICK_BUILD_TIME
            if is_quick:
                await run_in_thread(self._thread, self._add_platforms, store, table)
            before, self._table = self._table, table
            if before:
                await run_in_thread(self._thread, before.close)
            if not is_quick:
                await run_in_thread(self._thread, self._add_platforms, store, table)
        except StorageError as error:
            self._error = error
        finally:
            self._building = None

    def _add_platforms(self, store: ImageStore, table: ImageTable) -> None:
        """Read the platforms of all images: those of small stores at once, others with breaks."""
        known, added = self._platforms, 0
        manifests = table.manifests()
        for digest, size in manifests:
            text = str(digest)
            if text in known:
                continue
            if len(known) >= MAX_KNOWN_PLATFORMS:
                known.clear()
            known[text] = tuple(_read_platforms(store, digest, size))
            added += 1
            if added % _READS_PER_BREAK == 0:
                time.sleep(_BREAK)
        table.add_platforms(
            (str(digest), child, platform)
            for digest, _ in manifests
            for child, platform in known.get(str(digest), ())
        )
        table.has_platforms = True


def _mark_of(table: ImageTable | None) -> int:
    return table.change_mark if table else -1


def _read_platforms(store: ImageStore, digest: Digest, size: int) -> list[tuple[str, str]]:
    """Return the manifests and the platforms that a stored image is for, as far as it says."""
    try:
        manifest = store.load_manifest(digest, size)
    except InvalidManifestError:
        return []
    if manifest.is_index:
        return [
            (str(child.digest), str(child.platform))
            for child in manifest.manifests
            if child.platform and is_runnable(child.platform)
        ]
    config = None
    if manifest.config and manifest.config.size:
        stored = {manifest.config.digest: manifest.config.size}
        config = store.load_config(manifest, stored)
    return [(str(digest), str(config.platform))] if config and config.platform else []
