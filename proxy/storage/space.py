"""The room of a store: reserved before a byte is written, made by evicting what was used longest ago.

`max_size` bounds everything under the store's directory: blobs, what running downloads have
reserved, what interrupted ones have left, and the index. `min_free` is what the file system keeps.
Nothing is evicted for what cannot fit anyway, nothing that is pinned ever, nor what a bundle is made
of, or brings, meanwhile.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from proxy.concurrency import run_uncancelled
from proxy.errors import StorageError
from proxy.log import get_logger
from proxy.metrics import EvictionReason, Metrics, UncachedReason
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository
from proxy.storage.blobs import BlobStore, OpenBlob, allocated_size
from proxy.storage.fsck import scan_blobs
from proxy.storage.index import Index

# Room for the index to grow between two looks at it: its log is cut at 1 MiB (tables.py).
INDEX_MARGIN = 1 << 19

_EVICTION_BATCH = 256

log = get_logger(__name__)


@dataclass(eq=False, slots=True)
class Lease:
    """Blobs that stay for as long as somebody works with them."""

    digests: set[Digest] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class Reservation:
    """Room that is taken: `size` bytes, of which `written` are on the disk already."""

    size: int
    written: int = 0


class SpaceManager:
    """Keeps the account of one store. `await open()` before anything else."""

    def __init__(
        self,
        store: BlobStore,
        index: Index,
        metrics: Metrics,
        *,
        max_size: int,
        min_free: int,
        clock: Callable[[], float],
    ) -> None:
        self.max_size = max_size
        self.blob_count = 0
        self._store = store
        self._index = index
        self._metrics = metrics
        self._min_free = min_free
        self._clock = clock
        self.stored_bytes = 0
        self._reservations: set[Reservation] = set()
        self._partials: dict[Digest, int] = {}
        # Files that are gone, but that the index could not be made to forget.
        self._unindexed_deletes: set[Digest] = set()
        self._leases: list[Lease] = []
        # One eviction at a time: two would choose the same victims.
        self._eviction_lock = asyncio.Lock()

    async def open(self) -> None:
        """Count what is there, also what a lost index or a kill has left uncounted."""
        self.blob_count, self.stored_bytes = await self._index.totals()
        unsettled = await asyncio.to_thread(self._store.list_committed_ingests)
        unknown = await asyncio.to_thread(
            scan_blobs, self._store, unsettled if self.blob_count else None
        )
        if unknown:
            log.warning("index_repaired", blobs=len(unknown))
            await self._index.add_unlinked_blobs(unknown)
            self.blob_count, self.stored_bytes = await self._index.totals()
        # Not before the index knows them.
        await asyncio.to_thread(self._delete_committed_ingests, unsettled)
        for digest, size, _ in await asyncio.to_thread(self._store.list_ingests):
            self._partials[digest] = size
        await self._ensure_space(0)

    def _delete_committed_ingests(self, digests: Iterable[Digest]) -> None:
        for digest in digests:
            self._store.delete_ingest(digest)

    async def resize(self, max_size: int, min_free: int) -> None:
        """Let the store hold so much, and leave so much free, from now on; evict what is too much."""
        self.max_size, self._min_free = max_size, min_free
        await self._ensure_space(_pending_bytes(self._reservations))

    @property
    def used_bytes(self) -> int:
        """Bytes that are on the disk or promised, the index included."""
        return self.stored_bytes + self.reserved_bytes + self._index.bytes_on_disk()

    @property
    def reserved_bytes(self) -> int:
        """Bytes of downloads, running and interrupted."""
        return sum(item.size for item in self._reservations) + sum(self._partials.values())

    def fits(self, size: int) -> bool:
        """Tell whether a blob of `size` bytes could ever be stored here."""
        index = self._index.bytes_on_disk() + INDEX_MARGIN
        return allocated_size(size) + index <= self.max_size

    def uncached_reason(self, size: int) -> UncachedReason:
        """Say why a blob of `size` bytes could not be stored just now."""
        if not self.fits(size):
            return "too_large"
        if (
            allocated_size(size)
            + self.used_bytes
            - self.stored_bytes
            + self.pinned_bytes
            + INDEX_MARGIN
            > self.max_size
        ):
            return "pinned"
        return "no_space"

    def unpinned_capacity(self) -> int:
        """Return how many bytes of blobs could be here beside what is pinned, if all else went."""
        free = self._store.free_bytes()
        partial = sum(self._partials.values()) + sum(item.written for item in self._reservations)
        most = self.max_size - self._index.bytes_on_disk() - INDEX_MARGIN
        return min(most, self.stored_bytes + partial + free - self._min_free) - self.pinned_bytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes of blobs that no eviction takes."""
        return self._index.pinned_bytes()

    async def reserve(self, size: int) -> Reservation | None:
        """Take room for `size` bytes, evicting for it, or return None if it cannot be had."""
        reservation = Reservation(0)
        self._reservations.add(reservation)
        if await self.grow(reservation, size):
            return reservation
        self.release(reservation)
        return None

    async def grow(self, reservation: Reservation, size: int) -> bool:
        """Make the reservation hold `size` bytes, or return False and leave it as it was."""
        more = allocated_size(size) - reservation.size
        others = sum(item.size for item in self._reservations)
        if others + more + self._index.bytes_on_disk() + INDEX_MARGIN > self.max_size:
            return False
        # Taken first and then made: meanwhile nobody else takes it, and no byte is written.
        reservation.size += more
        if await self._ensure_space(_pending_bytes(self._reservations)):
            return True
        reservation.size -= more
        return False

    def release(self, reservation: Reservation) -> None:
        """Give back room that was not used."""
        self._reservations.discard(reservation)

    def commit(self, reservation: Reservation, digest: Digest, size: int, *, is_new: bool) -> None:
        """Turn the reservation into a blob of `size` bytes, unless it was there already."""
        self._reservations.discard(reservation)
        if is_new or digest in self._unindexed_deletes:
            self._unindexed_deletes.discard(digest)
            self.stored_bytes += allocated_size(size)
            self.blob_count += 1

    def keep_partial(self, reservation: Reservation, digest: Digest) -> None:
        """Account for an ingest that is kept to be resumed."""
        self._reservations.discard(reservation)
        self._partials[digest] = allocated_size(reservation.written)

    async def resume_partial(self, digest: Digest) -> Reservation | None:
        """Take over the room of an interrupted ingest, or none if there is no such ingest.

        None if even that cannot be had; the ingest is then removed.
        """
        size = self._partials.pop(digest, 0)
        if not size:
            # The disk is not asked: how much is needed is not known yet.
            empty = Reservation(0)
            self._reservations.add(empty)
            return empty
        # Reserved before anything is awaited: what is on the disk is never out of the account.
        reservation = await self.reserve(size)
        if reservation is None:
            await asyncio.to_thread(self._store.delete_ingest, digest)
        else:
            reservation.written = size
        return reservation

    @contextmanager
    def lease(self) -> Iterator[Lease]:
        """Yield a hold; what is put into it stays in the store until the context ends."""
        hold = Lease()
        self._leases.append(hold)
        try:
            yield hold
        finally:
            self._leases.remove(hold)

    def _leased_digests(self) -> set[Digest]:
        return set().union(*(hold.digests for hold in self._leases))

    async def remove_unlinked(self, digests: Iterable[Digest]) -> None:
        """Remove blobs that came in vain: that nobody holds, and no repository is linked to."""
        unclaimed = await self._index.unlinked_blobs([*digests])
        held = self._leased_digests()
        if gone := [(digest, size) for digest, size in unclaimed if digest not in held]:
            await self._remove_blobs(gone, "removed")

    async def open_blob(self, digest: Digest, size: int) -> OpenBlob | None:
        """Open a blob of the index. None if its file is gone, and then it is forgotten; or if it cannot be read.

        That one may be right, so it stays until it is fetched anew.
        """
        try:
            opened = self._store.open(digest, size)
        except StorageError as error:
            log.warning("blob_unreadable", digest=str(digest), reason=str(error))
            return None
        if opened is None:
            log.warning("blob_file_missing", digest=str(digest))
            await self.remove_corrupt(digest, size)
        return opened

    async def remove_corrupt(self, digest: Digest, size: int) -> None:
        """Drop a blob that turned out damaged or gone."""
        await self._remove_blobs([(digest, size)], "corrupt")

    async def remove_images(
        self, images: Sequence[tuple[Repository, Reference]]
    ) -> list[tuple[Digest, int]]:
        """Remove images, and the blobs that no other image holds; return those with their sizes.

        Raises `BusyError` if a preload, export or import works with any of these, and `StorageError`.
        """
        async with self._eviction_lock:
            blobs = await self._index.delete_images(images, self._leased_digests())
            # What has begun to be held since stays, and is evicted in its turn.
            held = self._leased_digests()
            if gone := [(digest, size) for digest, size in blobs if digest not in held]:
                await self._remove_blobs(gone, "removed")
            return gone

    async def sweep(self, *, max_idle: float, ingest_ttl: float) -> None:
        """Remove what nobody used for `max_idle` seconds (0: never), and old interrupted ingests."""
        now = self._clock()
        for digest, _, modified in await asyncio.to_thread(self._store.list_ingests):
            if digest in self._partials and now - modified > ingest_ttl:
                await self._drop_partial(digest)
        while max_idle:
            spared = self._leased_digests() | self._unindexed_deletes
            oldest = await self._index.least_recently_used(_EVICTION_BATCH, spared)
            idle = [(digest, size) for digest, size, used in oldest if used < now - max_idle]
            if idle:
                await self._remove_blobs(idle, "idle")
            if len(idle) < _EVICTION_BATCH:
                return

    async def _ensure_space(self, pending_bytes: int) -> bool:
        """Evict until the budget holds; `pending` bytes are reserved but not on the disk yet."""
        async with self._eviction_lock:
            # The account is exact, but room is also taken while victims go. What the file system
            # says is not: a file that is still read keeps its blocks. So the rounds are bounded.
            for _ in range(3):
                # In the loop, as what a hit asks of the file system: a hop to a thread takes longer, and a client waits.
                free = self._store.free_bytes()
                over = self.used_bytes + INDEX_MARGIN - self.max_size
                lacking = self._min_free + pending_bytes - free
                needed = max(over, lacking)
                while self._partials and needed > 0:
                    needed -= await self._drop_partial(next(iter(self._partials)))
                if needed <= 0:
                    return True
                held = self._leased_digests()
                kept = self.pinned_bytes + (await self._index.unpinned_bytes(held) if held else 0)
                # At the start, pins may be more than a cap that was lowered: then all else goes.
                if pending_bytes and needed > self.stored_bytes - kept:
                    return False
                await self._evict(needed, "size" if over > 0 else "min_free", held)
            return False

    async def _evict(
        self, bytes_needed: int, reason: EvictionReason, leased: Collection[Digest]
    ) -> None:
        """Remove the least recently used blobs, `needed` bytes of them if there are as many."""
        while bytes_needed > 0:
            victims = []
            size_of_all = 0
            spared = self._unindexed_deletes.union(leased)
            for digest, size, _ in await self._index.least_recently_used(_EVICTION_BATCH, spared):
                if size_of_all >= bytes_needed:
                    break
                victims.append((digest, size))
                size_of_all += allocated_size(size)
            if not victims:
                return
            bytes_needed -= await self._remove_blobs(victims, reason)

    async def _remove_blobs(self, blobs: list[tuple[Digest, int]], reason: EvictionReason) -> int:
        """Remove blobs; return how many bytes went. A client that leaves may cancel us, not this."""
        return await run_uncancelled(self._remove_and_count(blobs, reason))

    async def _remove_and_count(
        self, blobs: list[tuple[Digest, int]], reason: EvictionReason
    ) -> int:
        sizes = dict(blobs)
        deleted: list[Digest] = []

        def delete(digest: Digest) -> None:
            self._store.delete(digest)
            deleted.append(digest)

        try:
            await self._index.remove_blobs([*sizes, *self._unindexed_deletes], delete)
            self._unindexed_deletes.clear()
        except StorageError as error:
            log.warning("index_delete_failed", reason=str(error))
            self._unindexed_deletes.update(deleted)
        gone = [sizes[digest] for digest in deleted if digest in sizes]
        freed = sum(map(allocated_size, gone))
        self.stored_bytes -= freed
        self.blob_count -= len(gone)
        self._metrics.count_evicted(reason, len(gone), freed)
        return freed

    async def _drop_partial(self, digest: Digest) -> int:
        size = self._partials.pop(digest)
        await asyncio.to_thread(self._store.delete_ingest, digest)
        return size


def _pending_bytes(reservations: set[Reservation]) -> int:
    return sum(item.size - item.written for item in reservations)
