"""The index: the blobs of the store, the repositories linked to them, and the times of their last use.

Reads in the event loop look up single rows on a read-only connection, and are cached until the next
write. Writes run one after another in a thread, each in one transaction. Uses are collected in memory
and written every few seconds, so that a hit writes nothing.

A row that cannot be read, because the index is damaged or locked, counts as absent, so that requests
pass through to upstream. If another process locks the index, writes on the way of a response fail at
once; the others wait up to `LOCK_TIMEOUT`.
"""

import asyncio
import json
import queue
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from proxy.concurrency import run_in_thread, run_uncancelled, start_threads
from proxy.errors import InvalidDigestError, StorageError
from proxy.log import get_logger
from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest
from proxy.oci.reference import Reference, Repository, Tag
from proxy.oci.referrers import ReferrerRecord
from proxy.storage import index_size, index_writes
from proxy.storage.image_queries import delete_images
from proxy.storage.index_size import PAGE_SIZE, PAGES_PER_ROW, ROW_SIZE, IndexVictims

R = TypeVar("R")

_MAX_CACHED_ROWS = 10_000
_NOT_CACHED: Any = object()
# How long a commit waits for another process to unlock the index, and how often it tries, in seconds.
LOCK_TIMEOUT = 5.0
LOCK_POLL_INTERVAL = 0.05

# Errors of a read. Damage that SQLite does not notice turns into values of the wrong form.
_READ_ERRORS = (sqlite3.Error, InvalidDigestError, TypeError, ValueError)
_WRITE_ERRORS = (sqlite3.Error, InvalidDigestError)
_LOCK_CODES = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_DAMAGE_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

# Threads, and read-only connections, for reads of many rows.
LIST_THREADS = 4

# Free pages that the index keeps for its next rows, and those that it gives back after one write: 1 MiB
# takes 10 ms.
_SPARE_PAGES = 64
_MAX_RELEASED_PAGES = 256

# Uses that one transaction records. Each may be of a manifest that names thousands of blobs.
_USES_PER_WRITE = 256
# Blobs whose rows one transaction deletes. Each may be a manifest that names thousands.
_BLOBS_PER_REMOVAL = 32

# Manifests that name one blob and whose statements about the size of one blob are looked at. Most blobs are in few, a base
# layer may be in all; the loop reads 256 in less than a millisecond.
MAX_PARENTS = 256

# Queries of single rows; the parameters are the names in the order of `_cached_row`.
_REPOSITORY_ID_SQL = "(SELECT id FROM repositories WHERE upstream = ? AND name = ?)"
_BLOB_SQL = (
    "SELECT size, coalesce(l.media_type, b.media_type), l.repository IS NOT NULL FROM blobs b"
    f" LEFT JOIN links l ON l.repository = {_REPOSITORY_ID_SQL} AND l.digest = b.digest"
    " WHERE b.digest = ?"
)
_SENDER_SQL = "SELECT 1 FROM senders WHERE upstream = ? AND digest = ?"
# CROSS JOIN fixes the order: a repository may have any number of links.
_DECLARED_SIZE_SQL = (
    "SELECT e.size FROM (SELECT parent, size, is_foreign FROM edges WHERE child = ?"
    f" AND size != {index_writes.UNKNOWN_SIZE} LIMIT {MAX_PARENTS}) e CROSS JOIN links l"
    f" ON l.digest = e.parent AND l.repository = {_REPOSITORY_ID_SQL}"
    " WHERE NOT e.is_foreign LIMIT 1"
)
_TAG_SQL = (
    "SELECT t.digest, t.checked, coalesce(l.media_type, b.media_type) FROM tags t"
    " LEFT JOIN links l ON l.repository = t.repository AND l.digest = t.digest"
    " LEFT JOIN blobs b ON b.digest = t.digest"
    f" WHERE t.repository = {_REPOSITORY_ID_SQL} AND t.tag = ?"
)

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class BlobRow:
    """A committed blob. `media_type` is None unless the blob is a manifest.

    `is_linked` tells whether the repository that was asked about may be served the blob.
    """

    size: int
    media_type: str | None
    is_linked: bool


@dataclass(frozen=True, slots=True)
class TagRow:
    """The digest of a tag, as upstream stated it at Unix time `checked_at`.

    `media_type` is that of the manifest in this repository; None if it is not stored.
    """

    digest: Digest
    checked_at: float
    media_type: str | None = None


class StoreTotals(NamedTuple):
    """The number of blobs in the index, the bytes that they take on disk, and those of pinned blobs."""

    blobs: int
    bytes: int
    pinned_bytes: int


class Index:
    """The index of one store. `close` writes the uses that are still in memory.

    `list_threads` run what reads many rows, so that it delays no transfer of content.

    `totals` are those of the last transaction. They change in the event loop, in the same step that calls
    the write's `on_commit`, so that readers in the loop see both changes or neither.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self.path = path
        self._clock = clock
        self._pending_uses: dict[Digest, float] = {}
        self._row_cache: dict[tuple[str, tuple[Repository | Digest | str, ...]], Any] = {}
        # The error message, once damage was found; it lasts until the next start.
        self._damage = ""
        self._used_pages = 0
        try:
            self._writer = index_writes.open_connection(path)
            self.totals = StoreTotals(*index_writes.track_totals(self._writer))
            self._count_pages()
            # `_write` waits for a lock itself, so that one write does not hold up the others.
            self._writer.execute("PRAGMA busy_timeout = 0")
            self._reader = self._connect_reader()
            query = (
                "SELECT max(coalesce((SELECT max(used) FROM blobs WHERE pinned), 0),"
                " coalesce((SELECT max(used) FROM blobs WHERE NOT pinned), 0))"
            )
            self._last_use: float = self._reader.execute(query).fetchone()[0]
        except sqlite3.DatabaseError as error:
            if _has_code(error, _LOCK_CODES):
                raise _locked_error(path, "opened") from error
            raise StorageError(
                f"the index {path} cannot be read ({error}); rebuild it with pullcache fsck"
            ) from error
        self._executor = start_threads(1, "index")
        self.list_threads = start_threads(LIST_THREADS, "lists")
        self._list_connections: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()

    def _connect_reader(self) -> sqlite3.Connection:
        return sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode=ro",
            uri=True,
            timeout=0,
            check_same_thread=False,
            isolation_level=None,
        )

    def close(self) -> None:
        """Write the uses that are still in memory and close the index. Blocks."""
        self._executor.shutdown()
        self.list_threads.shutdown()
        while not self._list_connections.empty():
            self._list_connections.get().close()
        with suppress(sqlite3.Error):
            self._run_transaction(False, index_writes.record_uses, (self._pending_uses,))
        self._reader.close()
        self._writer.close()

    # Reads, in the loop.

    def blob(self, repository: Repository, digest: Digest) -> BlobRow | None:
        """Return a committed blob, and whether the repository is linked to it; None if it is not stored."""
        return self._cached_row(
            _BLOB_SQL,
            lambda row: BlobRow(int(row[0]), row[1], bool(row[2])),
            repository,
            digest,
        )

    def manifest(self, digest: Digest) -> BlobRow | None:
        """Return a committed manifest. The caller checks access."""
        return self._cached_row(
            "SELECT size, media_type FROM blobs WHERE digest = ? AND media_type IS NOT NULL",
            lambda row: BlobRow(int(row[0]), row[1], is_linked=False),
            digest,
        )

    def blob_size(self, digest: Digest) -> int | None:
        """Return the size of a committed blob. The caller checks access."""
        return self._cached_row(
            "SELECT size FROM blobs WHERE digest = ?", lambda row: int(row[0]), digest
        )

    def has_sent(self, upstream: str, digest: Digest) -> bool:
        """Tell whether the upstream has sent all bytes of a stored blob, under any repository."""
        return self._cached_row(_SENDER_SQL, bool, upstream, digest) is not None

    def declared_size(self, repository: Repository, digest: Digest) -> int | None:
        """Return the size that a stored manifest of this repository states for a blob of the registry.

        Manifests of other repositories are not trusted: they may state any size. None also if the
        statement is not among the first `MAX_PARENTS` of all repositories.
        """
        return self._cached_row(_DECLARED_SIZE_SQL, lambda row: int(row[0]), digest, repository)

    def children(self, parent: Digest, count: int) -> list[Digest]:
        """Return up to `count` digests that a stored manifest names, without foreign layers."""
        query = "SELECT child FROM edges WHERE parent = ? AND NOT is_foreign LIMIT ?"
        with suppress(StorageError):
            return self._read_rows(query, (str(parent), count), lambda row: Digest.parse(row[0]))
        return []

    def parents(self, repository: Repository, child: Digest) -> list[Digest]:
        """Return up to `MAX_PARENTS` stored manifests of the repository that name the digest.

        Raises `StorageError`.
        """
        query = (
            "SELECT parent FROM edges e WHERE child = ? AND EXISTS (SELECT 1 FROM links l"
            f" WHERE l.repository = {_REPOSITORY_ID_SQL} AND l.digest = e.parent) LIMIT ?"
        )
        parameters = (str(child), repository.upstream, repository.name, MAX_PARENTS)
        return self._read_rows(query, parameters, lambda row: Digest.parse(row[0]))

    def tag(self, repository: Repository, tag: Tag) -> TagRow | None:
        """Return the last known digest of a tag, or None."""
        return self._cached_row(
            _TAG_SQL,
            lambda row: TagRow(Digest.parse(row[0]), float(row[1]), row[2]),
            repository,
            tag,
        )

    def referrers(
        self, repository: Repository, subject: Digest, count: int
    ) -> list[tuple[Digest, BlobRow]]:
        """Return up to `count` stored manifests of the repository whose subject is `subject`."""
        query = (
            "SELECT b.digest, b.size, coalesce(l.media_type, b.media_type) FROM blobs b CROSS JOIN links l"
            f" ON l.repository = {_REPOSITORY_ID_SQL} AND l.digest = b.digest WHERE b.subject = ? LIMIT ?"
        )
        with suppress(StorageError):
            return self._read_rows(
                query,
                (repository.upstream, repository.name, str(subject), count),
                lambda row: (Digest.parse(row[0]), BlobRow(int(row[1]), row[2], is_linked=True)),
            )
        return []

    def referrer_record(self, repository: Repository, subject: Digest) -> ReferrerRecord | None:
        """Return what upstream had of referrers of a manifest when a preload asked, or None."""
        query = f"SELECT record FROM referrer_records WHERE repository = {_REPOSITORY_ID_SQL} AND subject = ?"
        parameters = (repository.upstream, repository.name, str(subject))
        with suppress(StorageError):
            for record in self._read_rows(
                query, parameters, lambda row: ReferrerRecord.decode(row[0])
            ):
                return record
        return None

    def oldest_use(self) -> float:
        """Return the last use of the blob to be evicted next, in Unix time; 0 if there is none."""
        query = "SELECT coalesce(min(used), 0) FROM blobs WHERE NOT pinned"
        with suppress(StorageError):
            return self._read_rows(query, (), lambda row: float(row[0]))[0]
        return 0.0

    def is_pinned(self, digest: Digest) -> bool:
        """Tell whether the blob is pinned. Raises `StorageError`."""
        query = "SELECT 1 FROM blobs WHERE digest = ? AND pinned"
        return bool(self._read_rows(query, (str(digest),), bool))

    def blobs_after(self, digest: str, count: int) -> list[tuple[Digest, int]]:
        """Return digests and sizes of up to `count` blobs that follow `digest` in the index.

        Raises `StorageError`.
        """
        query = "SELECT digest, size FROM blobs WHERE digest > ? ORDER BY digest LIMIT ?"
        return self._read_rows(
            query, (digest, count), lambda row: (Digest.parse(row[0]), int(row[1]))
        )

    def linked_repositories(self, digest: Digest, count: int) -> list[Repository]:
        """Return up to `count` repositories that are linked to the digest. Raises `StorageError`."""
        query = (
            "SELECT upstream, name FROM links JOIN repositories ON id = repository"
            " WHERE digest = ? LIMIT ?"
        )
        return self._read_rows(
            query, (str(digest), count), lambda row: Repository(str(row[0]), str(row[1]))
        )

    def unknown_blobs(self, digests: Collection[Digest]) -> list[Digest]:
        """Return those of the digests that are not in the index. Raises `StorageError`."""
        query = "SELECT value FROM json_each(?) WHERE value NOT IN (SELECT digest FROM blobs)"
        parameters = (json.dumps([*map(str, digests)]),)
        return self._read_rows(query, parameters, lambda row: Digest.parse(row[0]))

    def lookup(
        self,
        query: str,
        build: Callable[[tuple[Any, ...]], R],
        *names: Repository | Digest | str,
    ) -> R | None:
        """Return `build(row)` for the row of a query, None without one; cached until the next write.

        The names are the parameters of the query; a repository stands for its upstream and its name.
        """
        return self._cached_row(query, build, *names)

    def select(self, query: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Return all rows of a query that reads few of them. Raises `StorageError`."""
        return self._read_rows(query, tuple(parameters), tuple)

    def touch(self, digest: Digest) -> None:
        """Record a use of a blob; a use of a manifest counts for everything below it."""
        self._pending_uses[digest] = self._next_use_time()

    # Reads of many rows, in threads.

    async def read(self, work: Callable[[sqlite3.Connection], R]) -> R:
        """Return the result of `work`, which gets a read-only connection. Raises `StorageError`."""

        def run() -> R:
            try:
                connection = self._list_connections.get_nowait()
            except queue.Empty:
                connection = self._connect_reader()
            try:
                return work(connection)
            finally:
                self._list_connections.put(connection)

        try:
            return await run_in_thread(self.list_threads, run)
        except _READ_ERRORS as error:
            raise self._to_storage_error("read", error) from error

    # Writes, in the thread.

    async def flush(self) -> None:
        """Write the uses recorded since the last flush. Raises `StorageError` and keeps them."""
        uses, self._pending_uses = self._pending_uses, {}
        try:
            while some := dict(islice(uses.items(), _USES_PER_WRITE)):
                # Times of use are not cached.
                await self._write(index_writes.record_uses, some, keeps_rows=True)
                for digest in some:
                    del uses[digest]
        finally:
            self._pending_uses = uses | self._pending_uses

    async def add_blob(
        self,
        repository: Repository | None,
        digest: Digest,
        size: int,
        *,
        on_commit: Callable[[], None] | None = None,
    ) -> bool:
        """Add a committed blob, used now, and link the repository to it; return whether it is new.

        Survives a power cut, so that no file remains uncounted.
        """
        return await self._write(
            index_writes.add_blob,
            repository,
            digest,
            size,
            self._next_use_time(),
            is_durable=True,
            waits_for_lock=True,
            on_commit=on_commit,
        )

    async def add_manifest(
        self,
        repository: Repository | None,
        digest: Digest,
        size: int,
        manifest: Manifest,
        *,
        on_commit: Callable[[], None] | None = None,
    ) -> bool:
        """Add a committed manifest and link the repository to it; return whether it is new."""
        return await self._write(
            index_writes.add_manifest,
            repository,
            digest,
            size,
            manifest,
            self._next_use_time(),
            on_commit=on_commit,
        )

    async def add_image(
        self,
        repository: Repository,
        tag: Tag | None,
        digest: Digest,
        manifests: Sequence[tuple[Digest, int, Manifest]],
    ) -> None:
        """Add the committed manifests of an image, link the repository to all of it, set its tag.

        The tag counts as checked now. All rows are added, or none. Survives a power cut.
        """
        await self._write(
            index_writes.add_image,
            repository,
            tag and (tag, digest, self._clock()),
            [(*manifest, self._next_use_time()) for manifest in manifests],
            is_durable=True,
            waits_for_lock=True,
        )

    async def add_unlinked_blobs(
        self,
        files: Sequence[tuple[Digest, int, Manifest | None]],
        *,
        on_commit: Callable[[], None] | None = None,
    ) -> None:
        """Add blobs whose files were found, without links. Survives a power cut."""
        await self._write(
            index_writes.add_unlinked_blobs,
            files,
            self._next_use_time(),
            is_durable=True,
            waits_for_lock=True,
            on_commit=on_commit,
        )

    async def link(self, repository: Repository, digest: Digest) -> None:
        """Link the repository to a blob that it was proven to have.

        Does nothing unless the blob is stored and the repository's upstream has sent it.
        """
        await self._write(index_writes.add_proven_link, repository, digest)

    async def set_tag(
        self,
        repository: Repository,
        tag: Tag,
        digest: Digest,
        *,
        stated: Digest | None = None,
        age: float = 0.0,
    ) -> None:
        """Set the digest that upstream stated for a tag `age` seconds ago; a new one survives a power cut.

        `stated` is what upstream states if `digest` stands in for it.
        """
        known = self.tag(repository, tag)
        is_new = known is None or known.digest != digest
        await self._write(
            index_writes.set_tag,
            repository,
            tag,
            digest,
            self._clock() - age,
            stated,
            is_durable=is_new,
        )

    async def move_tag(self, repository: Repository, tag: Tag, digest: Digest) -> None:
        """Set the digest of a known tag, without upstream having been asked. Survives a power cut."""
        await self._write(index_writes.move_tag, repository, tag, digest, is_durable=True)

    async def delete_tag(self, repository: Repository, tag: Tag) -> None:
        """Delete a tag; its content stays."""
        await self._write(index_writes.delete_tag, repository, tag)

    async def set_referrer_records(
        self, repository: Repository, records: Mapping[Digest, ReferrerRecord]
    ) -> None:
        """Record what upstream has of referrers of stored manifests. Survives a power cut."""
        await self._write(index_writes.set_referrer_records, repository, records, is_durable=True)

    async def pin(self, images: Sequence[tuple[Repository, Reference]]) -> None:
        """Pin images, whether they are in the store or not. Survives a power cut."""
        await self._write(index_writes.pin, images, is_durable=True, waits_for_lock=True)

    async def unpin(
        self, images: Sequence[tuple[Repository, Reference]]
    ) -> list[tuple[Repository, Reference]]:
        """Unpin images; return the ones that were pinned."""
        return await self._write(index_writes.unpin, images, is_durable=True, waits_for_lock=True)

    async def delete_images(
        self, images: Sequence[tuple[Repository, Reference]], leased: Collection[Digest] = ()
    ) -> list[tuple[Digest, int]]:
        """Delete images with their tags and pins; return, with sizes, the blobs that no other image has.

        The blobs stay for `remove_blobs`. Raises `BusyError`, without changes, if a blob is leased.
        """
        return await self._write(
            delete_images, images, leased, is_durable=True, waits_for_lock=True
        )

    async def unlinked_blobs(self, digests: Sequence[Digest]) -> list[tuple[Digest, int]]:
        """Return, with sizes, the blobs that are neither linked to a repository nor pinned."""
        return await self._write(index_writes.unlinked_blobs, digests)

    async def unpinned_bytes(self, digests: Collection[Digest]) -> int:
        """Return the allocated bytes of the blobs that are stored and not pinned."""
        return await self._write(index_writes.unpinned_bytes, digests)

    async def least_recently_used(
        self, count: int, excluded: Collection[Digest] = ()
    ) -> list[tuple[Digest, int, float]]:
        """Return digest, size and time of use of up to `count` blobs, least recently used first.

        Pinned and excluded blobs are left out. Raises `StorageError`.
        """
        # On a full disk the flush fails, and evictions are needed even more.
        with suppress(StorageError):
            await self.flush()
        spared = {*map(str, self._pending_uses), *map(str, excluded)}
        query = "SELECT digest, size, used FROM blobs WHERE NOT pinned ORDER BY used"
        try:
            with closing(self._reader.execute(query)) as rows:
                oldest = (row for row in rows if row[0] not in spared)
                return [
                    (Digest.parse(row[0]), int(row[1]), float(row[2]))
                    for row in islice(oldest, count)
                ]
        except _READ_ERRORS as error:
            raise self._to_storage_error("read", error) from error

    async def recently_used(self, count: int) -> list[tuple[Digest, int]]:
        """Return digests and sizes of the `count` blobs used last, the last one first.

        Raises `StorageError`.
        """
        return await self._write(index_writes.recently_used, count)

    async def remove_blobs(
        self,
        digests: Sequence[Digest],
        delete_file: Callable[[Digest], None],
        *,
        on_commit: Callable[[Sequence[Digest]], None] = lambda _: None,
    ) -> list[tuple[Digest, int]]:
        """Call `delete_file` for each blob, then delete its row; return the rows, with sizes.

        Files go first, because a full disk accepts no writes until a file is deleted. Each transaction
        deletes some of the blobs, so that other writes do not wait for all of them. `on_commit` gets them.
        """
        removed = []
        for start in range(0, len(digests), _BLOBS_PER_REMOVAL):
            some = digests[start : start + _BLOBS_PER_REMOVAL]
            removed += await self._write(
                index_writes.remove_blobs, some, delete_file, on_commit=partial(on_commit, some)
            )
        return removed

    async def choose_victims(self, size: int, spared: Collection[Digest]) -> IndexVictims:
        """Return the least recently used manifests and repositories with about `size` bytes of rows.

        Pinned images and the spared manifests are left out. Raises `StorageError`.
        """
        with suppress(StorageError):
            await self.flush()
        names = self._pending_uses.keys() | set(map(str, spared))
        return await self._write(index_size.choose_victims, size, names)

    async def delete_repositories(self, numbers: Sequence[int]) -> None:
        """Delete repositories, given by their ids, with their links and tags; their blobs stay."""
        await self._write(index_size.delete_repositories, numbers)

    async def transact(
        self,
        work: Callable[..., R],
        *args: Any,
        is_durable: bool = False,
        keeps_rows: bool = False,
    ) -> R:
        """Run `work` with a connection and `args` in a transaction of its own.

        With `is_durable` it survives a power cut; with `keeps_rows` it changes nothing that `lookup`
        caches. Raises `StorageError`, with nothing changed.
        """
        return await self._write(work, *args, is_durable=is_durable, keeps_rows=keeps_rows)

    async def recount(self) -> tuple[int, int]:
        """Recount the blobs and correct `totals`; return the corrections, in blobs and bytes."""
        return await self._write(index_writes.recount_totals)

    def used_bytes(self) -> int:
        """Return the bytes of the index itself, its log included and free pages left out."""
        # Pages that are only in the log make the file longer later.
        pages = min(self._file_size(""), self.row_bytes)
        return pages + self._file_size("-wal") + self._file_size("-shm")

    @property
    def row_bytes(self) -> int:
        """The bytes of the pages that hold rows."""
        return self._used_pages * PAGE_SIZE

    def _file_size(self, suffix: str) -> int:
        try:
            return Path(f"{self.path}{suffix}").stat().st_size
        except OSError:
            return 0

    def write_size(self, rows: int) -> int:
        """Return how many bytes the index grows by at most, its log included, when rows are added."""
        return rows * ROW_SIZE + min(rows * PAGES_PER_ROW, self._used_pages) * PAGE_SIZE

    # Whether the index can be used.

    @property
    def is_damaged(self) -> bool:
        """Whether damage was found since the start."""
        return bool(self._damage)

    async def check_usable(self) -> None:
        """Raise `StorageError`, with what helps, if the index is damaged or cannot be read or written."""
        if self._damage:
            raise StorageError(self._damage)
        self._read_rows("SELECT min(used) FROM blobs WHERE NOT pinned", (), bool)
        await self._write(index_writes.check_writable)

    async def check_integrity(self, executor: Executor) -> None:
        """Read the whole index in a thread, and note damage. It takes 0.1 s for 100,000 blobs."""
        try:
            reader = self._connect_reader()
        except sqlite3.Error:
            return  # `check_usable` reports it
        with closing(reader):
            checking = asyncio.get_running_loop().run_in_executor(executor, _quick_check, reader)
            if problem := await run_uncancelled(checking, on_cancel=reader.interrupt):
                self._note_damage(problem)

    def _note_damage(self, reason: str) -> None:
        if not self._damage:
            self._damage = f"the index {self.path} is damaged ({reason}): stop the daemon and run pullcache fsck"
            log.error(
                "index_damaged",
                file=str(self.path),
                reason=reason,
                help="stop the daemon and run pullcache fsck",
            )

    def _to_storage_error(self, participle: str, error: Exception) -> StorageError:
        """Return the error to raise when a read or write has failed; note damage."""
        if _has_code(error, _LOCK_CODES):
            return _locked_error(self.path, participle)
        if not isinstance(error, sqlite3.Error) or _has_code(error, _DAMAGE_CODES):
            self._note_damage(str(error))
        return StorageError(f"the index cannot be {participle}: {error}")

    async def _write(
        self,
        work: Callable[..., R],
        *args: Any,
        is_durable: bool = False,
        waits_for_lock: bool = False,
        keeps_rows: bool = False,
        on_commit: Callable[[], None] | None = None,
    ) -> R:
        """Run `work` in one transaction and return its result; roll back and raise `StorageError` if it fails.

        `on_commit` is called in the event loop after the commit, also if the caller was cancelled.
        With `waits_for_lock`, it waits while another process has locked the index; other writes go
        ahead in between.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + LOCK_TIMEOUT

        def run() -> R:
            result, totals = self._run_transaction(is_durable, work, args, keeps_rows=keeps_rows)
            loop.call_soon_threadsafe(self._publish, totals, on_commit)
            return result

        while True:
            try:
                return await loop.run_in_executor(self._executor, run)
            except _WRITE_ERRORS as error:
                is_locked = waits_for_lock and _has_code(error, _LOCK_CODES)
                if not (is_locked and loop.time() < give_up_at):
                    raise self._to_storage_error("written", error) from error
            await asyncio.sleep(LOCK_POLL_INTERVAL)

    def _publish(self, totals: StoreTotals, on_commit: Callable[[], None] | None) -> None:
        self.totals = totals
        if on_commit:
            on_commit()

    def _run_transaction(
        self,
        is_durable: bool,
        work: Callable[..., R],
        args: tuple[Any, ...],
        *,
        keeps_rows: bool = False,
    ) -> tuple[R, StoreTotals]:
        # With NORMAL a power cut may lose the last transactions: times of use, links, manifests.
        self._writer.execute(f"PRAGMA synchronous = {'FULL' if is_durable else 'NORMAL'}")
        try:
            with self._writer:
                result = work(self._writer, *args)
                totals = StoreTotals(*index_writes.tracked_totals(self._writer))
        finally:
            # Replaced after the commit, not cleared: a read that began before it fills the old cache.
            if not keeps_rows:
                self._row_cache = {}
        self._count_pages()
        return result, totals

    def _count_pages(self) -> None:
        """Count the pages of the index, give back some of the free ones if there are many, shorten the log.

        On a full disk that fails. Free pages are not counted, so it may be done later.
        """
        with suppress(sqlite3.Error):
            self._used_pages, free = index_size.count_pages(self._writer)
            if free > _SPARE_PAGES:
                released = min(free - _SPARE_PAGES, _MAX_RELEASED_PAGES)
                index_size.release_pages(self._writer, released)
            if self._file_size("-wal") > index_writes.MAX_LOG_SIZE:
                index_size.truncate_log(self._writer)

    def _cached_row(
        self,
        query: str,
        build: Callable[[tuple[Any, ...]], R],
        *names: Repository | Digest | str,
    ) -> R | None:
        """Return `build(row)`, or None without a row; cached until the next write.

        SQLite takes 30 µs for a row, several times as much as everything else in serving a manifest.
        """
        rows, key = self._row_cache, (query, names)
        found: R | None = rows.get(key, _NOT_CACHED)
        if found is not _NOT_CACHED:
            return found
        parameters: list[str] = []
        for name in names:
            if isinstance(name, Repository):
                parameters += (name.upstream, name.name)
            else:
                parameters.append(str(name))
        try:
            row = self._reader.execute(query, parameters).fetchone()
            found = None if row is None else build(row)
        except _READ_ERRORS as error:
            self._to_storage_error("read", error)
            return None
        if len(rows) >= _MAX_CACHED_ROWS:
            rows.clear()
        rows[key] = found
        return found

    def _read_rows(
        self, query: str, parameters: tuple[object, ...], build: Callable[[tuple[Any, ...]], R]
    ) -> list[R]:
        """Return `build(row)` of each row. Raises `StorageError`."""
        try:
            return [build(row) for row in self._reader.execute(query, parameters)]
        except _READ_ERRORS as error:
            raise self._to_storage_error("read", error) from error

    def _next_use_time(self) -> float:
        # Strictly increasing, so that setting the clock does not change the order of uses.
        self._last_use = max(self._clock(), self._last_use + 1e-6)
        return self._last_use


def _locked_error(path: Path, participle: str) -> StorageError:
    return StorageError(
        f"the index cannot be {participle}: another process has locked it; find it with fuser {path}"
    )


def _has_code(error: Exception, codes: Collection[int]) -> bool:
    """Tell whether SQLite has raised the error with one of these codes."""
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in codes  # the rest is an extended code


def _quick_check(connection: sqlite3.Connection) -> str:
    """Return the first damage that SQLite finds in the index; empty if there is none. Blocks."""
    try:
        row = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        return str(error) if _has_code(error, _DAMAGE_CODES) else ""
    return "" if row[0] == "ok" else str(row[0]).splitlines()[-1]
