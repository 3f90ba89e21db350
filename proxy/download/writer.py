"""A blob on its way into the store: the room it takes, the file it grows in, how far it is right."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

from proxy.concurrency import beside, in_thread
from proxy.download.pieces import Pieces, Span
from proxy.download.source import Source
from proxy.errors import NoSpaceError, StorageError
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.oci.digest import Hash
from proxy.oci.reference import Repository
from proxy.storage.blobs import LocalStore
from proxy.storage.index import Index
from proxy.storage.ingest import Ingest
from proxy.storage.space import Reservation, Space
from proxy.tracing import note

# Room is taken in steps of this size where upstream does not say how long a blob is.
STEP = 16 << 20
# What was written ahead is hashed in steps of this size, so that readers see it come.
ABSORB = 4 << 20

R = TypeVar("R")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Disk:
    """What content is written with."""

    store: LocalStore
    index: Index
    space: Space
    metrics: Metrics
    threads: Executor


class Filling:
    """The bytes of one blob as they come in, in any order, hashed in order.

    `frontier` is the length of what is written and hashed; `pieces` knows also what is ahead of it;
    `resumed` bytes are an earlier fetch's.
    `changed` is told of every step. Methods raise `StorageError` where the store cannot go on, and
    `DigestMismatchError` where the source's bytes cannot be the blob.
    """

    def __init__(self, disk: Disk, source: Source, changed: Callable[[], None]) -> None:
        self.digest = source.digest
        self.size: int | None = None
        self.frontier = 0
        self.resumed = 0
        self.is_verified = False
        self.pieces = Pieces()
        self._disk = disk
        self._source = source
        self._changed = changed
        self._ingest: Ingest | None = None
        self._opening: asyncio.Future[None] | None = None
        self._reservation: Reservation | None = None
        self._is_allocated = False
        self._is_hashing = False
        self._hashing = 0.0

    @property
    def fd(self) -> int:
        """The file, once it is open."""
        assert self._ingest is not None
        return self._ingest.fd

    def hasher(self) -> Hash:
        """Return a hash of the bytes up to the frontier, to go on elsewhere."""
        return self._ingest.hasher() if self._ingest else self.digest.hasher()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Open the file for the block, and take over what an earlier fetch has left.

        If that is nothing the block begins at once: upstream may be asked while the disk makes the file.
        """
        disk = self._disk
        self._reservation = await disk.space.adopt(self.digest)
        if self._reservation is None:
            raise NoSpaceError("no room can be made")
        is_new = not self._reservation.size
        async with beside(in_thread(disk.threads, self._open, is_new=is_new)) as self._opening:
            if not is_new:
                await self._resume(await self._opened())
            yield

    def _open(self, *, is_new: bool) -> None:
        # Kept at once: whoever is cancelled meanwhile still closes it.
        self._ingest = self._disk.store.open_ingest(self.digest)
        if not is_new:
            self._ingest.resume()

    async def _opened(self) -> Ingest:
        """Return the file as soon as it is open."""
        assert self._opening is not None
        if not self._opening.done():
            await asyncio.wait((self._opening,))
        self._opening.result()
        assert self._ingest is not None
        return self._ingest

    async def _resume(self, ingest: Ingest) -> None:
        if not ingest.resumed:
            return
        runs = [(0, ingest.frontier), *ingest.ahead]
        for start, stop in runs:
            self.pieces.add(start, stop)
        self.resumed = self.pieces.count
        await self._reserve_for(max(stop for _, stop in runs))
        if ingest.is_right():
            # The whole blob: it was only the commit that was missing.
            self.size = ingest.frontier
        self._advance()
        log.info("resumed", digest=str(self.digest), offset=self.frontier)

    async def learn_size(self, size: int) -> None:
        """Take the room for the whole blob as soon as upstream says how large it is."""
        if self.size is not None:
            if size != self.size:
                raise self._source.mismatch()
            return
        self.size = size
        self.pieces.learn(size)
        if not self._disk.space.fits(size):
            raise NoSpaceError("larger than the store")
        if self.frontier > size:
            raise self._source.mismatch()
        await self._reserve_for(size)
        # It may be an empty blob, or one that a killed process had wholly written.
        await self._absorb()

    async def write(self, span: Span, data: memoryview) -> None:
        """Write the next bytes of a span; hash them, and what they were waited for, if they are due."""
        offset = span.position
        # Claimed first: from now on nobody else is given these bytes to write, so what is hashed is
        # what stays in the file, whatever upstream sends a second time.
        data = data[: span.stop - offset]
        span.position += len(data)
        ingest = await self._opened()
        await self._reserve_for(span.position)
        if self.size is not None and self.pieces.has_any and not self._is_allocated:
            await self._allocate(ingest, self.size)
        if offset == ingest.frontier and not self._is_hashing:
            await self._hash(ingest.append, [data])
        else:
            await in_thread(self._disk.threads, ingest.write, offset, data)
        self.pieces.put(span)
        ingest.ahead = self.pieces.ahead(ingest.frontier)
        await self._absorb()

    async def _allocate(self, ingest: Ingest, size: int) -> None:
        """Take the whole blob's place on the disk. Not before the first bytes, which somebody waits for: it takes a while."""
        assert self._reservation is not None
        self._is_allocated = True
        await in_thread(self._disk.threads, ingest.preallocate, size)
        self._reservation.written = max(size, self._reservation.written)

    async def end_here(self) -> None:
        """Take what is in for the whole blob: upstream said no size, only the digest can tell."""
        await self.learn_size(self.frontier)
        if not self.is_verified:
            raise self._source.mismatch()

    async def commit(self, repository: Repository) -> bool:
        """Make the blob a part of the store. False if the disk fails: that fails no reader."""
        assert self._ingest is not None
        assert self._reservation is not None
        disk = self._disk
        try:
            await in_thread(disk.threads, self._ingest.commit)
            try:
                is_new = await disk.index.add_blob(repository, self.digest, self.frontier)
            except StorageError:
                await in_thread(disk.threads, disk.store.delete, self.digest)
                raise
        except StorageError as error:
            disk.metrics.uncached("disk_error")
            log.warning("not_stored", digest=str(self.digest), reason=str(error))
            return False
        disk.space.commit(self._reservation, self.digest, self.frontier, is_new=is_new)
        self._reservation = None
        await in_thread(disk.threads, self._ingest.settle)
        return True

    async def settle(self, *, is_worth_keeping: bool) -> None:
        """Keep what is in to be resumed, or remove it; give back the room. Not after a commit."""
        if self._reservation is None:
            return
        if self._ingest and is_worth_keeping and self.pieces.filled(0):
            await in_thread(self._disk.threads, self._ingest.save)
            self._disk.space.leave(self._reservation, self.digest)
            return
        if self._ingest:
            await in_thread(self._disk.threads, self._ingest.discard)
        self._disk.space.release(self._reservation)

    def stop(self) -> None:
        """Take note of what is hashed, after a failure: it may still be read."""
        if self._ingest:
            self.frontier = self._ingest.frontier

    def close(self) -> None:
        """Close the file. Nothing is written or read any more."""
        if self._ingest:
            self._ingest.close()
            self._ingest = None

    async def _reserve_for(self, end: int) -> None:
        """See that the reservation holds `end` bytes, or raise `NoSpaceError`."""
        assert self._reservation is not None
        if end <= self._reservation.size:
            return
        ahead = 0 if self.size is not None else min(STEP, max(end, 1 << 20))
        for size in (end + ahead, end):
            if await self._disk.space.grow(self._reservation, size):
                return
        raise NoSpaceError("no room can be made")

    async def _absorb(self) -> None:
        """Hash what the frontier has met, unless somebody else does: they will come to it."""
        ingest = await self._opened()
        self._advance()
        while not self._is_hashing:
            start = ingest.frontier
            stop = min(self.pieces.filled(start), start + ABSORB)
            if start == stop:
                return
            await self._hash(ingest.absorb, stop)
            if ingest.frontier == start:
                raise StorageError("cannot read an ingest: it is shorter than it was")
            self._advance()

    async def _hash(self, work: Callable[[R], None], argument: R) -> None:
        """Do what moves the frontier; it is not done twice at the same time."""
        self._is_hashing = True
        began = perf_counter()
        try:
            await in_thread(self._disk.threads, work, argument)
        finally:
            self._is_hashing = False
            self._hashing += perf_counter() - began

    def _advance(self) -> None:
        """Show readers what is in; of a complete blob only if its digest is right."""
        assert self._ingest is not None
        assert self._reservation is not None
        if self._ingest.frontier == self.size and not (self.is_verified or self._is_hashing):
            if not self._ingest.is_right():
                raise self._source.mismatch()
            self.is_verified = True
            note("verify", self._hashing)
        self.frontier = self._ingest.frontier
        self._reservation.written = max(self._reservation.written, self.frontier)
        self._changed()
