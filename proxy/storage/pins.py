"""Pins: images that are never evicted.

A blob is pinned if a pin names it, if a pinned manifest in the store names it, or if its subject is
pinned: the one that it states, or the one in its tag (proxy/oci/referrers.py). The column `blobs.pinned` records this, so that an eviction need not compute it. New pins and new
content update only what they reach; moving a tag and removing a pin recompute all rows.
When a damaged manifest is removed, the blobs that it names stay pinned until then.
"""

import sqlite3

from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Tag

# Extends `reached` by everything that its manifests name, and by the referrers of all that.
REACHABLE_SQL = """
    UNION SELECT e.child FROM edges e JOIN reached r ON e.parent = r.digest
    UNION SELECT b.digest FROM blobs b JOIN reached r ON b.subject = r.digest
    UNION SELECT t.digest FROM tags t JOIN reached r ON t.subject = r.digest
"""

_REACHABLE_FROM_PINS = (
    f"WITH RECURSIVE reached (digest) AS (SELECT digest FROM pins {REACHABLE_SQL})"
)
_REACHABLE_FROM_ONE = f"WITH RECURSIVE reached (digest) AS (SELECT ? {REACHABLE_SQL})"


def add(connection: sqlite3.Connection, repository_id: int, reference: Reference) -> None:
    """Pin an image, whether it is in the store or not."""
    if isinstance(reference, Tag):
        query = "SELECT digest FROM tags WHERE repository = ? AND tag = ?"
        row = connection.execute(query, (repository_id, reference)).fetchone()
        digest = row[0] if row else None
    else:
        digest = str(reference)
    connection.execute(
        "INSERT OR IGNORE INTO pins (repository, reference, digest) VALUES (?, ?, ?)",
        (repository_id, str(reference), digest),
    )
    if digest:
        mark_reachable(connection, digest)


def remove(connection: sqlite3.Connection, repository_id: int, reference: Reference) -> bool:
    """Delete a pin; return whether there was one. `recompute` must follow."""
    deleted = connection.execute(
        "DELETE FROM pins WHERE repository = ? AND reference = ?", (repository_id, str(reference))
    )
    return deleted.rowcount > 0


def update_tag(
    connection: sqlite3.Connection, repository_id: int, tag: Tag, digest: Digest
) -> None:
    """Move a pin of the tag to the digest that the tag names now."""
    moved = connection.execute(
        "UPDATE pins SET digest = ? WHERE repository = ? AND reference = ? AND digest IS NOT ?",
        (str(digest), repository_id, tag, str(digest)),
    )
    if moved.rowcount:
        recompute(connection)


def update_referrer(connection: sqlite3.Connection, subject: Digest, digest: Digest) -> None:
    """Pin what a tag for referrers of a pinned manifest names now."""
    query = "SELECT 1 FROM blobs WHERE digest = ? AND pinned"
    if connection.execute(query, (str(subject),)).fetchone():
        mark_reachable(connection, str(digest))


def is_reachable(connection: sqlite3.Connection, digest: str, subject: str | None) -> bool:
    """Tell whether a blob that is being added belongs to a pinned image."""
    query = """
        SELECT EXISTS (SELECT 1 FROM pins WHERE digest = :digest)
        OR EXISTS (SELECT 1 FROM blobs WHERE digest = :subject AND pinned)
        OR EXISTS (
            SELECT 1 FROM tags t JOIN blobs b ON b.digest = t.subject
            WHERE t.digest = :digest AND b.pinned)
        OR EXISTS (
            SELECT 1 FROM edges e JOIN blobs b ON b.digest = e.parent
            WHERE e.child = :digest AND b.pinned)
    """
    row = connection.execute(query, {"digest": digest, "subject": subject}).fetchone()
    return bool(row[0])


def mark_reachable(connection: sqlite3.Connection, digest: str) -> None:
    """Mark the stored blobs that `digest` reaches as pinned."""
    connection.execute(
        f"{_REACHABLE_FROM_ONE} UPDATE blobs SET pinned = 1"
        " WHERE digest IN (SELECT digest FROM reached) AND NOT pinned",
        (digest,),
    )


def recompute(connection: sqlite3.Connection) -> None:
    """Mark exactly the blobs that the pins reach as pinned."""
    connection.execute(
        f"{_REACHABLE_FROM_PINS} UPDATE blobs SET pinned = 0"
        " WHERE pinned AND digest NOT IN (SELECT digest FROM reached WHERE digest IS NOT NULL)"
    )
    connection.execute(
        f"{_REACHABLE_FROM_PINS} UPDATE blobs SET pinned = 1"
        " WHERE digest IN (SELECT digest FROM reached) AND NOT pinned"
    )
