"""What each tag meant, and since when: the history from which the age of content is known."""

import sqlite3

from proxy.oci.digest import Digest

# Digests that are kept of one tag, and of what one repository was asked for by digest.
MAX_TAG_HISTORY = 64

# Stands for the tag of content that was asked for by digest.
BY_DIGEST = ""

# The source of content that a bundle brought without saying since when it exists.
IMPORTED = "import"


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
