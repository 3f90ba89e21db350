"""What each tag meant, and since when: the history from which the age of content is known."""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from proxy.oci.digest import Digest
from proxy.oci.reference import Repository

# Digests that are kept of one tag, and of what one repository was asked for by digest.
MAX_TAG_HISTORY = 64

# Images that stand in for content that is too young, and that are kept for it.
MAX_STAND_INS = 1000
# Blobs that are kept for them.
MAX_KEPT_BLOBS = 20_000

# Stands for the tag of content that was asked for by digest.
BY_DIGEST = ""

# The source of content that a bundle brought without saying since when it exists.
IMPORTED = "import"


@dataclass(frozen=True, slots=True)
class StandIn:
    """What a tag means instead of its newest content, which exists since `newest_since` in Unix time."""

    repository: Repository
    digest: Digest
    newest_since: float


def record(
    connection: sqlite3.Connection,
    repository_id: int,
    tag: str,
    digest: Digest,
    at: float,
    pushed_at: float | None = None,
    *,
    source: str = "",
) -> None:
    """Record that a tag means the digest at the Unix time `at`, and when it was pushed if known.

    `source` is kept if the digest is new to the tag.
    """
    connection.execute(
        "INSERT INTO tag_history (repository, tag, digest, first_seen, last_seen, pushed, source)"
        " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (repository, tag, digest) DO UPDATE SET"
        " last_seen = max(last_seen, excluded.last_seen), pushed = coalesce(excluded.pushed, pushed),"
        " source = iif(excluded.pushed IS NULL, source, excluded.source)",
        (repository_id, tag, str(digest), at, at, pushed_at, source),
    )
    connection.execute(
        "DELETE FROM tag_history WHERE repository = ? AND tag = ? AND digest NOT IN (SELECT digest"
        " FROM tag_history WHERE repository = ? AND tag = ? ORDER BY last_seen DESC LIMIT ?)",
        (repository_id, tag, repository_id, tag, MAX_TAG_HISTORY),
    )


def add_said_age(
    connection: sqlite3.Connection,
    repository_id: int,
    tag: str,
    digest: Digest,
    *,
    first_seen: float,
    pushed_at: float | None,
    is_ripe: bool,
    source: str,
) -> None:
    """Record what a bundle, the `source`, says about the age of content that a tag means.

    It makes content older, never younger, and leaves what Docker Hub told this cache itself.
    """
    key = {"repository": repository_id, "tag": tag, "digest": str(digest)}
    said = {"first_seen": first_seen, "pushed": pushed_at, "source": source}
    where = "WHERE repository = :repository AND tag = :tag AND digest = :digest"
    connection.execute(
        f"UPDATE tag_history SET first_seen = :first_seen, pushed = :pushed, source = :source {where}"
        f" AND (source = '{IMPORTED}' OR (pushed IS NULL OR source <> '')"
        " AND coalesce(:pushed, :first_seen) < coalesce(pushed, first_seen))",
        key | said,
    )
    if is_ripe:
        connection.execute(f"UPDATE tag_history SET ripe = 1 {where}", key)


def find_stand_ins(connection: sqlite3.Connection, since: float) -> list[StandIn]:
    """Return what tags mean whose newest content was not ripe yet and exists since later than `since`.

    At most `MAX_STAND_INS`, those that have to stand in for longest.
    """
    rows = connection.execute(
        "SELECT upstream, name, t.digest, coalesce(h.pushed, h.first_seen) AS since FROM tag_history h"
        " JOIN tags t ON t.repository = h.repository AND t.tag = h.tag"
        " JOIN repositories r ON r.id = h.repository"
        " WHERE NOT h.ripe AND t.digest <> h.digest AND since > ? AND h.last_seen ="
        " (SELECT max(last_seen) FROM tag_history WHERE repository = h.repository AND tag = h.tag)"
        " ORDER BY since DESC LIMIT ?",
        (since, MAX_STAND_INS),
    )
    return [StandIn(Repository(*row[:2]), Digest.parse(row[2]), row[3]) for row in rows]


@dataclass(frozen=True, slots=True)
class YoungContent:
    """The newest content of a tag, which exists since `since` in Unix time and has not been found ripe.

    `served` is what the tag means here; None if the tag means nothing here.
    """

    repository: Repository
    tag: str
    digest: Digest
    since: float
    served: Digest | None


def find_young(connection: sqlite3.Connection, since: float, limit: int) -> list[YoungContent]:
    """Return the newest content of tags that exists since later than `since`, what ripens first at the head."""
    rows = connection.execute(
        "SELECT r.upstream, r.name, h.tag, h.digest, coalesce(h.pushed, h.first_seen) AS since, t.digest"
        " FROM tag_history h JOIN repositories r ON r.id = h.repository"
        " LEFT JOIN tags t ON t.repository = h.repository AND t.tag = h.tag"
        " WHERE NOT h.ripe AND since > ? AND h.tag <> '' AND h.last_seen ="
        " (SELECT max(last_seen) FROM tag_history WHERE repository = h.repository AND tag = h.tag)"
        " ORDER BY since LIMIT ?",
        (since, limit),
    )
    return [
        YoungContent(
            Repository(upstream, name),
            tag,
            Digest.parse(digest),
            at,
            Digest.parse(served) if served else None,
        )
        for upstream, name, tag, digest, at, served in rows
    ]


def find_below(connection: sqlite3.Connection, digests: Sequence[Digest]) -> frozenset[Digest]:
    """Return the digests and those of everything below them that is stored, up to `MAX_KEPT_BLOBS`."""
    rows = connection.execute(
        "WITH RECURSIVE below (digest) AS (SELECT value FROM json_each(?)"
        " UNION SELECT e.child FROM edges e JOIN below b ON e.parent = b.digest)"
        " SELECT digest FROM below JOIN blobs USING (digest) LIMIT ?",
        (json.dumps([*map(str, digests)]), MAX_KEPT_BLOBS),
    )
    return frozenset(Digest.parse(row[0]) for row in rows)
