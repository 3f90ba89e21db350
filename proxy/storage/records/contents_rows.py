"""The rows of the index about packages in images: functions of a connection."""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class PackageRow(NamedTuple):
    """A package that questions are about."""

    name: str
    kind: str
    version: str
    source: str
    source_version: str


class FoundPackage(NamedTuple):
    """A package in the index."""

    id: int
    package: PackageRow


class ReadImage(NamedTuple):
    """A manifest of an image that was read, and ids of packages in it."""

    digest: str
    platform: str
    packages: Sequence[int]


# What an entry of `image_packages` takes, with its index.
_PACKAGE_ROW_SIZE = 50
_TABLES = (("layer_contents", "read"), ("image_contents", "read"), ("scan_reports", "made"))


def put_layer(
    connection: sqlite3.Connection,
    digest: str,
    version: int,
    at: float,
    document: bytes,
    max_bytes: int,
) -> None:
    """Keep what was read of a layer, if it is stored still."""
    connection.execute(
        "INSERT OR REPLACE INTO layer_contents (digest, version, read, size, document)"
        " SELECT digest, ?, ?, ?, ? FROM blobs WHERE digest = ?",
        (version, at, len(document), document, digest),
    )
    prune(connection, max_bytes)


def begin_image(
    connection: sqlite3.Connection,
    digest: str,
    platform: str,
    at: float,
    document: bytes,
    packages: int,
) -> int | None:
    """Keep what was read of a manifest, in place of what was, not valid yet; return its id.

    None if it is not stored any more.
    """
    _delete_image(connection, digest)
    size = len(document) + packages * _PACKAGE_ROW_SIZE
    rows: list[tuple[int]] = connection.execute(
        "INSERT INTO image_contents (digest, platform, version, read, size, document)"
        " SELECT digest, ?, 0, ?, ?, ? FROM blobs WHERE digest = ? RETURNING id",
        (platform, at, size, document, digest),
    ).fetchall()
    return rows[0][0] if rows else None


def add_packages(
    connection: sqlite3.Connection, image: int, packages: Sequence[PackageRow]
) -> None:
    """Add packages of an image, unless it was removed meanwhile."""
    if not connection.execute("SELECT 1 FROM image_contents WHERE id = ?", (image,)).fetchone():
        return
    connection.executemany(
        "INSERT OR IGNORE INTO packages (name, kind, version, source, source_version)"
        " VALUES (?, ?, ?, ?, ?)",
        packages,
    )
    connection.executemany(
        "INSERT OR IGNORE INTO image_packages (package, image) SELECT id, ? FROM packages"
        " WHERE (name, kind, version, source, source_version) = (?, ?, ?, ?, ?)",
        [(image, *package) for package in packages],
    )


def finish_image(connection: sqlite3.Connection, image: int, version: int, max_bytes: int) -> None:
    """Make what was read of an image valid."""
    connection.execute("UPDATE image_contents SET version = ? WHERE id = ?", (version, image))
    prune(connection, max_bytes)


def put_report(
    connection: sqlite3.Connection, digest: str, at: float, document: bytes, max_bytes: int
) -> None:
    """Keep what a scanner found in a manifest, if it is stored still."""
    connection.execute(
        "INSERT OR REPLACE INTO scan_reports (digest, made, size, document)"
        " SELECT digest, ?, ?, ? FROM blobs WHERE digest = ?",
        (at, len(document), document, digest),
    )
    prune(connection, max_bytes)


def prune(connection: sqlite3.Connection, max_bytes: int) -> None:
    """Delete the oldest of these rows until they take at most `max_bytes`.

    Those of layers go first: of images that were read, they are not needed.
    """
    sizes = [
        connection.execute(f"SELECT coalesce(sum(size), 0) FROM {table}").fetchone()[0]
        for table, _ in _TABLES
    ]
    excess = sum(sizes) - max_bytes
    for table, column in _TABLES:
        while excess > 0:
            row = connection.execute(
                f"SELECT digest, size FROM {table} ORDER BY {column} LIMIT 1"
            ).fetchone()
            if row is None:
                break
            if table == "image_contents":
                _delete_image(connection, row[0])
            else:
                connection.execute(f"DELETE FROM {table} WHERE digest = ?", (row[0],))
            excess -= row[1]


def delete_contents(connection: sqlite3.Connection, digest: str) -> None:
    """Delete what was read of a blob that is removed."""
    connection.execute("DELETE FROM layer_contents WHERE digest = ?", (digest,))
    connection.execute("DELETE FROM scan_reports WHERE digest = ?", (digest,))
    _delete_image(connection, digest)


def _delete_image(connection: sqlite3.Connection, digest: str) -> None:
    rows = connection.execute(
        "DELETE FROM image_contents WHERE digest = ? RETURNING id", (digest,)
    ).fetchall()
    for (image,) in rows:
        gone = connection.execute(
            "DELETE FROM image_packages WHERE image = ? RETURNING package", (image,)
        ).fetchall()
        connection.executemany(
            "DELETE FROM packages WHERE id = ?"
            " AND NOT EXISTS (SELECT 1 FROM image_packages WHERE package = id)",
            gone,
        )


def find_packages(
    connection: sqlite3.Connection, names: Iterable[str], limit: int
) -> list[FoundPackage]:
    """Return up to `limit` packages with one of the names, or built from a source with it."""
    rows = connection.execute(
        "SELECT id, name, kind, version, source, source_version FROM packages WHERE id IN ("
        " SELECT id FROM packages WHERE name IN (SELECT value FROM json_each(:names))"
        " UNION SELECT id FROM packages WHERE source <> ''"
        " AND source IN (SELECT value FROM json_each(:names))) LIMIT :limit",
        {"names": json.dumps([*names]), "limit": limit},
    )
    return [FoundPackage(row[0], PackageRow(*row[1:])) for row in rows]


def images_with(
    connection: sqlite3.Connection, packages: Iterable[int], limit: int
) -> list[ReadImage]:
    """Return the images that have one of the packages; `limit` bounds the pairs of both."""
    rows = connection.execute(
        "SELECT c.digest, c.platform, json_group_array(p.package) FROM ("
        " SELECT image, package FROM image_packages"
        " WHERE package IN (SELECT value FROM json_each(?)) LIMIT ?) p"
        " JOIN image_contents c ON c.id = p.image AND c.version > 0 GROUP BY p.image",
        (json.dumps([*packages]), limit),
    )
    return [ReadImage(digest, platform, json.loads(found)) for digest, platform, found in rows]


def count_images(connection: sqlite3.Connection) -> tuple[int, int]:
    """Return how many stored images were read, and how many were not.

    An image for many platforms counts as read if one of them was.
    """
    query = """
        SELECT count(*), coalesce(sum(is_read), 0) FROM (
            SELECT EXISTS (SELECT 1 FROM image_contents c WHERE c.digest = r.digest AND c.version > 0)
                OR EXISTS (SELECT 1 FROM edges e CROSS JOIN image_contents c ON c.digest = e.child
                    WHERE e.parent = r.digest AND c.version > 0) AS is_read
            FROM (SELECT DISTINCT digest FROM roots) r
            WHERE EXISTS (SELECT 1 FROM blobs b WHERE b.digest = r.digest))
    """
    count, read = connection.execute(query).fetchone()
    return read, count - read
