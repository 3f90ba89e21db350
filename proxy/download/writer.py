"""A blob on its way into the store: the room it takes, the file it grows in, how far it is right."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

from proxy.concurrency import background, run_in_thread
from proxy.download.pieces import Piece, PieceMap
from proxy.download.source import BlobSource
from proxy.errors import NoSpaceError, StorageError
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.oci.digest import Hasher
from proxy.oci.reference import Repository
from proxy.storage.blobs import BLOCK_SIZE, BlobStore
from proxy.storage.commit import Committer
from proxy.storage.index import Index
from proxy.storage.ingest import Ingest
from proxy.storage.space import Reservation, SpaceManager
from proxy.tracing import record_span

# What was written ahead is hashed in steps of this size, so that readers see it come.
HASH_STEP = 4 << 20

T = TypeVar("T")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StorageDeps:
    """What content is written with."""

    store: BlobStore
    index: Index
    space: SpaceManager
    metrics: Metrics
    executor: Executor


class BlobWriter:
    """The bytes of one blob as they come in, in any order, hashed in order.

    `frontier` is the length of what is written and hashed; `pieces` knows also what is ahead of it;
    `resumed` bytes are an earlier fetch's.
    `changed` is told of every step. Methods raise `StorageError` where the store cannot go on, and
    `DigestMismatchError` where the source's bytes cannot be the blob.
    """

    def __init__(
        self, storage: StorageDeps, source: BlobSource, on_progress: Callable[[], None]
    ) -> None:
        self.digest = source.digest
        self.size: int | None = None
        self.frontier = 0
        self.bytes_resumed = 0
        self.is_verified = False
        self.pieces = PieceMap()
        self._storage = storage
        self._source = source
        self._on_progress = on_progress
        self._ingest: Ingest | None = None
        self._open_future: asyncio.Future[None] | None = None
        self._reservation: Reservation | None = None
        self._bytes_claimed = 0
        self._run_count = 0
        self._last_end = 0
        self._is_hashing = False
        self._hash_seconds = 0.0

    @property
    def fd(self) -> int:
        """The file, once it is open."""
        assert self._ingest is not None
        return self._ingest.fd

    def copy_hasher(self) -> Hasher:
        """Return a hash of the bytes up to the frontier, to go on elsewhere."""
        return self._ingest.copy_hasher() if self._ingest else self.digest.new_hasher()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Open the file for the block, and take over what an earlier fetch has left.

        If that is nothing the block begins at once: upstream may be asked while the disk makes the file.
        """
        disk = self._storage
        self._reservation = await disk.space.resume_partial(self.digest)
        is_new = not self._reservation.size
        async with background(
            run_in_thread(disk.executor, self._open_ingest, is_new=is_new)
        ) as self._open_future:
            if not is_new:
                await self._resume(await self._wait_ingest())
            yield

    def _open_ingest(self, *, is_new: bool) -> None:
        # Kept at once: whoever is cancelled meanwhile still closes it.
        self._ingest = self._storage.store.open_ingest(self.digest)
        if not is_new:
            self._ingest.resume()

    async def _wait_ingest(self) -> Ingest:
        """Return the file as soon as it is open."""
        assert self._open_future is not None
        if not self._open_future.done():
            await asyncio.wait((self._open_future,))
        self._open_future.result()
        assert self._ingest is not None
        return self._ingest

    async def _resume(self, ingest: Ingest) -> None:
        if not ingest.bytes_resumed:
            return
        runs = [(0, ingest.frontier), *ingest.ranges_ahead]
        for start, stop in runs:
            self.pieces.mark_present(start, stop)
        self.bytes_resumed = self.pieces.bytes_present
        self._bytes_claimed, self._run_count = self.bytes_resumed, len(runs)
        await self._ensure_reserved()
        if ingest.matches_digest():
            # The whole blob: it was only the commit that was missing.
            self.size = ingest.frontier
        self._publish_frontier()
        log.info("download_resumed", digest=str(self.digest), offset=self.frontier)

    async def set_size(self, size: int) -> None:
        """Take the room for the whole blob as soon as upstream says how large it is."""
        if self.size is not None:
            if size != self.size:
                raise self._source.record_mismatch()
            return
        self.size = size
        self.pieces.set_size(size)
        if not self._storage.space.could_make_room(size):
            raise NoSpaceError("larger than what the store can hold")
        if self.frontier > size:
            raise self._source.record_mismatch()
        # It may be an empty blob, or one that a killed process had wholly written.
        await self._hash_contiguous()

    async def write(self, piece: Piece, data: memoryview) -> None:
        """Write the next bytes of a span; hash them, and what they were waited for, if they are due."""
        offset = piece.position
        # Claimed first: from now on nobody else is given these bytes to write, so what is hashed is
        # what stays in the file, whatever upstream sends a second time.
        data = data[: piece.stop - offset]
        piece.position += len(data)
        self._bytes_claimed += len(data)
        self._run_count += offset != self._last_end
        self._last_end = piece.position
        ingest = await self._wait_ingest()
        await self._ensure_reserved()
        if offset == ingest.frontier and not self._is_hashing:
            await self._run_hashing(ingest.append, [data])
        else:
            await run_in_thread(self._storage.executor, ingest.write_at, offset, data)
        if self._reservation:
            self._reservation.written = min(self._bytes_claimed, self._reservation.size)
        self.pieces.mark_written(piece)
        ingest.ranges_ahead = self.pieces.ranges_after(ingest.frontier)
        await self._hash_contiguous()

    async def finish_at_frontier(self) -> None:
        """Take what is in for the whole blob: upstream said no size, only the digest can tell."""
        await self.set_size(self.frontier)
        if not self.is_verified:
            raise self._source.record_mismatch()

    async def commit(self, repository: Repository) -> bool:
        """Make the blob a part of the store. False if the disk fails: that fails no reader."""
        assert self._ingest is not None
        assert self._reservation is not None
        disk = self._storage
        committer = Committer(disk.store, disk.index, disk.space, disk.executor)
        try:
            await committer.commit_ingest(self._ingest, self._reservation, repository)
        except StorageError as error:
            disk.metrics.count_uncached("disk_error")
            log.warning("commit_failed", digest=str(self.digest), reason=str(error))
            return False
        self._reservation = None
        return True

    async def release(self, *, keep_partial: bool) -> None:
        """Keep what is in to be resumed, or remove it; give back the room. Not after a commit."""
        if self._reservation is None:
            return
        if self._ingest and keep_partial and self.pieces.contiguous_end(0):
            await run_in_thread(self._storage.executor, self._ingest.save_state)
            self._storage.space.keep_partial(self._reservation, self._ingest)
            return
        if self._ingest:
            await run_in_thread(self._storage.executor, self._ingest.discard)
        self._storage.space.release(self._reservation)

    def sync_frontier(self) -> None:
        """Take note of what is hashed, after a failure: it may still be read."""
        if self._ingest:
            self.frontier = self._ingest.frontier

    def close(self) -> None:
        """Close the file. Nothing is written or read any more."""
        if self._ingest:
            self._ingest.close()
            self._ingest = None

    async def _ensure_reserved(self) -> None:
        """See that the reservation holds all claimed bytes, or raise `NoSpaceError`."""
        assert self._reservation is not None
        # A run of bytes may begin and end in the middle of a block.
        needed = self._bytes_claimed + self._run_count * 2 * BLOCK_SIZE
        if self.size is not None:
            needed = min(needed, self.size)
        if not await self._storage.space.grow(self._reservation, needed, limit=self.size):
            raise NoSpaceError("no room can be made")

    async def _hash_contiguous(self) -> None:
        """Hash what the frontier has met, unless somebody else does: they will come to it."""
        ingest = await self._wait_ingest()
        self._publish_frontier()
        while not self._is_hashing:
            start = ingest.frontier
            stop = min(self.pieces.contiguous_end(start), start + HASH_STEP)
            if start == stop:
                return
            await self._run_hashing(ingest.hash_up_to, stop)
            if ingest.frontier == start:
                raise StorageError("cannot read an ingest: it is shorter than it was")
            self._publish_frontier()

    async def _run_hashing(self, work: Callable[[T], None], argument: T) -> None:
        """Do what moves the frontier; it is not done twice at the same time."""
        self._is_hashing = True
        began = perf_counter()
        try:
            await run_in_thread(self._storage.executor, work, argument)
        finally:
            self._is_hashing = False
            self._hash_seconds += perf_counter() - began

    def _publish_frontier(self) -> None:
        """Show readers what is in; of a complete blob only if its digest is right."""
        assert self._ingest is not None
        if self._ingest.frontier == self.size and not (self.is_verified or self._is_hashing):
            if not self._ingest.matches_digest():
                raise self._source.record_mismatch()
            self.is_verified = True
            record_span("verify", self._hash_seconds)
        self.frontier = self._ingest.frontier
        self._on_progress()
