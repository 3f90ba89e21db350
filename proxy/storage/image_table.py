"""A table of all images with what they are filtered and sorted by, made at one moment.

Sizes, pulls and states take a look at the whole index, which is too slow for a page. They are put into a
temporary table, with an index for each order, so that a page reads its rows and no others.
"""

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from proxy.errors import StorageError
from proxy.oci.digest import Digest
from proxy.oci.manifest import INDEX_TYPES
from proxy.oci.reference import Reference, Repository, parse_reference
from proxy.storage.image_queries import ImageQueries

ImageOrder = Literal["name", "size", "unique", "pulled", "idle", "pulls"]
TableState = Literal["complete", "partial", "absent"]

# The column of each order. Values are such that the first row has the smallest.
_ORDER_COLUMNS: Mapping[ImageOrder, str] = {
    "name": "name",
    "size": "by_size",
    "unique": "by_unique",
    "pulled": "by_pulled",
    "idle": "pulled",
    "pulls": "by_pulls",
}
_INDEX_TYPES = ", ".join(f"'{one}'" for one in sorted(INDEX_TYPES))
_SHOWN_NAME = (
    "CASE WHEN r.upstream <> 'docker.io' THEN r.upstream || '/' || r.name"
    " WHEN r.name LIKE 'library/%' AND instr(substr(r.name, 9), '/') = 0 THEN substr(r.name, 9)"
    " ELSE r.name END"
)
_MARK = "CASE WHEN e.reference LIKE 'sha256:%' OR e.reference LIKE 'sha512:%' THEN '@' ELSE ':' END"
_FULL_NAME = f"r.upstream || '/' || r.name || {_MARK} || e.reference"
# What a client can run of the image: itself, or a stored manifest below an image index.
_RUNNABLE = (
    "(SELECT e.digest AS digest UNION ALL SELECT c.child FROM edges c JOIN links k"
    " ON k.repository = e.repository AND k.digest = c.child WHERE c.parent = e.digest) m"
    " JOIN blobs b ON b.digest = m.digest AND b.media_type IS NOT NULL"
    f" AND b.media_type NOT IN ({_INDEX_TYPES})"
)
_LACKS_SOMETHING = (
    "EXISTS (SELECT 1 FROM edges x WHERE x.parent = m.digest AND NOT x.is_foreign AND NOT EXISTS"
    " (SELECT 1 FROM links l WHERE l.repository = e.repository AND l.digest = x.child))"
)
_STATE = (
    "CASE WHEN e.digest IS NULL THEN 'absent'"
    f" WHEN EXISTS (SELECT 1 FROM {_RUNNABLE} WHERE {_LACKS_SOMETHING}) THEN 'partial'"
    f" WHEN EXISTS (SELECT 1 FROM {_RUNNABLE}) THEN 'complete' ELSE 'partial' END"
)
_BADGE = (
    "CASE WHEN r.upstream = 'docker.io' AND r.name LIKE 'library/%' THEN 'official'"
    " ELSE coalesce((SELECT badge FROM facts WHERE repository = r.id), 'not_asked') END"
)
_FILL = f"""
    INSERT INTO temp.image_table
    SELECT e.repository, r.upstream, r.name, e.reference, e.digest, {_SHOWN_NAME} || {_MARK} || e.reference,
        e.pinned, {_STATE}, {_BADGE},
        coalesce(max(p.at, q.at), p.at, q.at),
        -coalesce(s.size, 0), -coalesce(s.own, 0), -coalesce(p.at, q.at, 0), -coalesce(n.pulls, 0)
    FROM (
        SELECT repository, reference, digest, 0 AS pinned FROM tagged t
        WHERE NOT EXISTS (
            SELECT 1 FROM pins x WHERE x.repository = t.repository AND x.reference = t.reference)
        UNION ALL SELECT repository, reference, digest, 1 FROM pins
        UNION ALL SELECT repository, digest, digest, 0 FROM untagged
    ) e
    JOIN repositories r ON r.id = e.repository
    LEFT JOIN temp.sizes s ON s.digest = e.digest
    LEFT JOIN pulls p ON p.name = {_FULL_NAME}
    LEFT JOIN pulls q ON q.name = r.upstream || '/' || r.name || '@' || e.digest
    LEFT JOIN temp.pull_counts n ON n.name = {_FULL_NAME}
"""

_COLUMNS = "repository, upstream, repository_name, reference, digest, state, pulled, by_size, by_unique, by_pulls"
# Whether an image is pinned, and stored, now.
_NOW = """
    SELECT EXISTS (SELECT 1 FROM pins WHERE repository = :repository AND reference = :reference),
        EXISTS (SELECT 1 FROM tags WHERE repository = :repository AND tag = :reference)
        OR EXISTS (SELECT 1 FROM links WHERE repository = :repository AND digest = :reference)
"""
_PLATFORMS = """
    SELECT f.platform FROM temp.image_platforms f WHERE f.digest = :digest AND (f.child = f.digest
        OR EXISTS (SELECT 1 FROM links l WHERE l.repository = :repository AND l.digest = f.child))
    ORDER BY f.platform
"""


class ImageFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which images a list has. None and empty texts select all; `text` is a part of the name."""

    text: str = ""
    upstream: str = ""
    badge: str = ""
    platform: str = ""
    state: TableState | Literal[""] = ""
    pinned: bool | None = None
    pulled: bool | None = None


class TableRow(NamedTuple):
    """An image of the table. `pinned` is as it is now, the rest as it was; `pulled` is Unix time.

    `platforms` are those that are stored, as far as they were read.
    """

    repository: Repository
    reference: Reference
    digest: Digest | None
    pinned: bool
    state: TableState
    pulled: float | None
    size: int
    unique: int
    pulls: int
    platforms: Sequence[str]


class ImageTable:
    """The images at one moment, on a connection of its own. Methods block; they take turns."""

    def __init__(self, index_path: Path) -> None:
        """Read all images. Raises `StorageError`."""
        self._lock = threading.Lock()
        uri = f"{index_path.absolute().as_uri()}?mode=ro"
        try:
            # Without implicit transactions: an open one would keep SQLite from shortening its log.
            self._connection = sqlite3.connect(
                uri, uri=True, timeout=5, check_same_thread=False, isolation_level=None
            )
            try:
                self._fill()
            except BaseException:
                self._connection.close()
                raise
        except sqlite3.Error as error:
            raise StorageError(f"the index cannot be read: {error}") from error
        self.has_platforms = False

    def close(self) -> None:
        """Close the connection."""
        with self._lock, suppress(sqlite3.Error):
            self._connection.close()

    @property
    def change_mark(self) -> int:
        """A number that differs once the index has changed."""
        with self._lock:
            row: tuple[int] = self._connection.execute("PRAGMA main.data_version").fetchone()
        return row[0]

    def rows(
        self, wanted: ImageFilter, order: ImageOrder, after: str, limit: int
    ) -> list[TableRow] | None:
        """Return at most `limit` images that follow the one named `after`; None if that is gone."""
        column = _ORDER_COLUMNS[order]
        conditions, values = _conditions(wanted)
        with self._lock:
            if after:
                query = f"SELECT {column}, name FROM temp.image_table WHERE name = ?"
                if (found := self._connection.execute(query, (after,)).fetchone()) is None:
                    return None
                conditions.append(f"(coalesce({column}, 0), name) > (?, ?)")
                values += [found[0] or 0, found[1]]
            where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
            rows = self._connection.execute(
                f"SELECT {_COLUMNS} FROM temp.image_table {where}"
                f" ORDER BY coalesce({column}, 0), name LIMIT ?",
                (*values, limit),
            ).fetchall()
            return [found for row in rows if (found := self._complete(*row))]

    def _complete(
        self,
        number: int,
        upstream: str,
        name: str,
        reference: str,
        digest: str | None,
        *rest: Any,
    ) -> TableRow | None:
        """Return a row with what may have changed since as it is now; None if the image is gone."""
        key = {"repository": number, "reference": reference, "digest": digest}
        is_pinned, is_stored = self._connection.execute(_NOW, key).fetchone()
        if not (is_pinned or is_stored):
            return None
        platforms = self._connection.execute(_PLATFORMS, key).fetchall() if digest else ()
        state, pulled, size, unique, pulls = rest
        return TableRow(
            Repository(upstream, name),
            parse_reference(reference),
            Digest.parse(digest) if digest else None,
            bool(is_pinned),
            state,
            pulled,
            -size,
            -unique,
            -pulls,
            [platform for (platform,) in platforms],
        )

    @contextmanager
    def queries(self) -> Iterator[ImageQueries]:
        """Yield queries of the index as it is now, for one thread at a time."""
        with self._lock:
            yield ImageQueries(self._connection)

    def count(self, wanted: ImageFilter) -> int:
        """Return how many images there are."""
        conditions, values = _conditions(wanted)
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        with self._lock:
            query = f"SELECT count(*) FROM temp.image_table {where}"
            row: tuple[int] = self._connection.execute(query, values).fetchone()
        return row[0]

    def manifests(self) -> list[tuple[Digest, int]]:
        """Return the digests and sizes of all images."""
        query = (
            "SELECT DISTINCT b.digest, b.size FROM temp.image_table t JOIN blobs b USING (digest)"
        )
        with self._lock:
            rows = self._connection.execute(query).fetchall()
        return [(Digest.parse(digest), size) for digest, size in rows]

    def add_platforms(self, platforms: Iterable[tuple[str, str, str]]) -> None:
        """Add platforms: the digest of an image, that of the manifest for a platform, and its name."""
        with self._lock:
            self._connection.executemany(
                "INSERT OR IGNORE INTO temp.image_platforms VALUES (?, ?, ?)", platforms
            )

    def platforms(self) -> list[str]:
        """Return the platforms that images are for, the most common first."""
        query = (
            "SELECT platform FROM temp.image_platforms GROUP BY platform ORDER BY count(*) DESC, 1"
        )
        with self._lock:
            return [platform for (platform,) in self._connection.execute(query)]

    def _fill(self) -> None:
        run = self._connection.execute
        run("PRAGMA cache_size = -16384")
        run("PRAGMA temp.cache_size = -16384")
        ImageQueries(self._connection).compute_sizes()
        run(
            "CREATE TEMP TABLE pull_counts AS SELECT name, sum(hits + partials + misses) AS pulls"
            " FROM traffic WHERE scope = 'image' GROUP BY name"
        )
        run("CREATE UNIQUE INDEX temp.pull_counts_by_name ON pull_counts (name)")
        run(
            "CREATE TEMP TABLE image_table (repository INTEGER, upstream TEXT, repository_name TEXT,"
            " reference TEXT, digest TEXT, name TEXT, pinned INTEGER, state TEXT, badge TEXT, pulled REAL,"
            " by_size INTEGER, by_unique INTEGER, by_pulled REAL, by_pulls INTEGER)"
        )
        run(_FILL)
        for column in dict.fromkeys(_ORDER_COLUMNS.values()):
            run(
                f"CREATE INDEX temp.image_table_{column} ON image_table (coalesce({column}, 0), name)"
            )
        run("CREATE INDEX temp.image_table_names ON image_table (name)")
        run(
            "CREATE TEMP TABLE image_platforms (digest TEXT, child TEXT, platform TEXT,"
            " PRIMARY KEY (digest, platform, child)) WITHOUT ROWID"
        )
        for table in ("sizes", "pull_counts"):
            run(f"DROP TABLE temp.{table}")


def _conditions(wanted: ImageFilter) -> tuple[list[str], list[object]]:
    equal = {
        "upstream": wanted.upstream or None,
        "badge": wanted.badge or None,
        "state": wanted.state or None,
        "pinned": wanted.pinned,
    }
    given = {column: value for column, value in equal.items() if value is not None}
    conditions = [f"{column} = ?" for column in given]
    values: list[object] = [*given.values()]
    if wanted.text:
        conditions.append("instr(name, ?)")
        values.append(wanted.text)
    if wanted.pulled is not None:
        conditions.append("pulled IS NOT NULL" if wanted.pulled else "pulled IS NULL")
    if wanted.platform:
        conditions.append(
            "EXISTS (SELECT 1 FROM temp.image_platforms f WHERE f.digest = image_table.digest"
            " AND f.platform = ? AND (f.child = f.digest OR EXISTS (SELECT 1 FROM links l"
            " WHERE l.repository = image_table.repository AND l.digest = f.child)))"
        )
        values.append(wanted.platform)
    return conditions, values
