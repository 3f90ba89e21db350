"""The space account of a store: bytes on disk and reserved bytes, and the evictions that keep its limits.

`max_size` bounds everything under the store's directory: blobs, running and interrupted downloads,
and the index. `min_free` is the space that stays free on the file system. Sizes are of allocated blocks.

The index counts blobs, inside the transaction that adds or removes their rows (`queries.track_totals`);
files without a row and rows without a file are counted here.
Pinned, leased and kept blobs are never evicted, and nothing is evicted for content that cannot fit anyway.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from proxy.concurrency import run_uncancelled
from proxy.errors import StorageError
from proxy.log import get_logger
from proxy.metrics import EvictionReason, Metrics, UncachedReason
from proxy.oci.digest import Digest
from proxy.oci.manifest import MAX_MANIFEST_SIZE
from proxy.oci.reference import Reference, Repository
from proxy.repository_rules import RepositoryRules
from proxy.storage import rule_queries
from proxy.storage.blobs import BlobStore, OpenBlob, allocated_size
from proxy.storage.index import Index
from proxy.storage.ingest import STATE_FILE_SIZE, Ingest
from proxy.storage.locks import DigestLocks
from proxy.storage.reconcile import Reconciler
from proxy.storage.records.trail import UNKNOWN_IMAGE, EvictionTally, find_images
from proxy.storage.scan import scan_blobs

# The index, without its log, may take a quarter of the store, and in a small store 2 MiB. Beyond that its own
# rows are evicted: a store of images needs a ten thousandth, one of small artifacts a seventh.
MAX_INDEX_SHARE = 0.25
MIN_INDEX_SIZE = 2 << 20
# Space for the index to grow between two checks of its size. A transaction adds a few pages to its log.
INDEX_MARGIN = 1 << 19
# A reservation grows by at least 1 and at most 16 MiB at a time, and by no more than this fraction of
# the store: the reservations of many simultaneous downloads must not fill a small store.
MIN_STEP = 1 << 20
MAX_STEP = 16 << 20
STEP_SHARE = 64

# What is over its quota is summed up whenever that takes less than this, in seconds; if it takes longer, for at
# most this share of the time.
QUOTA_COST = 0.03
MAX_QUOTA_SHARE = 0.1

_EVICTION_BATCH = 256
_MAX_ROUNDS = 3

log = get_logger(__name__)


@dataclass(eq=False, slots=True)
class Lease:
    """Blobs that stay in the store while an operation works with them."""

    digests: set[Digest] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class Reservation:
    """Space for content that is being written: `size` bytes, of which `written` are already on disk.

    `digest` is set for an ingest that can be resumed.
    """

    size: int = 0
    written: int = 0
    digest: Digest | None = None

    @property
    def total(self) -> int:
        """The bytes that the account counts for it, including the ingest's state file."""
        return self.size + STATE_FILE_SIZE


class SpaceManager:
    """Keeps the space account of one store, and evicts. `await open()` before anything else.

    A download reserves space as its bytes arrive: `resume_partial`, then `grow` before each write, then
    `Committer.commit_ingest`, `keep_partial` or `release`. `reserve` is for content of known size that
    is written at once: a manifest, a file of a bundle.

    Code that adds or removes the file of a blob must hold its lock in `locks`.
    """

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
        # Blobs that evictions spare. They can be removed by hand, unlike leased ones.
        self.kept: frozenset[Digest] = frozenset()
        self.locks = DigestLocks()
        self._store = store
        self._index = index
        self._metrics = metrics
        self._min_free = min_free
        self._clock = clock
        self._reservations: set[Reservation] = set()
        self._partials: dict[Digest, int] = {}
        self._partial_locks = DigestLocks()
        # Blobs without a file whose rows could not be deleted, with allocated sizes.
        self._unindexed_deletes: dict[Digest, int] = {}
        # Files that the index does not know and that could not be deleted, with allocated sizes.
        self._strays: dict[Digest, int] = {}
        self._leases: list[Lease] = []
        self.evictions = EvictionTally()
        # Called with blobs that were added and removed.
        self.on_stored: Callable[[Collection[Digest]], object] = lambda _digests: None
        self.on_removed: Callable[[Collection[Digest]], object] = lambda _digests: None
        self._rules: RepositoryRules | None = None
        # What is over the quota of its rule, when that was found out, and how long it took.
        self._over_quota: deque[rule_queries.ExcessBlob] = deque()
        self._planned_at = self._planning_seconds = 0.0
        # The time of use up to which a sweep has looked for what is idle by its rule.
        self._idle_after = 0.0
        self._reconciler = Reconciler(store, index)
        # One eviction at a time: two would choose the same victims.
        self._eviction_lock = asyncio.Lock()
        self._sweep_lock = asyncio.Lock()

    async def open(self) -> None:
        """Count the files, and index blobs that a kill or a lost index left out.

        Evicts blobs until the store is within its limits. Raises `StorageError`.
        """
        unsettled = await asyncio.to_thread(self._store.list_committed_ingests)
        unknown = await asyncio.to_thread(
            scan_blobs, self._store, unsettled if self._index.totals.blobs else None
        )
        if unknown:
            log.warning("index_repaired", blobs=len(unknown))
            await self._index.add_unlinked_blobs(unknown)
        # Only now, because they mark the blobs that the index may not know.
        await asyncio.to_thread(self._delete_ingests, unsettled)
        for digest, size, _ in await asyncio.to_thread(self._store.list_ingests):
            self._partials[digest] = size
        await self.shrink_index()
        await self._shrink_to_limits()

    def _delete_ingests(self, digests: Iterable[Digest]) -> None:
        for digest in digests:
            self._store.delete_ingest(digest)

    async def resize(self, max_size: int, min_free: int) -> None:
        """Apply new limits, in bytes, and evict blobs until the store is within them."""
        self.max_size, self._min_free = max_size, min_free
        await self._shrink_to_limits()

    def set_rules(self, rules: RepositoryRules) -> None:
        """Apply the quotas and idle times of these rules from now on."""
        self._rules = rules
        self._over_quota.clear()
        self._planning_seconds = 0.0

    # Totals.

    @property
    def blob_count(self) -> int:
        """The number of blobs on the disk."""
        return self._index.totals.blobs - len(self._unindexed_deletes) + len(self._strays)

    @property
    def stored_bytes(self) -> int:
        """Allocated bytes of the blobs on the disk."""
        gone, strays = sum(self._unindexed_deletes.values()), sum(self._strays.values())
        return self._index.totals.bytes - gone + strays

    @property
    def reserved_bytes(self) -> int:
        """Bytes of running and interrupted downloads."""
        return sum(item.total for item in self._reservations) + sum(self._partials.values())

    @property
    def partial_downloads(self) -> tuple[int, int]:
        """How many interrupted downloads are kept to be resumed, and their bytes."""
        return len(self._partials), sum(self._partials.values())

    @property
    def used_bytes(self) -> int:
        """Bytes on the disk or reserved, the index included."""
        return self.stored_bytes + self.reserved_bytes + self._index.used_bytes()

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned blobs, which are never evicted."""
        return self._index.totals.pinned_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that can be stored before something must be evicted; negative if something must now."""
        return -self._shortage(0)[0]

    def fits(self, size: int) -> bool:
        """Tell whether a blob of `size` bytes could ever be stored here."""
        index = self._index.used_bytes() + INDEX_MARGIN
        return allocated_size(size) + index <= self.max_size

    def could_make_room(self, size: int) -> bool:
        """Tell whether `size` bytes would fit if every unpinned blob were evicted.

        For the known size of a blob, pass the smaller of upstream's claim and a manifest's.
        """
        return self.fits(size) and allocated_size(size) <= self.unpinned_capacity()

    def uncached_reason(self, size: int, children: int = 0) -> UncachedReason:
        """Return why a blob, or a manifest that names `children` blobs, could not be stored now."""
        if not self.fits(size):
            return "too_large"
        if children and self._index_excess(self._index.write_size(children)) > 0:
            return "index_full"
        unevictable = self.used_bytes - self.stored_bytes + self.pinned_bytes + INDEX_MARGIN
        return "pinned" if allocated_size(size) + unevictable > self.max_size else "no_space"

    def unpinned_capacity(self) -> int:
        """Return how many bytes of blobs fit beside the pinned ones, with all others evicted."""
        free = self._store.free_bytes()
        partial = sum(self._partials.values()) + sum(item.written for item in self._reservations)
        most = self.max_size - self._index.used_bytes() - INDEX_MARGIN
        return min(most, self.stored_bytes + partial + free - self._min_free) - self.pinned_bytes

    def is_stored(self, digest: Digest) -> bool:
        """Tell whether the index has the blob and its file was not deleted."""
        return digest not in self._unindexed_deletes and self._index.blob_size(digest) is not None

    # Reservations.

    async def reserve(self, size: int) -> Reservation | None:
        """Reserve `size` bytes, evicting blobs for them; return None if the space cannot be freed."""
        reservation = Reservation()
        self._reservations.add(reservation)
        try:
            if await self.grow(reservation, size, limit=size):
                return reservation
        except BaseException:
            self.release(reservation)
            raise
        self.release(reservation)
        return None

    async def grow(
        self, reservation: Reservation, needed: int, *, limit: int | None = None
    ) -> bool:
        """Make the reservation hold `needed` bytes, or return False and leave it as it was.

        `needed` counts the bytes written and about to be written: call this before each write, and write
        only after True. It evicts for these bytes alone. If more space is free, it reserves a step more,
        up to `limit` (the blob's size, if known), so that most calls find enough bytes reserved.
        """
        if needed <= reservation.size:
            return True
        needed = allocated_size(needed)
        step = min(MAX_STEP, max(MIN_STEP, needed), self.max_size // STEP_SHARE)
        ahead = needed + step
        if limit is not None:
            ahead = max(needed, min(ahead, allocated_size(limit)))
        async with self._eviction_lock:
            if needed <= reservation.size:  # grown by another call of the same download
                return True
            for size in (ahead, needed):
                more = size - reservation.size
                if self._shortage(more)[0] <= 0 or (size == needed and await self._make_room(more)):
                    reservation.size = size
                    return True
        return False

    async def reserve_manifests(self, size: int, children: int) -> Reservation | None:
        """Reserve `size` bytes for manifests that name `children` blobs, and what they add to the index.

        Evicts rows of the index if it would take more than its share of the store.
        """
        cost = self._index.write_size(children)
        if not await self.shrink_index(cost):
            return None
        return await self.reserve(size + cost)

    async def shrink_index(self, more: int = 0) -> bool:
        """Evict rows until the index can take `more` bytes within its share; return False if it cannot.

        The least recently used manifests go, with their edges, and repositories with their links and tags.
        """
        if self._index_excess(more) <= 0:
            return True
        async with self._eviction_lock:
            # A page becomes free only after most of its rows are gone, so what counts is the size of the rows:
            # the next ones take their place.
            excess = self._index_excess(more)
            while excess > 0:
                victims = await self._index.choose_victims(excess, self._spared_digests())
                removed = await self._remove(victims.manifests, "index_full")
                await self._index.delete_repositories(victims.repositories)
                if not (removed or victims.repositories):
                    return False
                excess -= victims.size
        return True

    def _index_excess(self, more: int) -> int:
        """Return how many bytes the index with `more` bytes takes beyond its share; negative if none."""
        share = max(int(self.max_size * MAX_INDEX_SHARE), MIN_INDEX_SIZE)
        return self._index.row_bytes + more - share

    def release(self, reservation: Reservation) -> None:
        """Give back a reservation. The caller has removed the bytes written into it."""
        self._reservations.discard(reservation)

    def convert_reservation(self, reservation: Reservation, digest: Digest) -> None:
        """Drop a reservation whose content has just become a blob of the index."""
        self._reservations.discard(reservation)
        self._unindexed_deletes.pop(digest, None)
        self._strays.pop(digest, None)

    def keep_partial(self, reservation: Reservation, ingest: Ingest) -> None:
        """Drop the reservation of an ingest that is kept to be resumed; count its bytes on disk instead."""
        self._partials[ingest.digest] = ingest.allocated_bytes()
        self._reservations.discard(reservation)

    async def resume_partial(self, digest: Digest) -> Reservation:
        """Return a reservation for the ingest of `digest`, with the size of an interrupted one or 0."""
        async with self._partial_locks.hold(digest):
            size = max(0, self._partials.pop(digest, 0) - STATE_FILE_SIZE)
            reservation = Reservation(size, size, digest)
            self._reservations.add(reservation)
            return reservation

    def add_stray(self, digest: Digest, size: int, reason: str) -> None:
        """Count the file of a commit that failed and could not be undone. A sweep indexes it."""
        log.warning("commit_undo_failed", digest=str(digest), reason=reason)
        self._strays[digest] = allocated_size(size)

    # Leases.

    @contextmanager
    def lease(self) -> Iterator[Lease]:
        """Yield a lease; blobs added to it stay in the store until the context ends."""
        lease = Lease()
        self._leases.append(lease)
        try:
            yield lease
        finally:
            self._leases.remove(lease)

    def _leased_digests(self) -> set[Digest]:
        return set().union(*(lease.digests for lease in self._leases))

    def _spared_digests(self) -> set[Digest]:
        return self._leased_digests().union(self.kept)

    # Reading and removing.

    async def open_blob(self, digest: Digest, size: int) -> OpenBlob | None:
        """Open a blob of the index; return None if its file is gone, or cannot be read.

        A blob without a file is removed from the index. An unreadable file may be intact, so it stays
        until the blob is fetched again.
        """
        try:
            opened = self._store.open(digest, size)
        except StorageError as error:
            log.warning("blob_unreadable", digest=str(digest), reason=str(error))
            return None
        if opened is None:
            await run_uncancelled(self._forget_if_missing(digest))
        return opened

    async def _forget_if_missing(self, digest: Digest, reason: EvictionReason = "corrupt") -> int:
        """Remove a blob without a file from the index and return its allocated size; 0 if it has its file.

        Wait first for a commit or an eviction of the same blob.
        """
        async with self.locks.hold(digest):
            if not self.is_stored(digest) or await asyncio.to_thread(self._has_file, digest):
                return 0
            log.warning("blob_file_missing", digest=str(digest))
            removed = await self._remove_locked([digest], reason)
            return sum(allocated_size(size) for _, size in removed)

    def _has_file(self, digest: Digest) -> bool:
        size = self._index.blob_size(digest)
        try:
            opened = None if size is None else self._store.open(digest, size)
        except StorageError:
            return True
        if opened:
            opened.close()
        return opened is not None

    async def remove_corrupt(self, digest: Digest) -> None:
        """Remove a blob that the caller has found damaged or missing."""
        await run_uncancelled(self._remove_corrupt(digest))

    async def _remove_corrupt(self, digest: Digest) -> None:
        async with self.locks.hold(digest):
            size = self._index.blob_size(digest)
            # Small blobs are verified again, as a commit may have replaced the file.
            if size is None or (size <= MAX_MANIFEST_SIZE and await self._is_intact(digest)):
                return
            await self._remove_locked([digest], "corrupt")

    async def remove_damaged(self, digest: Digest, inode: int) -> bool:
        """Remove a blob whose file, known by its inode (0: it has none), the caller has found damaged.

        Return False if a commit has replaced the file.
        """
        return await run_uncancelled(self._remove_damaged(digest, inode))

    async def _remove_damaged(self, digest: Digest, inode: int) -> bool:
        async with self.locks.hold(digest):
            if await asyncio.to_thread(self._store.blob_inode, digest) != inode:
                return False
            return bool(await self._remove_locked([digest], "corrupt"))

    async def _is_intact(self, digest: Digest) -> bool:
        try:
            return await self._store.read(digest) is not None
        except StorageError:
            return True

    async def remove_unlinked(self, digests: Iterable[Digest]) -> None:
        """Remove the blobs that are neither linked to a repository nor leased by an operation."""
        unlinked = await self._index.unlinked_blobs([*digests])
        await self._remove([digest for digest, _ in unlinked], "removed")

    async def remove_images(
        self, images: Sequence[tuple[Repository, Reference]]
    ) -> list[tuple[Digest, int]]:
        """Remove images and the blobs that no other image has; return the blobs with sizes.

        Raises `BusyError` if a preload, export or import uses any of them, and `StorageError`.
        """
        async with self._eviction_lock:
            blobs = await self._index.delete_images(images, self._leased_digests())
            # Blobs leased since then stay, and can be evicted later.
            return await self._remove([digest for digest, _ in blobs], "removed")

    async def sweep(self, *, max_idle: float, ingest_ttl: float) -> None:
        """Remove blobs unused for `max_idle` seconds (0: never) and ingests older than `ingest_ttl`.

        Compare the account with the index and the files, and correct it. In a store of more than
        `audit.BATCH_SIZE` blobs this takes several sweeps. Raises `StorageError`.
        """
        now = self._clock()
        async with self._sweep_lock:
            await self._sweep_ingests(now - ingest_ttl)
            await self._audit_blobs()
        if self._rules and len(self._rules.max_idles) > 1:
            await self._remove_idle_by_rule(self._rules, now)
            return
        while max_idle:
            oldest = await self._least_recently_used()
            idle = [digest for digest, _, used in oldest if used < now - max_idle]
            if idle:
                await self._remove(idle, "idle")
            if len(idle) < _EVICTION_BATCH:
                return

    async def _remove_idle_by_rule(self, rules: RepositoryRules, now: float) -> None:
        """Remove what is idle by its rule; of many blobs a sweep looks at some, the next one goes on."""
        await self._index.flush()
        while any(rules.max_idles.values()):
            idle = await self._index.read(
                partial(
                    rule_queries.idle_blobs,
                    find_rule=rules.idle_rule,
                    max_idles=rules.max_idles,
                    now=now,
                    after=self._idle_after,
                    count=_EVICTION_BATCH,
                )
            )
            self._idle_after = idle.looked_up_to or 0.0
            if idle.digests:
                await self._remove(idle.digests, "idle")
            if len(idle.digests) < _EVICTION_BATCH:
                return

    async def _sweep_ingests(self, oldest: float) -> None:
        """Remove ingests last written before `oldest`, and count the ones missing from the account."""
        known = self._ingests_in_account()
        for digest, size, modified in await asyncio.to_thread(self._store.list_ingests):
            if digest in self._partials:
                if modified < oldest:
                    await self._drop_partial(digest)
            elif digest not in known | self._ingests_in_account():
                self._partials[digest] = size
                self._report_drift(0, size)

    def _ingests_in_account(self) -> set[Digest]:
        running = {item.digest for item in self._reservations if item.digest}
        return running.union(self._partials)

    async def _audit_blobs(self) -> None:
        if self._reconciler.is_at_start:
            self._report_drift(*await self._index.recount())
        if self._unindexed_deletes:
            await self._remove([], "removed")
        is_repair = self._reconciler.is_first_round
        for digest in await self._reconciler.find_missing():
            reason: EvictionReason = "removed" if is_repair else "corrupt"
            size = await run_uncancelled(self._forget_if_missing(digest, reason))
            self._report_drift(-bool(size), -size, is_repair=is_repair)
        for digest in [*self._strays, *await self._reconciler.find_unknown()]:
            size = await run_uncancelled(self._index_if_unknown(digest))
            self._report_drift(bool(size), size, is_repair=is_repair)
        await self._shrink_to_limits()

    async def _index_if_unknown(self, digest: Digest) -> int:
        """Index a blob that has a file; return the allocated bytes that the account had missed."""
        async with self.locks.hold(digest):
            found = await asyncio.to_thread(scan_blobs, self._store, [digest])
            if not found or self._index.blob_size(digest) is not None:
                return 0
            known = self._strays.get(digest, 0)
            await self._index.add_unlinked_blobs(
                found, on_commit=partial(self._forget_stray, digest)
            )
            return allocated_size(found[0][1]) - known

    def _forget_stray(self, digest: Digest) -> None:
        self._strays.pop(digest, None)

    def _report_drift(self, blobs: int, size: int, *, is_repair: bool = False) -> None:
        """Log a corrected difference; the first audit after a start repairs what a kill has left."""
        if is_repair and blobs:
            log.warning("index_repaired", blobs=blobs, bytes=size)
        elif blobs or size:
            log.warning("account_drift_found", blobs=blobs, bytes=size, corrected=True)
            self._metrics.count_drift()

    # Making room. `_shortage` decides synchronously; the eviction acts on it and calls it again.

    def _shortage(self, more: int) -> tuple[int, EvictionReason]:
        """Return how many bytes to free before `more` bytes can be reserved, and which limit requires it."""
        over = self.used_bytes + more + INDEX_MARGIN - self.max_size
        pending = sum(item.size - item.written for item in self._reservations)
        # statvfs runs in the loop, like the file system calls of a hit: a thread would take longer.
        lacking = self._min_free + pending + more - self._store.free_bytes()
        return max(over, lacking), "size" if over > 0 else "min_free"

    async def _shrink_to_limits(self) -> None:
        async with self._eviction_lock:
            await self._make_room(0)

    async def _make_room(self, more: int) -> bool:
        """Evict until `more` bytes can be reserved, or return False if that is impossible.

        The caller has the eviction lock.
        """
        fixed = self.used_bytes - self.stored_bytes - sum(self._partials.values())
        if more and fixed + more + INDEX_MARGIN > self.max_size:
            return False
        # The account is exact, but free space is not: a file that is still read keeps its blocks. So the
        # rounds are bounded.
        for _ in range(_MAX_ROUNDS):
            while self._shortage(more)[0] > 0 and await self._drop_oldest_partial():
                pass
            needed, reason = self._shortage(more)
            if needed <= 0:
                return True
            spared = self._spared_digests()
            kept = self.pinned_bytes + (await self._index.unpinned_bytes(spared) if spared else 0)
            # With nothing to reserve (at the start, and after a lower limit), evict as much as possible.
            if more and needed > self.stored_bytes - kept:
                return False
            await self._evict(needed, reason)
        return self._shortage(more)[0] <= 0

    async def _evict(self, bytes_needed: int, reason: EvictionReason) -> None:
        """Remove at least `bytes_needed` bytes of blobs if possible.

        What is over the quota of its rule goes first, then the least recently used.
        """
        bytes_needed -= await self._evict_over_quota(bytes_needed)
        while bytes_needed > 0:
            victims = []
            chosen_bytes = 0
            for digest, size, _ in await self._least_recently_used():
                if chosen_bytes >= bytes_needed:
                    break
                victims.append(digest)
                chosen_bytes += allocated_size(size)
            removed = await self._remove(victims, reason)
            if not removed:
                return
            bytes_needed -= sum(allocated_size(size) for _, size in removed)

    async def _evict_over_quota(self, bytes_needed: int) -> int:
        """Remove blobs that are over the quota of their rule; return the bytes that were freed."""
        rules = self._rules
        if rules is None or not rules.max_shares:
            return 0
        if not self._over_quota and self._may_plan(time.monotonic()):
            begun_at = time.monotonic()
            self._over_quota.extend(await self._find_over_quota(rules))
            self._planned_at = time.monotonic()
            self._planning_seconds = self._planned_at - begun_at
        freed = 0
        while self._over_quota and freed < bytes_needed:
            victims, chosen_bytes = list[Digest](), 0
            while (
                self._over_quota
                and len(victims) < _EVICTION_BATCH
                and chosen_bytes < bytes_needed - freed
            ):
                digest, size, _ = self._over_quota.popleft()
                victims.append(digest)
                chosen_bytes += size
            removed = await self._remove(victims, "quota")
            freed += sum(allocated_size(size) for _, size in removed)
        return freed

    def _may_plan(self, now: float) -> bool:
        """Tell whether to sum up again what is over its quota."""
        seconds = self._planning_seconds
        return seconds < QUOTA_COST or now - self._planned_at >= seconds / MAX_QUOTA_SHARE

    async def _find_over_quota(self, rules: RepositoryRules) -> list[rule_queries.ExcessBlob]:
        with suppress(StorageError):  # a full disk needs evictions all the more
            await self._index.flush()
        return await self._index.read(
            partial(
                rule_queries.over_quota,
                find_rule=rules.quota_rule,
                limits=rules.quotas(self.max_size),
                spared=self._leased_digests(),
            )
        )

    async def _least_recently_used(self) -> list[tuple[Digest, int, float]]:
        spared = self._spared_digests().union(self._unindexed_deletes)
        return await self._index.least_recently_used(_EVICTION_BATCH, spared)

    async def _remove(
        self, digests: Collection[Digest], reason: EvictionReason
    ) -> list[tuple[Digest, int]]:
        """Remove blobs, except leased ones and ones being committed; return the removed, with sizes.

        A client that disconnects may cancel the caller, but not the removal.
        """
        leased = self._leased_digests()
        locked = self.locks.acquire_free(digest for digest in digests if digest not in leased)
        return await run_uncancelled(self._remove_and_release(locked, reason))

    async def _remove_and_release(
        self, locked: list[Digest], reason: EvictionReason
    ) -> list[tuple[Digest, int]]:
        try:
            return await self._remove_locked(locked, reason)
        finally:
            self.locks.release(locked)

    async def _remove_locked(
        self, digests: Sequence[Digest], reason: EvictionReason
    ) -> list[tuple[Digest, int]]:
        """Remove files and rows of blobs whose locks the caller has; return the removed, with sizes."""
        if not (digests or self._unindexed_deletes):
            return []
        deleted: list[Digest] = []
        images = await self._find_images(digests, reason)

        def delete_file(digest: Digest) -> None:
            self._store.delete(digest)
            deleted.append(digest)

        retried = self.locks.acquire_free(self._unindexed_deletes)
        try:
            rows = await self._index.remove_blobs(
                [*digests, *retried],
                delete_file,
                on_commit=self._forget_unindexed,
            )
            removed = [(digest, size) for digest, size in rows if digest not in retried]
        except StorageError as error:
            log.warning("index_delete_failed", reason=str(error))
            removed = self._note_unindexed(deleted)
        finally:
            self.locks.release(retried)
        freed = sum(allocated_size(size) for _, size in removed)
        self._metrics.count_evicted(reason, len(removed), freed)
        self.on_removed([digest for digest, _ in removed])
        if images is not None:
            for digest, size in removed:
                self.evictions.add(reason, images.get(digest, UNKNOWN_IMAGE), allocated_size(size))
        return removed

    async def _find_images(
        self, digests: Sequence[Digest], reason: EvictionReason
    ) -> Mapping[Digest, str] | None:
        """Return the images that evicted blobs belong to; None if an act removes them."""
        if reason == "removed":
            return None
        try:
            return await self._index.transact(find_images, digests, keeps_rows=True)
        except StorageError:
            return {}

    def _forget_unindexed(self, digests: Iterable[Digest]) -> None:
        for digest in digests:
            self._unindexed_deletes.pop(digest, None)

    def _note_unindexed(self, digests: Iterable[Digest]) -> list[tuple[Digest, int]]:
        """Record deleted files whose rows stayed; return the ones not recorded before."""
        noted = []
        for digest in digests:
            size = self._index.blob_size(digest)
            if size is not None and digest not in self._unindexed_deletes:
                self._unindexed_deletes[digest] = allocated_size(size)
                noted.append((digest, size))
        return noted

    async def _drop_oldest_partial(self) -> bool:
        """Remove the oldest interrupted ingest; return False if there is none."""
        digest = next((one for one in self._partials if one not in self._partial_locks), None)
        if digest:
            await self._drop_partial(digest)
        return digest is not None

    async def _drop_partial(self, digest: Digest) -> None:
        """Remove an interrupted ingest, unless it was resumed. It is counted until its file is deleted."""
        if digest in self._partials and self._partial_locks.acquire_free([digest]):
            await run_uncancelled(self._delete_partial(digest))

    async def _delete_partial(self, digest: Digest) -> None:
        try:
            await asyncio.to_thread(self._store.delete_ingest, digest)
            del self._partials[digest]
        finally:
            self._partial_locks.release([digest])
