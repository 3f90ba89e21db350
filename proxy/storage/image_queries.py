"""Queries for the images in the store and for the bytes that removing one frees.

They read much of the index, so they have a connection of their own. An image is a root (schema.sql): a
tag, a pin, or a manifest that was pulled by digest. It consists of the blobs that it reaches (pins.py);
removing it removes the ones that no other root reaches.
"""

import json
import re
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from proxy.errors import BusyError, StorageError
from proxy.names import full_name
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository, Tag, parse_reference
from proxy.oci.referrers import ReferrerRecord
from proxy.policy.facts import RepositoryFacts
from proxy.storage import pins, usage_queries
from proxy.storage.index_size import delete_empty_repositories
from proxy.storage.records.policy_rows import (
    EXCEPTION_SQL,
    FACTS_SQL,
    MEANING_SQL,
    MEANINGS_SQL,
    TagMeaning,
    combine_meanings,
    to_facts,
    to_meaning,
)
from proxy.storage.usage_queries import OldBlob, Usage


@dataclass(frozen=True, slots=True)
class ImageRow:
    """An image. `digest` is None for a pinned tag that was never pulled."""

    repository: Repository
    reference: Reference
    digest: Digest | None
    is_pinned: bool


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A stored blob. `used_at` is Unix time."""

    digest: Digest
    size: int
    media_type: str | None
    used_at: float


@dataclass(frozen=True, slots=True)
class RemovalPlan:
    """The rows to remove with images: blobs with sizes, tags and pins, and links of their repositories."""

    blobs: list[tuple[Digest, int]]
    references: Collection[tuple[int, str]]
    links: Collection[tuple[int, str]]


# Repositories, and images of one repository, that one query reads.
_PAGE_SIZE = 500
# Comes after all tags and digests.
_LAST_REFERENCE = "\x7f"

# Wildcards and classes of globs, and what separates a name from its reference.
_NO_LITERAL = re.compile(r"\[!?\]?[^\]]*\]|[*?:@]")
_DIGEST_CHARACTERS = frozenset("sha256sha512:0123456789abcdef")

# The images of a repository in the order of their references: tags, pins, manifests without a tag.
_IMAGES_SQL = """
    SELECT e.reference, e.digest, p.reference IS NOT NULL FROM (
        SELECT * FROM (
            SELECT reference, digest FROM tagged
            WHERE repository = :repository AND reference > :after ORDER BY reference LIMIT :count)
        UNION
        SELECT * FROM (
            SELECT reference, digest FROM pins
            WHERE repository = :repository AND reference > :after ORDER BY reference LIMIT :count)
        UNION
        SELECT * FROM (
            SELECT u.digest, u.digest FROM links l
            CROSS JOIN untagged u ON u.digest = l.digest AND u.repository = l.repository
            WHERE l.repository = :repository AND l.digest > :after ORDER BY l.digest LIMIT :count)
    ) e LEFT JOIN pins p ON p.repository = :repository AND p.reference = e.reference
    ORDER BY e.reference LIMIT :count
"""

# A row of `roots`: repository id, reference, digest, and whether it is pinned.
_RootRow = tuple[int, str, str, bool]


@contextmanager
def open_image_queries(path: Path) -> Iterator["ImageQueries"]:
    """Yield queries of the index at `path`. They block; use them in one thread at a time.

    Raises `StorageError`.
    """
    uri = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with closing(
            sqlite3.connect(uri, uri=True, timeout=5, check_same_thread=False)
        ) as connection:
            connection.execute("PRAGMA cache_size = -16384")
            connection.execute("PRAGMA temp.cache_size = -16384")
            yield ImageQueries(connection)
    except sqlite3.Error as error:
        raise StorageError(f"the index cannot be read: {error}") from error


def delete_images(
    connection: sqlite3.Connection,
    images: Collection[tuple[Repository, Reference]],
    leased: Collection[Digest] = (),
) -> list[tuple[Digest, int]]:
    """Delete images with tags, pins and links; return, with sizes, the blobs that no other image has.

    Raises `BusyError` if one of these is leased.
    """
    removal = ImageQueries(connection).plan_removal(images)
    if any(digest in leased for digest, _ in removal.blobs):
        raise BusyError("a preload, export or import is using it; remove it when that has finished")
    connection.executemany("DELETE FROM tags WHERE repository = ? AND tag = ?", removal.references)
    connection.executemany(
        "DELETE FROM pins WHERE repository = ? AND reference = ?", removal.references
    )
    # Tags that were no images because of their subject do not become images without it.
    connection.executemany(
        "DELETE FROM tags WHERE repository = ? AND subject = ? AND subject <> digest AND EXISTS"
        " (SELECT 1 FROM links s JOIN blobs USING (digest)"
        " WHERE s.digest = tags.subject AND s.repository = tags.repository)",
        removal.links,
    )
    connection.executemany(
        "DELETE FROM referrer_records WHERE repository = ? AND subject = ?", removal.links
    )
    connection.executemany("DELETE FROM links WHERE repository = ? AND digest = ?", removal.links)
    numbers = {number for number, _ in (*removal.references, *removal.links)}
    delete_empty_repositories(connection, numbers)
    pins.recompute(connection)
    return removal.blobs


class ImageQueries:
    """Queries on a connection, which may be the one that writes the index."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._has_sizes = False
        self._days: list[str] | None = None

    def images(
        self, pattern: str = "", after: tuple[Repository, Reference] | None = None
    ) -> Iterator[ImageRow]:
        """Yield images by upstream, name and reference, those that follow `after`.

        They include all whose name or reference contains the longest literal part of the glob or text
        `pattern`; the caller checks the rest of it.
        """
        candidates = ""
        if literal := _longest_literal(pattern):
            self._select_candidates(literal)
            candidates = "AND id IN (SELECT id FROM temp.candidates)"
        upstream, name, reference = "", "", ""
        if after:
            upstream, name, reference = after[0].upstream, after[0].name, str(after[1])
        while True:
            # A page at a time: a query that stays open would keep SQLite from shortening its log.
            repositories = self._connection.execute(
                "SELECT id, upstream, name FROM repositories WHERE (upstream, name) >= (?, ?)"
                f" {candidates} ORDER BY upstream, name LIMIT ?",
                (upstream, name, _PAGE_SIZE),
            ).fetchall()
            for number, *names in repositories:
                if names != [upstream, name]:
                    (upstream, name), reference = names, ""
                yield from self._images_of(number, Repository(upstream, name), reference)
            if len(repositories) < _PAGE_SIZE:
                return
            # No reference follows this one, so the next page begins with the next repository.
            reference = _LAST_REFERENCE

    def _images_of(
        self, repository_id: int, repository: Repository, after: str
    ) -> Iterator[ImageRow]:
        """Yield the images of a repository whose references follow `after`."""
        while True:
            rows = self._connection.execute(
                _IMAGES_SQL, {"repository": repository_id, "after": after, "count": _PAGE_SIZE}
            ).fetchall()
            for text, digest, is_pinned in rows:
                found = Digest.parse(digest) if digest else None
                yield ImageRow(repository, parse_reference(text), found, bool(is_pinned))
            if len(rows) < _PAGE_SIZE:
                return
            after = rows[-1][0]

    def _select_candidates(self, literal: str) -> None:
        """Put the ids of the repositories that have `literal` in their name or in a reference into a table."""
        self._connection.execute("DROP TABLE IF EXISTS temp.candidates")
        self._connection.execute("CREATE TEMP TABLE candidates (id INTEGER PRIMARY KEY)")
        sources = [
            "SELECT id FROM repositories WHERE instr(upstream || '/' || name, :literal)",
            "SELECT repository FROM tags WHERE instr(tag, :literal)",
            "SELECT repository FROM pins WHERE instr(reference, :literal)",
        ]
        if set(literal) <= _DIGEST_CHARACTERS:
            sources.append(
                "SELECT l.repository FROM blobs b CROSS JOIN links l ON l.digest = b.digest"
                " WHERE b.media_type IS NOT NULL AND instr(b.digest, :literal)"
            )
        query = f"INSERT INTO temp.candidates {' UNION '.join(sources)}"
        self._connection.execute(query, {"literal": literal})

    def facts(self, repository: Repository) -> RepositoryFacts | None:
        """Return the facts that were last said about a repository."""
        row = self._connection.execute(FACTS_SQL, (repository.upstream, repository.name)).fetchone()
        return to_facts(row) if row else None

    def meanings(self, repository: Repository, tag: Tag) -> list[TagMeaning]:
        """Return what a tag meant, the most recent first."""
        parameters = (repository.upstream, repository.name, tag)
        return [to_meaning(row) for row in self._connection.execute(MEANINGS_SQL, parameters)]

    def meaning(self, repository: Repository, digest: Digest) -> TagMeaning | None:
        """Return since when the repository is known to hold the digest."""
        parameters = (repository.upstream, repository.name, str(digest))
        rows = self._connection.execute(MEANING_SQL, parameters)
        return combine_meanings(map(to_meaning, rows))

    def exception_end(self, repository: Repository, digest: Digest, now: float) -> float | None:
        """Return until when policies allow the image whatever their rules say; None if they do not."""
        parameters = (repository.upstream, repository.name, str(digest))
        row = self._connection.execute(EXCEPTION_SQL, parameters).fetchone()
        return float(row[1]) if row and row[1] > now else None

    def compute_sizes(self) -> None:
        """Compute what `image_sizes` returns for all images at once.

        SQLite uses a temporary file for this, not memory.
        """
        self._connection.execute(
            "CREATE TEMP TABLE top AS SELECT digest, count(*) AS images FROM"
            " (SELECT DISTINCT repository, reference, digest FROM roots) GROUP BY digest"
        )
        self._connection.execute(
            "CREATE TEMP TABLE sizes AS WITH RECURSIVE held (root, digest) AS (SELECT rowid, digest FROM top"
            " UNION SELECT h.root, e.child FROM edges e JOIN held h ON e.parent = h.digest"
            " UNION SELECT h.root, b.digest FROM blobs b JOIN held h ON b.subject = h.digest"
            " UNION SELECT h.root, t.digest FROM tags t JOIN held h ON t.subject = h.digest),"
            " shared AS (SELECT h.root, b.size, count(*) OVER (PARTITION BY h.digest) AS roots"
            " FROM held h JOIN blobs b USING (digest))"
            " SELECT top.digest, sum(s.size) AS size,"
            " coalesce(sum(s.size) FILTER (WHERE s.roots = 1 AND top.images = 1), 0) AS own"
            " FROM shared s JOIN top ON top.rowid = s.root GROUP BY s.root"
        )
        self._connection.execute("DROP TABLE temp.top")
        self._connection.execute("CREATE UNIQUE INDEX temp.sizes_by_digest ON sizes (digest)")
        self._has_sizes = True

    def usage_by_upstream(self) -> list[Usage]:
        """Return the usage of each upstream, the largest first."""
        return usage_queries.usage_by_upstream(self._connection)

    def usage_by_repository(self, limit: int = -1) -> list[Usage]:
        """Return the usage of each repository, the largest first; at most `limit`, unless it is negative."""
        return usage_queries.usage_by_repository(self._connection, limit)

    def oldest_blobs(self, count: int) -> list[OldBlob]:
        """Return the blobs that eviction takes first."""
        return usage_queries.oldest_blobs(self._connection, count)

    def blob(self, repository: Repository, digest: Digest) -> StoredBlob | None:
        """Return a stored blob that the repository is linked to."""
        row = self._connection.execute(
            "SELECT b.size, b.media_type, b.used FROM blobs b JOIN links l USING (digest)"
            " JOIN repositories r ON r.id = l.repository"
            " WHERE b.digest = ? AND r.upstream = ? AND r.name = ?",
            (str(digest), repository.upstream, repository.name),
        ).fetchone()
        return StoredBlob(digest, *row) if row else None

    def tag_digest(self, repository: Repository, tag: Tag) -> Digest | None:
        """Return the digest of a tag."""
        row = self._connection.execute(
            "SELECT t.digest FROM tags t JOIN repositories r ON r.id = t.repository"
            " WHERE r.upstream = ? AND r.name = ? AND t.tag = ?",
            (repository.upstream, repository.name, tag),
        ).fetchone()
        return Digest.parse(row[0]) if row else None

    def find_images(self, repository: Repository, reference: Reference) -> list[ImageRow]:
        """Return the image of a tag, or all images of the repository with a digest."""
        return [
            ImageRow(repository, parse_reference(text), Digest.parse(digest), bool(is_pinned))
            for _, text, digest, is_pinned in self._root_rows(repository, reference)
        ]

    def pulled_at(
        self, repository: Repository, reference: Reference, digest: Digest | None
    ) -> float | None:
        """Return when a client last pulled an image, by its tag or its digest; None if never."""
        names = [full_name(repository, one) for one in (reference, digest) if one]
        query = "SELECT max(at) FROM pulls WHERE name IN (?, ?)"
        row: tuple[float | None] = self._connection.execute(query, (names[0], names[-1])).fetchone()
        return row[0]

    def pull_count(self, repository: Repository, reference: Reference) -> int:
        """Return how often clients have pulled an image, in the days that are kept."""
        if self._days is None:
            days = self._connection.execute(
                "WITH RECURSIVE days (day) AS ("
                "SELECT min(day) FROM traffic WHERE scope = 'image' UNION ALL SELECT"
                " (SELECT min(day) FROM traffic WHERE scope = 'image' AND day > days.day) FROM days"
                " WHERE day IS NOT NULL) SELECT day FROM days WHERE day IS NOT NULL"
            )
            self._days = [day for (day,) in days]
        query = (
            "SELECT coalesce(sum(hits + partials + misses), 0) FROM json_each(?) d"
            " CROSS JOIN traffic t ON t.scope = 'image' AND t.day = d.value AND t.name = ?"
        )
        values = (json.dumps(self._days), full_name(repository, reference))
        row: tuple[int] = self._connection.execute(query, values).fetchone()
        return row[0]

    def pinned_absent(self, repository: Repository, reference: Reference) -> bool:
        """Tell whether a tag is pinned that was never pulled."""
        row = self._connection.execute(
            "SELECT 1 FROM pins p JOIN repositories r ON r.id = p.repository"
            " WHERE r.upstream = ? AND r.name = ? AND p.reference = ? AND p.digest IS NULL",
            (repository.upstream, repository.name, str(reference)),
        )
        return row.fetchone() is not None

    def image_sizes(self, image: ImageRow) -> tuple[int, int]:
        """Return the size of an image and the part that only it has, in bytes."""
        digest = str(image.digest)
        if self._has_sizes:
            query = "SELECT size, own FROM temp.sizes WHERE digest = ?"
            if row := self._connection.execute(query, (digest,)).fetchone():
                return row[0], row[1]
        is_held = self._make_holder_check(
            (number, reference)
            for number, reference, _, _ in self._root_rows(image.repository, image.reference)
            if reference == str(image.reference)
        )
        size = own = 0
        for held in self._reachable(digest):
            if (one := self._blob_size(held)) is not None:
                size += one
                own += 0 if is_held(held) else one
        return size, own

    def stored_sizes(
        self, digests: Iterable[Digest], repository: Repository | None = None
    ) -> dict[Digest, int]:
        """Return the sizes of those blobs that are stored and, if given, linked to the repository."""
        wanted = {str(digest): digest for digest in digests}
        query = "SELECT digest, size FROM json_each(?) JOIN blobs b ON digest = value"
        values = [json.dumps([*wanted])]
        if repository:
            query += (
                " WHERE EXISTS (SELECT 1 FROM links l JOIN repositories r ON r.id = l.repository"
                " WHERE l.digest = b.digest AND r.upstream = ? AND r.name = ?)"
            )
            values += [repository.upstream, repository.name]
        return {wanted[text]: size for text, size in self._connection.execute(query, values)}

    def referrers(self, repository: Repository, subject: Digest) -> list[StoredBlob]:
        """Return the manifests of the repository whose subject is `subject`."""
        rows = self._connection.execute(
            "SELECT b.digest, b.size, b.media_type, b.used FROM blobs b JOIN links l USING (digest)"
            " JOIN repositories r ON r.id = l.repository"
            " WHERE b.subject = ? AND r.upstream = ? AND r.name = ? ORDER BY b.digest",
            (str(subject), repository.upstream, repository.name),
        )
        return [StoredBlob(Digest.parse(digest), *rest) for digest, *rest in rows]

    def tagged_referrers(
        self, repository: Repository, subject: Digest
    ) -> list[tuple[Tag, StoredBlob]]:
        """Return the stored manifests that the repository's tags for referrers of `subject` name."""
        rows = self._connection.execute(
            "SELECT t.tag, b.digest, b.size, b.media_type, b.used FROM tags t JOIN blobs b USING (digest)"
            " JOIN repositories r ON r.id = t.repository"
            " WHERE t.subject = ? AND t.digest <> t.subject AND r.upstream = ? AND r.name = ?"
            " ORDER BY t.tag",
            (str(subject), repository.upstream, repository.name),
        )
        return [(Tag(tag), StoredBlob(Digest.parse(digest), *rest)) for tag, digest, *rest in rows]

    def children(self, digest: Digest) -> set[Digest]:
        """Return what a stored manifest names."""
        rows = self._connection.execute("SELECT child FROM edges WHERE parent = ?", (str(digest),))
        return {Digest.parse(child) for (child,) in rows}

    def referrer_record(self, repository: Repository, subject: Digest) -> ReferrerRecord | None:
        """Return what upstream had of referrers of `subject` when a preload asked, or None."""
        row = self._connection.execute(
            "SELECT record FROM referrer_records JOIN repositories r ON r.id = repository"
            " WHERE subject = ? AND r.upstream = ? AND r.name = ?",
            (str(subject), repository.upstream, repository.name),
        ).fetchone()
        return ReferrerRecord.decode(row[0]) if row else None

    def images_containing(self, digest: Digest, limit: int) -> list[tuple[Repository, Reference]]:
        """Return up to `limit` images that have a blob."""
        names = (
            name for above in self._ancestors(str(digest)) for name in self._root_references(above)
        )
        found = dict.fromkeys(islice(names, limit))
        named = ((self._repository(number), parse_reference(text)) for number, text in found)
        return [(repository, reference) for repository, reference in named if repository]

    def plan_removal(self, images: Collection[tuple[Repository, Reference]]) -> RemovalPlan:
        """Return the rows to remove with these images: everything that no other image reaches."""
        return self._plan_removal([entry for image in images for entry in self._root_rows(*image)])

    def _make_holder_check(self, gone: Iterable[tuple[int, str]]) -> Callable[..., bool]:
        """Return a function that tells whether an image reaches a digest, one that is not `gone`.

        With a repository, the function tells it of the images and links of that repository.
        """
        left_out = set(gone)

        # Many tags may have the same digest; one that stays is enough.
        @cache
        def stays(digest: str) -> bool:
            names = self._root_references(digest, len(left_out) + 1)
            return any(name not in left_out for name in names)

        @cache
        def staying(digest: str) -> set[int]:
            names = self._root_references(digest)
            return {number for number, reference in names if (number, reference) not in left_out}

        @cache
        def is_held(digest: str, repository: int | None = None) -> bool:
            if repository is None:
                return any(map(stays, self._ancestors(digest)))
            return any(
                repository in staying(above) for above in self._ancestors(digest, repository)
            )

        return is_held

    def _plan_removal(self, root_rows: Collection[_RootRow]) -> RemovalPlan:
        gone = {(number, reference) for number, reference, _, _ in root_rows}
        is_held = self._make_holder_check(gone)
        links = {
            (number, digest)
            for number, _, top, _ in root_rows
            for digest in self._reachable(top)
            if not is_held(digest, number)
        }
        free = sorted({digest for _, digest in links if not is_held(digest)})
        sizes = ((digest, self._blob_size(digest)) for digest in free)
        blobs = [(Digest.parse(digest), size) for digest, size in sizes if size is not None]
        return RemovalPlan(blobs, gone, links)

    def _root_rows(self, repository: Repository, reference: Reference) -> list[_RootRow]:
        query = "SELECT id FROM repositories WHERE upstream = ? AND name = ?"
        found = self._connection.execute(query, (repository.upstream, repository.name)).fetchone()
        column = "digest" if isinstance(reference, Digest) else "reference"
        # With the id as a parameter, SQLite reads only the rows of the repository.
        rows = self._connection.execute(
            "SELECT DISTINCT e.repository, e.reference, e.digest, p.reference IS NOT NULL"
            " FROM roots e"
            " LEFT JOIN pins p ON p.repository = e.repository AND p.reference = e.reference"
            f" WHERE e.repository = ? AND e.{column} = ?",
            (found[0] if found else None, str(reference)),
        )
        return rows.fetchall()

    def _reachable(self, digest: str) -> list[str]:
        query = f"WITH RECURSIVE reached (digest) AS (SELECT ? {pins.REACHABLE_SQL}) SELECT digest FROM reached"
        return [row[0] for row in self._connection.execute(query, (digest,))]

    def _ancestors(self, digest: str, repository: int | None = None) -> Iterator[str]:
        """Yield the digest and all digests that reach it; lazily, because a base layer has very many.

        With a repository, follow only digests that it is linked to.
        """
        seen, waiting = {digest}, [digest]
        yield digest
        for current in waiting:
            above = self._connection.execute(
                "SELECT above FROM (SELECT parent AS above FROM edges WHERE child = :digest"
                " UNION ALL SELECT subject FROM blobs WHERE digest = :digest AND subject IS NOT NULL"
                " UNION ALL SELECT subject FROM tags WHERE digest = :digest AND subject IS NOT NULL"
                " AND (:repository IS NULL OR repository = :repository))"
                " WHERE :repository IS NULL OR EXISTS"
                " (SELECT 1 FROM links l WHERE l.repository = :repository AND l.digest = above)",
                {"digest": current, "repository": repository},
            )
            for (parent,) in above:
                if parent not in seen:
                    seen.add(parent)
                    waiting.append(parent)
                    yield parent

    def _root_references(self, digest: str, limit: int = -1) -> list[tuple[int, str]]:
        """Return the images with this digest, up to `limit`: repository ids and references."""
        query = "SELECT DISTINCT repository, reference FROM roots WHERE digest = ? LIMIT ?"
        return self._connection.execute(query, (digest, limit)).fetchall()

    def _blob_size(self, digest: str) -> int | None:
        query = "SELECT size FROM blobs WHERE digest = ?"
        row: tuple[int] | None = self._connection.execute(query, (digest,)).fetchone()
        return row[0] if row else None

    def _repository(self, repository_id: int) -> Repository | None:
        """Return the repository; None if it was deleted since its id was read."""
        query = "SELECT upstream, name FROM repositories WHERE id = ?"
        row = self._connection.execute(query, (repository_id,)).fetchone()
        return Repository(*row) if row else None


def _longest_literal(pattern: str) -> str:
    """Return the longest part of a pattern that a matching name or reference contains as it is."""
    return max(_NO_LITERAL.split(pattern), key=len)
