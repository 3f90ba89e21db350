"""The index: the blobs of the store, the repositories linked to them, and the times of their last use.

Reads in the event loop look up single rows on a read-only connection, and are cached until the next
write. Writes run one after another in a thread, each in one transaction. Uses are collected in memory
and written every few seconds, so that a hit writes nothing.
"""

import asyncio
import json
import sqlite3
from collections.abc import Callable, Collection, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from proxy.concurrency import start_threads
from proxy.errors import StorageError
from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest
from proxy.oci.reference import Reference, Repository, Tag
from proxy.storage import queries
from proxy.storage.image_queries import delete_images

R = TypeVar("R")

_MAX_CACHED_ROWS = 10_000
# Indexes of one manifest that are looked at.
_MAX_PARENTS = 64

_REPOSITORY_ID_SQL = "(SELECT id FROM repositories WHERE upstream = ? AND name = ?)"


@dataclass(frozen=True, slots=True)
class BlobRow:
    """A committed blob. `media_type` is None unless the blob is a manifest."""

    size: int
    media_type: str | None
    is_linked: bool


@dataclass(frozen=True, slots=True)
class TagRow:
    """The digest of a tag, as upstream stated it at Unix time `checked_at`."""

    digest: Digest
    checked_at: float


class StoreTotals(NamedTuple):
    """The number of blobs in the index, and the bytes that they take on disk."""

    blobs: int
    bytes: int


class Index:
    """The index of one store. `close` writes the uses that are still in memory.

    `totals` are those of the last transaction. They change in the event loop, in the same step that calls
    the write's `on_commit`, so that readers in the loop see both changes or neither.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self.path = path
        self._clock = clock
        self._pending_uses: dict[str, float] = {}
        self._row_cache: dict[tuple[object, ...], Any] = {}
        try:
            self._writer = queries.open_connection(path)
            self.totals = StoreTotals(*queries.track_totals(self._writer))
            self._reader = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=ro",
                uri=True,
                timeout=0,
                check_same_thread=False,
                isolation_level=None,
            )
            query = (
                "SELECT max(coalesce((SELECT max(used) FROM blobs WHERE pinned), 0),"
                " coalesce((SELECT max(used) FROM blobs WHERE NOT pinned), 0))"
            )
            self._last_use: float = self._reader.execute(query).fetchone()[0]
        except sqlite3.DatabaseError as error:
            raise StorageError(
                f"the index {path} cannot be read ({error}); rebuild it with pullcache fsck"
            ) from error
        self._executor = start_threads(1, "index")

    def close(self) -> None:
        """Write the uses that are still in memory and close the index. Blocks."""
        self._executor.shutdown()
        with suppress(sqlite3.Error):
            self._run_transaction(False, queries.record_uses, (self._pending_uses,))
        self._reader.close()
        self._writer.close()

    # Reads, in the loop.

    def blob(self, repository: Repository, digest: Digest) -> BlobRow | None:
        """Return a committed blob, and whether the repository is linked to it; None if it is not stored."""
        return self._cached_row(
            ("blob", repository, digest),
            "SELECT size, media_type, EXISTS (SELECT 1 FROM links l"
            f" WHERE l.repository = {_REPOSITORY_ID_SQL} AND l.digest = b.digest) FROM blobs b WHERE digest = ?",
            (repository.upstream, repository.name, str(digest)),
            lambda row: BlobRow(row[0], row[1], bool(row[2])),
        )

    def manifest(self, digest: Digest) -> BlobRow | None:
        """Return a committed manifest. The caller checks access."""
        return self._cached_row(
            ("manifest", digest),
            "SELECT size, media_type FROM blobs WHERE digest = ? AND media_type IS NOT NULL",
            (str(digest),),
            lambda row: BlobRow(row[0], row[1], is_linked=False),
        )

    def blob_size(self, digest: Digest) -> int | None:
        """Return the size of a committed blob. The caller checks access."""
        return self._cached_row(
            ("stored", digest),
            "SELECT size FROM blobs WHERE digest = ?",
            (str(digest),),
            lambda row: int(row[0]),
        )

    def is_linked(self, repository: Repository, digest: Digest) -> bool:
        """Tell whether the repository is known to have the digest, stored here or not."""
        found = self._cached_row(
            ("link", repository, digest),
            f"SELECT 1 FROM links WHERE repository = {_REPOSITORY_ID_SQL} AND digest = ?",
            (repository.upstream, repository.name, str(digest)),
            bool,
        )
        return found is not None

    def declared_size(self, repository: Repository, digest: Digest) -> int | None:
        """Return the size that a stored manifest of this repository states for the digest.

        Manifests of other repositories are not trusted: they may state any size.
        """
        return self._cached_row(
            ("size", repository, digest),
            "SELECT e.size FROM edges e JOIN links l ON l.digest = e.parent"
            f" WHERE e.child = ? AND l.repository = {_REPOSITORY_ID_SQL} LIMIT 1",
            (str(digest), repository.upstream, repository.name),
            lambda row: int(row[0]),
        )

    def children(self, parent: Digest) -> list[Digest]:
        """Return the digests that a stored manifest names, in no particular order."""
        rows = self._reader.execute("SELECT child FROM edges WHERE parent = ?", (str(parent),))
        return [Digest.parse(row[0]) for row in rows]

    def parents(self, repository: Repository, child: Digest) -> list[Digest]:
        """Return the stored manifests of the repository that name the digest."""
        rows = self._reader.execute(
            "SELECT parent FROM edges e WHERE child = ? AND EXISTS (SELECT 1 FROM links l"
            f" WHERE l.repository = {_REPOSITORY_ID_SQL} AND l.digest = e.parent) LIMIT ?",
            (str(child), repository.upstream, repository.name, _MAX_PARENTS),
        )
        return [Digest.parse(row[0]) for row in rows]

    def tag(self, repository: Repository, tag: Tag) -> TagRow | None:
        """Return the last known digest of a tag, or None."""
        return self._cached_row(
            ("tag", repository, tag),
            f"SELECT digest, checked FROM tags WHERE repository = {_REPOSITORY_ID_SQL} AND tag = ?",
            (repository.upstream, repository.name, tag),
            lambda row: TagRow(Digest.parse(row[0]), row[1]),
        )

    def tags(self, repository: Repository) -> list[str]:
        """Return the cached tags of the repository."""
        query = f"SELECT tag FROM tags WHERE repository = {_REPOSITORY_ID_SQL}"
        rows = self._reader.execute(query, (repository.upstream, repository.name))
        return [row[0] for row in rows]

    def repositories(self) -> list[Repository]:
        """Return the repositories that have a manifest in the store."""
        rows = self._reader.execute(
            "SELECT upstream, name FROM repositories r WHERE EXISTS (SELECT 1 FROM links l"
            " JOIN blobs b USING (digest) WHERE l.repository = r.id AND b.media_type IS NOT NULL)"
        )
        return [Repository(*row) for row in rows]

    def referrers(self, repository: Repository, subject: Digest) -> list[tuple[Digest, BlobRow]]:
        """Return the stored manifests of the repository whose subject is `subject`."""
        rows = self._reader.execute(
            "SELECT digest, size, media_type FROM blobs b WHERE subject = ? AND EXISTS"
            f" (SELECT 1 FROM links l WHERE l.repository = {_REPOSITORY_ID_SQL} AND l.digest = b.digest)",
            (str(subject), repository.upstream, repository.name),
        )
        return [(Digest.parse(row[0]), BlobRow(row[1], row[2], is_linked=True)) for row in rows]

    def oldest_use(self) -> float:
        """Return the last use of the blob to be evicted next, in Unix time; 0 if there is none."""
        query = "SELECT coalesce(min(used), 0) FROM blobs WHERE NOT pinned"
        used: float = self._reader.execute(query).fetchone()[0]
        return used

    def pinned_bytes(self) -> int:
        """Return the allocated bytes of pinned blobs."""
        # 60,000 pinned blobs take 4 ms.
        query = f"SELECT {queries.ALLOCATED_SIZE_SUM} FROM blobs WHERE pinned"
        return self._cached_row(("pinned",), query, (), lambda row: int(row[0])) or 0

    def is_pinned(self, digest: Digest) -> bool:
        """Tell whether the blob is pinned."""
        query = "SELECT 1 FROM blobs WHERE digest = ? AND pinned"
        return self._reader.execute(query, (str(digest),)).fetchone() is not None

    def blobs_after(self, digest: str, count: int) -> list[tuple[Digest, int]]:
        """Return digests and sizes of up to `count` blobs that follow `digest` in the index."""
        query = "SELECT digest, size FROM blobs WHERE digest > ? ORDER BY digest LIMIT ?"
        rows = self._reader.execute(query, (digest, count)).fetchall()
        return [(Digest.parse(row[0]), row[1]) for row in rows]

    def unknown_blobs(self, digests: Collection[Digest]) -> list[Digest]:
        """Return those of the digests that are not in the index."""
        query = "SELECT value FROM json_each(?) WHERE value NOT IN (SELECT digest FROM blobs)"
        rows = self._reader.execute(query, (json.dumps([*map(str, digests)]),)).fetchall()
        return [Digest.parse(row[0]) for row in rows]

    def lookup(
        self,
        key: tuple[object, ...],
        query: str,
        parameters: tuple[str, ...],
        build: Callable[[tuple[Any, ...]], R],
    ) -> R | None:
        """Return `build(row)` for the row of a query, None without one; cached until the next write.

        The caller chooses a `key` that no other query has.
        """
        return self._cached_row(key, query, parameters, build)

    def select(self, query: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Return all rows of a query that reads few of them."""
        return self._reader.execute(query, parameters).fetchall()

    def touch(self, digest: Digest) -> None:
        """Record a use of a blob; a use of a manifest counts for everything below it."""
        self._pending_uses[str(digest)] = self._next_use_time()

    # Writes, in the thread.

    async def flush(self) -> None:
        """Write the uses recorded since the last flush. Raises `StorageError` and keeps them."""
        uses, self._pending_uses = self._pending_uses, {}
        try:
            if uses:
                await self._write(queries.record_uses, uses)
        except StorageError:
            self._pending_uses = uses | self._pending_uses
            raise

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
            queries.add_blob,
            repository,
            digest,
            size,
            self._next_use_time(),
            is_durable=True,
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
        """Add a committed manifest and link the repository to every digest it names.

        Return whether it is new.
        """
        return await self._write(
            queries.add_manifest,
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
        """Add the committed manifests of an image with their links, and its tag as checked now.

        All rows are added, or none. Survives a power cut.
        """
        await self._write(
            queries.add_image,
            repository,
            tag and (tag, digest, self._clock()),
            [(*manifest, self._next_use_time()) for manifest in manifests],
            is_durable=True,
        )

    async def add_unlinked_blobs(
        self,
        files: Sequence[tuple[Digest, int, Manifest | None]],
        *,
        on_commit: Callable[[], None] | None = None,
    ) -> None:
        """Add blobs whose files were found, without links. Survives a power cut."""
        await self._write(
            queries.add_unlinked_blobs,
            files,
            self._next_use_time(),
            is_durable=True,
            on_commit=on_commit,
        )

    async def link(self, repository: Repository, digest: Digest) -> None:
        """Link the repository to a digest that it is known to have."""
        await self._write(queries.add_links, repository, [digest])

    async def set_tag(
        self, repository: Repository, tag: Tag, digest: Digest, *, stated: Digest | None = None
    ) -> None:
        """Set the digest that upstream states for a tag now; a new digest survives a power cut.

        `stated` is what upstream states if `digest` stands in for it.
        """
        known = self.tag(repository, tag)
        is_new = known is None or known.digest != digest
        await self._write(
            queries.set_tag, repository, tag, digest, self._clock(), stated, is_durable=is_new
        )

    async def move_tag(self, repository: Repository, tag: Tag, digest: Digest) -> None:
        """Set the digest of a known tag, without upstream having been asked. Survives a power cut."""
        await self._write(queries.move_tag, repository, tag, digest, is_durable=True)

    async def delete_tag(self, repository: Repository, tag: Tag) -> None:
        """Delete a tag; its content stays."""
        await self._write(queries.delete_tag, repository, tag)

    async def pin(self, images: Sequence[tuple[Repository, Reference]]) -> None:
        """Pin images, whether they are in the store or not. Survives a power cut."""
        await self._write(queries.pin, images, is_durable=True)

    async def unpin(
        self, images: Sequence[tuple[Repository, Reference]]
    ) -> list[tuple[Repository, Reference]]:
        """Unpin images; return the ones that were pinned."""
        return await self._write(queries.unpin, images, is_durable=True)

    async def delete_images(
        self, images: Sequence[tuple[Repository, Reference]], leased: Collection[Digest] = ()
    ) -> list[tuple[Digest, int]]:
        """Delete images with their tags and pins; return, with sizes, the blobs that no other image has.

        The blobs stay for `remove_blobs`. Raises `BusyError`, without changes, if a blob is leased.
        """
        return await self._write(delete_images, images, leased, is_durable=True)

    async def unlinked_blobs(self, digests: Sequence[Digest]) -> list[tuple[Digest, int]]:
        """Return, with sizes, the blobs that are neither linked to a repository nor pinned."""
        return await self._write(queries.unlinked_blobs, digests)

    async def unpinned_bytes(self, digests: Collection[Digest]) -> int:
        """Return the allocated bytes of the blobs that are stored and not pinned."""
        return await self._write(queries.unpinned_bytes, digests)

    async def least_recently_used(
        self, count: int, excluded: Collection[Digest] = ()
    ) -> list[tuple[Digest, int, float]]:
        """Return digest, size and time of use of up to `count` blobs, least recently used first.

        Pinned and excluded blobs are left out.
        """
        # A full disk makes the flush fail, and needs evictions all the same.
        with suppress(StorageError):
            await self.flush()
        spared = self._pending_uses.keys() | set(map(str, excluded))
        query = "SELECT digest, size, used FROM blobs WHERE NOT pinned ORDER BY used"
        with closing(self._reader.execute(query)) as rows:
            oldest = (row for row in rows if row[0] not in spared)
            return [(Digest.parse(row[0]), row[1], row[2]) for row in islice(oldest, count)]

    async def remove_blobs(
        self,
        digests: Sequence[Digest],
        delete_file: Callable[[Digest], None],
        *,
        on_commit: Callable[[], None] | None = None,
    ) -> list[tuple[Digest, int]]:
        """Call `delete_file` for each blob, then delete its row; return the rows, with sizes.

        Files go first, because a full disk accepts no writes until a file is deleted.
        """
        return await self._write(queries.remove_blobs, digests, delete_file, on_commit=on_commit)

    async def transact(self, work: Callable[..., R], *args: Any, is_durable: bool = False) -> R:
        """Run `work` with a connection and `args` in a transaction of its own.

        With `is_durable` it survives a power cut. Raises `StorageError`, with nothing changed.
        """
        return await self._write(work, *args, is_durable=is_durable)

    async def recount(self) -> tuple[int, int]:
        """Recount the blobs and correct `totals`; return the corrections, in blobs and bytes."""
        return await self._write(queries.recount_totals)

    def bytes_on_disk(self) -> int:
        """Return the size of the index itself, its log included."""
        total = 0
        for suffix in ("", "-wal", "-shm"):
            with suppress(OSError):
                total += Path(f"{self.path}{suffix}").stat().st_size
        return total

    async def _write(
        self,
        work: Callable[..., R],
        *args: Any,
        is_durable: bool = False,
        on_commit: Callable[[], None] | None = None,
    ) -> R:
        """Run `work` in one transaction and return its result; roll back and raise `StorageError` if it fails.

        `on_commit` is called in the event loop after the commit, also if the caller was cancelled.
        """
        loop = asyncio.get_running_loop()

        def run() -> R:
            result, totals = self._run_transaction(is_durable, work, args)
            loop.call_soon_threadsafe(self._publish, totals, on_commit)
            return result

        try:
            return await loop.run_in_executor(self._executor, run)
        except sqlite3.Error as error:
            raise StorageError(f"the index cannot be written: {error}") from error

    def _publish(self, totals: StoreTotals, on_commit: Callable[[], None] | None) -> None:
        self.totals = totals
        if on_commit:
            on_commit()

    def _run_transaction(
        self, is_durable: bool, work: Callable[..., R], args: tuple[Any, ...]
    ) -> tuple[R, StoreTotals]:
        # With NORMAL a power cut may lose the last transactions: times of use, links, manifests.
        self._writer.execute(f"PRAGMA synchronous = {'FULL' if is_durable else 'NORMAL'}")
        try:
            with self._writer:
                result = work(self._writer, *args)
                return result, StoreTotals(*queries.tracked_totals(self._writer))
        finally:
            # Replaced after the commit, not cleared: a read that began before it fills the old cache.
            # Times of use are not cached.
            if work is not queries.record_uses:
                self._row_cache = {}

    def _cached_row(
        self,
        key: tuple[object, ...],
        query: str,
        parameters: tuple[str, ...],
        build: Callable[[tuple[Any, ...]], R],
    ) -> R | None:
        """Return `build(row)`, or None without a row; cached until the next write.

        SQLite takes 30 µs for a row, as much as everything else in serving a manifest.
        """
        rows = self._row_cache
        if key not in rows:
            if len(rows) >= _MAX_CACHED_ROWS:
                rows.clear()
            row = self._reader.execute(query, parameters).fetchone()
            rows[key] = None if row is None else build(row)
        found: R | None = rows[key]
        return found

    def _next_use_time(self) -> float:
        # Strictly ascending: setting the clock must not change the order of uses.
        self._last_use = max(self._clock(), self._last_use + 1e-6)
        return self._last_use
