"""Writes to the index: functions of a connection, each run inside one transaction."""

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from operator import itemgetter
from pathlib import Path

from proxy.errors import StorageError
from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest
from proxy.oci.reference import Reference, Repository, Tag
from proxy.oci.referrers import ReferrerRecord, subject_of_tag
from proxy.storage import pins
from proxy.storage.blobs import BLOCK_SIZE
from proxy.storage.index_size import PAGE_SIZE, delete_empty_repositories, vacuum
from proxy.storage.permissions import create_private_file
from proxy.storage.records import contents_rows, tag_history

SCHEMA_VERSION = 10

# Manifests that name more blobs are served, but neither stored nor indexed: each blob takes half a kilobyte
# of the index, and a manifest of 4 MiB could name 36,000.
MAX_CHILDREN = 2000
# The size in an edge whose manifest states none.
UNKNOWN_SIZE = -1

# Blobs below a manifest whose time of use follows that of the manifest. An index of 2000 manifests of 2000
# layers each would hold up all writes of the index for seconds, each time it is pulled.
MAX_USED_BLOBS = 20_000

# Changes to a store of that version before the schema is applied to it.
_MIGRATIONS = {
    1: """
        ALTER TABLE blobs ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0;
        DROP INDEX blobs_by_use;
        CREATE TABLE pins (
            repository INTEGER NOT NULL, reference TEXT NOT NULL, digest TEXT,
            PRIMARY KEY (repository, reference)
        ) STRICT, WITHOUT ROWID;
    """,
    # Up to version 2 a repository was linked to all that its manifests named, except foreign layers.
    2: """
        ALTER TABLE links ADD COLUMN media_type TEXT;
        ALTER TABLE edges ADD COLUMN is_foreign INTEGER NOT NULL DEFAULT 0;
        UPDATE edges SET is_foreign = 1 WHERE child NOT IN (SELECT digest FROM links);
        DELETE FROM links WHERE digest NOT IN (SELECT digest FROM blobs);
        CREATE TABLE senders (
            digest TEXT NOT NULL, upstream TEXT NOT NULL, PRIMARY KEY (digest, upstream)
        ) STRICT, WITHOUT ROWID;
        INSERT INTO senders SELECT DISTINCT l.digest, r.upstream
            FROM links l JOIN repositories r ON r.id = l.repository;
    """,
    # Earlier versions indexed manifests of any number of children; these are fetched again if requested.
    3: f"""
        CREATE TEMP TABLE oversized AS
            SELECT parent FROM edges GROUP BY parent HAVING count(*) > {MAX_CHILDREN};
        UPDATE blobs SET media_type = NULL, subject = NULL WHERE digest IN (SELECT parent FROM oversized);
        DELETE FROM edges WHERE parent IN (SELECT parent FROM oversized);
        DROP TABLE oversized;
    """,
    4: f"""
        ALTER TABLE tags ADD COLUMN subject TEXT;
        UPDATE tags SET subject = 'sha256:' || substr(tag, 8, 64)
            WHERE tag GLOB 'sha256-{"[0-9a-f]" * 64}' OR tag GLOB 'sha256-{"[0-9a-f]" * 64}.[a-z]*';
        DROP VIEW IF EXISTS roots;
    """,
    # The history of tags begins with what they mean at the upgrade.
    5: """
        CREATE TABLE tag_history (
            repository INTEGER NOT NULL, tag TEXT NOT NULL, digest TEXT NOT NULL,
            first_seen REAL NOT NULL, last_seen REAL NOT NULL, pushed REAL,
            ripe INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (repository, tag, digest)
        ) STRICT, WITHOUT ROWID;
        INSERT INTO tag_history (repository, tag, digest, first_seen, last_seen)
            SELECT repository, tag, digest, checked, checked FROM tags;
    """,
    6: """
        DROP VIEW IF EXISTS roots;
        DROP INDEX IF EXISTS blobs_manifests;
        ALTER TABLE repositories ADD COLUMN used REAL NOT NULL DEFAULT 0;
        ALTER TABLE repositories ADD COLUMN manifests INTEGER NOT NULL DEFAULT 0;
        DELETE FROM repositories WHERE id NOT IN (SELECT repository FROM links
            UNION SELECT repository FROM tags UNION SELECT repository FROM pins
            UNION SELECT repository FROM tag_history);
        WITH counts AS (SELECT l.repository, count(*) AS manifests FROM blobs b
            CROSS JOIN links l ON l.digest = b.digest WHERE b.media_type IS NOT NULL GROUP BY 1)
            UPDATE repositories SET manifests = counts.manifests FROM counts WHERE id = repository;
        CREATE TABLE catalog (
            name TEXT NOT NULL, upstream TEXT NOT NULL, PRIMARY KEY (name, upstream)
        ) STRICT, WITHOUT ROWID;
        INSERT INTO catalog (name, upstream) SELECT
            CASE upstream WHEN 'docker.io' THEN name ELSE upstream || '/' || name END, upstream
            FROM repositories WHERE manifests > 0
            -- Names of docker.io that begin like a host are refused now.
            AND NOT (upstream = 'docker.io' AND instr(substr(name, 1, instr(name, '/')), '.'));
    """,
    7: "ALTER TABLE tag_history ADD COLUMN source TEXT NOT NULL DEFAULT '';",
    # Only new tables: totals of traffic, the audit trail, and pulls.
    8: "",
    # Only new tables: packages of images, and what scanners found.
    9: "",
}


def allocated_size_sql(size: str) -> str:
    """Return the SQL for `blobs.allocated_size` of a column."""
    return f"({size} + {BLOCK_SIZE - 1}) / {BLOCK_SIZE} * {BLOCK_SIZE}"


# The bytes that blobs take on disk.
ALLOCATED_SIZE_SUM = f"coalesce(sum({allocated_size_sql('size')}), 0)"

# SQLite itself keeps the totals, on the one connection that writes: a transaction that adds, resizes, pins
# or removes rows of `blobs` also changes the totals, and a rollback restores them.
_TOTALS_SCHEMA = f"""
    CREATE TEMP TABLE totals (blobs INTEGER, bytes INTEGER, pinned_bytes INTEGER);
    CREATE TEMP TRIGGER count_added AFTER INSERT ON main.blobs BEGIN
        UPDATE totals SET blobs = blobs + 1, bytes = bytes + {allocated_size_sql("new.size")},
            pinned_bytes = pinned_bytes + {allocated_size_sql("new.size")} * new.pinned;
    END;
    CREATE TEMP TRIGGER count_removed AFTER DELETE ON main.blobs BEGIN
        UPDATE totals SET blobs = blobs - 1, bytes = bytes - {allocated_size_sql("old.size")},
            pinned_bytes = pinned_bytes - {allocated_size_sql("old.size")} * old.pinned;
    END;
    CREATE TEMP TRIGGER count_changed AFTER UPDATE OF size, pinned ON main.blobs BEGIN
        UPDATE totals SET
            bytes = bytes + {allocated_size_sql("new.size")} - {allocated_size_sql("old.size")},
            pinned_bytes = pinned_bytes + {allocated_size_sql("new.size")} * new.pinned
                - {allocated_size_sql("old.size")} * old.pinned;
    END;
"""

# SQLite's default of 1,000 pages lets the log grow to 4 MB: much for a store of 20 MB.
_CHECKPOINT_PAGES = 256
# A transaction of thousands of rows makes the log longer than that for as long as it runs.
MAX_LOG_SIZE = _CHECKPOINT_PAGES * PAGE_SIZE


def open_connection(path: Path) -> sqlite3.Connection:
    """Open the index for writing; create it if it is missing, upgrade it if it is older.

    Raises `StorageError` if it is newer or no regular file, `sqlite3.DatabaseError` if it is not a database.
    """
    try:
        create_private_file(path)
    except OSError as error:
        raise StorageError(f"the index {path} cannot be opened: {error.strerror}") from error
    connection = sqlite3.connect(path, timeout=5, check_same_thread=False)
    # Takes effect in a new index, and in an older one at the next VACUUM.
    try:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    except UnicodeDecodeError as error:  # of a message that quotes the damaged schema
        connection.close()
        raise sqlite3.DatabaseError("its schema is damaged") from error
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {MAX_LOG_SIZE}")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version < SCHEMA_VERSION:
        upgrades = "".join(
            _MIGRATIONS[old] for old in range(version or SCHEMA_VERSION, SCHEMA_VERSION)
        )
        schema = files("proxy.storage").joinpath("schema.sql").read_text()
        connection.executescript(
            f"BEGIN; {upgrades} {schema} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT"
        )
        if version:
            vacuum(connection)
    elif version > SCHEMA_VERSION:
        connection.close()
        raise StorageError(
            f"the index {path} has version {version}, this pullcache supports {SCHEMA_VERSION}: "
            "use the pullcache that wrote it, or another store"
        )
    return connection


def check_writable(connection: sqlite3.Connection) -> None:
    """Take the lock of writers; the end of the transaction releases it."""
    connection.execute("BEGIN IMMEDIATE")


def add_blob(
    connection: sqlite3.Connection,
    repository: Repository | None,
    digest: Digest,
    size: int,
    used_at: float,
) -> bool:
    """Add a committed blob and link the repository to it; return whether it is new."""
    is_new = not _has_blob(connection, digest)
    connection.execute(
        "INSERT INTO blobs (digest, size, used, pinned) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (digest) DO UPDATE SET size = excluded.size, used = excluded.used",
        (str(digest), size, used_at, pins.is_reachable(connection, str(digest), None)),
    )
    if repository:
        add_links(connection, repository, [digest])
    return is_new


def add_manifest(
    connection: sqlite3.Connection,
    repository: Repository | None,
    digest: Digest,
    size: int,
    manifest: Manifest,
    used_at: float,
) -> bool:
    """Add a committed manifest and its edges, link the repository to it; return whether it is new.

    The media type of a manifest that is known stays: another one is kept with the link.
    """
    is_new = not _has_blob(connection, digest)
    subject = str(manifest.subject) if manifest.subject else None
    connection.execute(
        "INSERT INTO blobs (digest, size, media_type, subject, used) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (digest) DO UPDATE SET size = excluded.size, used = excluded.used,"
        " media_type = coalesce(media_type, excluded.media_type), subject = excluded.subject",
        (str(digest), size, manifest.media_type, subject, used_at),
    )
    connection.executemany(
        "INSERT OR IGNORE INTO edges (parent, child, size, is_foreign) VALUES (?, ?, ?, ?)",
        [
            (
                str(digest),
                str(child.digest),
                UNKNOWN_SIZE if child.size is None else child.size,
                child.is_foreign,
            )
            for child in manifest.children
        ],
    )
    if pins.is_reachable(connection, str(digest), subject):
        pins.mark_reachable(connection, str(digest))
    if repository:
        add_links(connection, repository, [digest])
        connection.execute(
            "UPDATE links SET media_type = nullif(?, (SELECT media_type FROM blobs WHERE digest = ?))"
            " WHERE repository = ? AND digest = ?",
            (
                manifest.media_type,
                str(digest),
                repository_id(connection, repository),
                str(digest),
            ),
        )
    return is_new


def add_image(
    connection: sqlite3.Connection,
    repository: Repository,
    tag: tuple[Tag, Digest, float] | None,
    manifests: Iterable[tuple[Digest, int, Manifest, float]],
) -> None:
    """Add the manifests of an import with their edges, link the repository to all of it, set the tag."""
    for digest, size, manifest, used_at in manifests:
        add_manifest(connection, repository, digest, size, manifest, used_at)
        held = [child.digest for child in manifest.children if not child.is_foreign]
        add_links(connection, repository, held)
    if tag:
        set_tag(connection, repository, *tag, source=tag_history.IMPORTED)


def add_unlinked_blobs(
    connection: sqlite3.Connection,
    files: Iterable[tuple[Digest, int, Manifest | None]],
    used_at: float,
) -> None:
    """Add blobs whose files were found, without links."""
    for digest, size, manifest in files:
        if manifest:
            add_manifest(connection, None, digest, size, manifest, used_at)
        else:
            add_blob(connection, None, digest, size, used_at)


def add_links(
    connection: sqlite3.Connection, repository: Repository, digests: Iterable[Digest]
) -> None:
    """Link the repository to those of the digests that are stored; its upstream has sent them."""
    number = repository_id(connection, repository)
    stored = [digest for digest in digests if _has_blob(connection, digest)]
    connection.executemany(
        "INSERT OR IGNORE INTO links (repository, digest) VALUES (?, ?)",
        [(number, str(digest)) for digest in stored],
    )
    connection.executemany(
        "INSERT OR IGNORE INTO senders (digest, upstream) VALUES (?, ?)",
        [(str(digest), repository.upstream) for digest in stored],
    )


def add_proven_link(connection: sqlite3.Connection, repository: Repository, digest: Digest) -> None:
    """Link the repository to a stored blob that its upstream has sent.

    A manifest has the media type that upstream has stated under another repository.
    """
    query = "SELECT 1 FROM senders WHERE digest = ? AND upstream = ?"
    if not connection.execute(query, (str(digest), repository.upstream)).fetchone():
        return
    add_links(connection, repository, [digest])
    connection.execute(
        "UPDATE links SET media_type = (SELECT l.media_type FROM links l"
        " JOIN repositories r ON r.id = l.repository WHERE l.digest = :digest AND r.upstream = :upstream"
        " AND l.media_type IS NOT NULL LIMIT 1) WHERE repository = :repository AND digest = :digest"
        " AND EXISTS (SELECT 1 FROM blobs b WHERE b.digest = :digest AND b.media_type IS NOT NULL)",
        {
            "digest": str(digest),
            "upstream": repository.upstream,
            "repository": repository_id(connection, repository),
        },
    )


def set_tag(
    connection: sqlite3.Connection,
    repository: Repository,
    tag: Tag,
    digest: Digest,
    checked_at: float,
    stated: Digest | None = None,
    *,
    source: str = "",
) -> None:
    """Set the digest of a tag; a pin of the tag moves with it. `stated` is what upstream states.

    `source` is that of `tag_history.record`.
    """
    number, subject = repository_id(connection, repository), subject_of_tag(tag)
    connection.execute(
        "INSERT OR REPLACE INTO tags (repository, tag, digest, checked, subject)"
        " VALUES (?, ?, ?, ?, ?)",
        (number, tag, str(digest), checked_at, subject and str(subject)),
    )
    pins.update_tag(connection, number, tag, digest)
    if subject:
        pins.update_referrer(connection, subject, digest)
    tag_history.record(connection, number, tag, stated or digest, checked_at, source=source)


def move_tag(
    connection: sqlite3.Connection, repository: Repository, tag: Tag, digest: Digest
) -> None:
    """Set the digest of a known tag and leave the time of its check; a pin moves with it."""
    number = repository_id(connection, repository)
    connection.execute(
        "UPDATE tags SET digest = ? WHERE repository = ? AND tag = ?", (str(digest), number, tag)
    )
    pins.update_tag(connection, number, tag, digest)


def delete_tag(connection: sqlite3.Connection, repository: Repository, tag: Tag) -> None:
    """Delete a tag; its content stays."""
    number = repository_id(connection, repository)
    connection.execute("DELETE FROM tags WHERE repository = ? AND tag = ?", (number, tag))
    delete_empty_repositories(connection, [number])


def set_referrer_records(
    connection: sqlite3.Connection,
    repository: Repository,
    records: Mapping[Digest, ReferrerRecord],
) -> None:
    """Set what upstream had of referrers of manifests, except of manifests that are not stored."""
    number = repository_id(connection, repository)
    connection.executemany(
        "INSERT OR REPLACE INTO referrer_records (repository, subject, record)"
        " SELECT ?, digest, ? FROM blobs WHERE digest = ?",
        [(number, record.encode(), str(subject)) for subject, record in records.items()],
    )


def pin(connection: sqlite3.Connection, images: Iterable[tuple[Repository, Reference]]) -> None:
    """Pin images, whether they are in the store or not."""
    for repository, reference in images:
        pins.add(connection, repository_id(connection, repository), reference)


def unpin(
    connection: sqlite3.Connection, images: Iterable[tuple[Repository, Reference]]
) -> list[tuple[Repository, Reference]]:
    """Unpin images; return the ones that were pinned."""
    found = []
    for repository, reference in images:
        number = repository_id(connection, repository)
        if pins.remove(connection, number, reference):
            found.append((repository, reference))
        delete_empty_repositories(connection, [number])
    pins.recompute(connection)
    return found


def restore_pins(connection: sqlite3.Connection, rows: Iterable[tuple[str, ...]]) -> None:
    """Add pins (upstream, repository, reference, digest) of another index and apply them."""
    for upstream, name, reference, digest in rows:
        connection.execute(
            "INSERT OR REPLACE INTO pins (repository, reference, digest) VALUES (?, ?, ?)",
            (repository_id(connection, Repository(upstream, name)), reference, digest),
        )
    pins.recompute(connection)


def restore_senders(connection: sqlite3.Connection, rows: Iterable[tuple[str, ...]]) -> None:
    """Add senders (digest, upstream) of another index, for blobs that are stored."""
    connection.executemany(
        "INSERT OR IGNORE INTO senders (digest, upstream)"
        " SELECT digest, :upstream FROM blobs WHERE digest = :digest",
        [{"digest": digest, "upstream": upstream} for digest, upstream in rows],
    )


def restore_rows(
    connection: sqlite3.Connection, tables: Mapping[str, Sequence[tuple[str, ...]]]
) -> None:
    """Add rows of another index to tables that have the same columns there."""
    for name, rows in tables.items():
        if rows:
            marks = ", ".join("?" * len(rows[0]))
            with suppress(sqlite3.OperationalError):  # another version has other columns
                connection.executemany(f"INSERT OR IGNORE INTO {name} VALUES ({marks})", rows)


def record_uses(connection: sqlite3.Connection, uses: dict[Digest, float]) -> None:
    """Set the time of use of blobs, and of everything below the manifests among them.

    So the layers of an image are as recently used as its manifest, even if clients already have them.
    """
    connection.executemany(
        "WITH RECURSIVE below (digest) AS (SELECT ? UNION SELECT e.child FROM edges e"
        f" JOIN below b ON e.parent = b.digest LIMIT {MAX_USED_BLOBS})"
        # A blob may have been added after this use was recorded: its later time stays.
        " UPDATE blobs SET used = ? WHERE digest IN (SELECT digest FROM below) AND used < ?",
        [(str(digest), used, used) for digest, used in sorted(uses.items(), key=itemgetter(1))],
    )


def remove_blobs(
    connection: sqlite3.Connection, digests: Sequence[Digest], delete_file: Callable[[Digest], None]
) -> list[tuple[Digest, int]]:
    """Call `delete_file` for each blob, then delete its row with its tags, edges, links and senders.

    Return the blobs that had rows, with sizes.
    """
    for digest in digests:
        delete_file(digest)
    return [
        (digest, size)
        for digest in digests
        if (size := _delete_row(connection, digest)) is not None
    ]


def _delete_row(connection: sqlite3.Connection, digest: Digest) -> int | None:
    name = str(digest)
    rows = connection.execute(
        "DELETE FROM blobs WHERE digest = ? RETURNING size", (name,)
    ).fetchall()
    tags = connection.execute("DELETE FROM tags WHERE digest = ? RETURNING repository", (name,))
    repositories = {row[0] for row in tags.fetchall()}
    links = connection.execute("DELETE FROM links WHERE digest = ? RETURNING repository", (name,))
    repositories.update(row[0] for row in links.fetchall())
    connection.execute("DELETE FROM referrer_records WHERE subject = ?", (name,))
    connection.execute("DELETE FROM senders WHERE digest = ?", (name,))
    connection.execute("DELETE FROM edges WHERE parent = ?", (name,))
    contents_rows.delete_contents(connection, name)
    delete_empty_repositories(connection, repositories)
    return rows[0][0] if rows else None


def unlinked_blobs(
    connection: sqlite3.Connection, digests: Iterable[Digest]
) -> list[tuple[Digest, int]]:
    """Return, with sizes, the blobs that are neither linked to a repository nor pinned."""
    query = """
        SELECT size FROM blobs b WHERE digest = ? AND NOT pinned
        AND NOT EXISTS (SELECT 1 FROM links l WHERE l.digest = b.digest)
    """
    found = ((digest, connection.execute(query, (str(digest),)).fetchone()) for digest in digests)
    return [(digest, row[0]) for digest, row in found if row]


def unpinned_bytes(connection: sqlite3.Connection, digests: Iterable[Digest]) -> int:
    """Return the allocated bytes of the blobs that are stored and not pinned."""
    query = f"SELECT {ALLOCATED_SIZE_SUM} FROM json_each(?) JOIN blobs ON digest = value WHERE NOT pinned"
    row: tuple[int] = connection.execute(query, (json.dumps([*map(str, digests)]),)).fetchone()
    return row[0]


def recently_used(connection: sqlite3.Connection, count: int) -> list[tuple[Digest, int]]:
    """Return digests and sizes of the `count` blobs used last, the last one first."""
    # Each half reads an index from its end.
    query = """
        SELECT digest, size FROM (
            SELECT * FROM (SELECT digest, size, used FROM blobs WHERE NOT pinned
                           ORDER BY used DESC LIMIT :count)
            UNION ALL
            SELECT * FROM (SELECT digest, size, used FROM blobs WHERE pinned
                           ORDER BY used DESC LIMIT :count))
        ORDER BY used DESC LIMIT :count
    """
    rows = connection.execute(query, {"count": count})
    return [(Digest.parse(row[0]), row[1]) for row in rows]


def track_totals(connection: sqlite3.Connection) -> tuple[int, int, int]:
    """Keep the totals on this connection from now on, and return them. Once per connection."""
    connection.execute("PRAGMA temp_store = MEMORY")  # a full disk must not stop the counting
    connection.executescript(_TOTALS_SCHEMA)
    counted = count_totals(connection)
    with connection:
        connection.execute(
            "INSERT INTO totals (blobs, bytes, pinned_bytes) VALUES (?, ?, ?)", counted
        )
    return counted


def tracked_totals(connection: sqlite3.Connection) -> tuple[int, int, int]:
    """Return the fields of `StoreTotals` as the triggers keep them."""
    query = "SELECT blobs, bytes, pinned_bytes FROM totals"
    row: tuple[int, int, int] = connection.execute(query).fetchone()
    return row


def recount_totals(connection: sqlite3.Connection) -> tuple[int, int]:
    """Recount the blobs and correct the totals; return the corrections, in blobs and bytes."""
    before, counted = tracked_totals(connection), count_totals(connection)
    connection.execute("UPDATE totals SET blobs = ?, bytes = ?, pinned_bytes = ?", counted)
    return counted[0] - before[0], counted[1] - before[1]


def count_totals(connection: sqlite3.Connection) -> tuple[int, int, int]:
    """Count the fields of `StoreTotals`."""
    # Each half reads only an index; the table is three times as large.
    query = f"""
        SELECT sum(blobs), sum(bytes), sum(pinned) FROM (
            SELECT count(*) AS blobs, {ALLOCATED_SIZE_SUM} AS bytes, 0 AS pinned
                FROM blobs WHERE NOT pinned
            UNION ALL SELECT count(*), {ALLOCATED_SIZE_SUM}, {ALLOCATED_SIZE_SUM}
                FROM blobs WHERE pinned)
    """
    row: tuple[int, int, int] = connection.execute(query).fetchone()
    return row


def _has_blob(connection: sqlite3.Connection, digest: Digest) -> bool:
    query = "SELECT 1 FROM blobs WHERE digest = ?"
    return connection.execute(query, (str(digest),)).fetchone() is not None


def repository_id(connection: sqlite3.Connection, repository: Repository) -> int:
    """Return the id of the repository, which is added if it is new, and record that it was used."""
    rows: list[tuple[int]] = connection.execute(
        "INSERT INTO repositories (upstream, name, used) VALUES (?, ?,"
        " (SELECT coalesce(max(used), 0) FROM blobs WHERE NOT pinned))"
        " ON CONFLICT (upstream, name) DO UPDATE SET used = excluded.used RETURNING id",
        (repository.upstream, repository.name),
    ).fetchall()
    return rows[0][0]
