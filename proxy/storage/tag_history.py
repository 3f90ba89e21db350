"""What each tag meant, and since when: the history from which the age of content is known."""

import sqlite3

from proxy.oci.digest import Digest

# Digests that are kept of one tag, and of what one repository was asked for by digest.
MAX_TAG_HISTORY = 64

# Stands for the tag of content that was asked for by digest.
BY_DIGEST = ""


def record(
    connection: sqlite3.Connection,
    repository_id: int,
    tag: str,
    digest: Digest,
    at: float,
    pushed_at: float | None = None,
) -> None:
    """Record that a tag means the digest at the Unix time `at`, and when it was pushed if known."""
    connection.execute(
        "INSERT INTO tag_history (repository, tag, digest, first_seen, last_seen, pushed)"
        " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (repository, tag, digest) DO UPDATE SET"
        " last_seen = max(last_seen, excluded.last_seen), pushed = coalesce(excluded.pushed, pushed)",
        (repository_id, tag, str(digest), at, at, pushed_at),
    )
    connection.execute(
        "DELETE FROM tag_history WHERE repository = ? AND tag = ? AND digest NOT IN (SELECT digest"
        " FROM tag_history WHERE repository = ? AND tag = ? ORDER BY last_seen DESC LIMIT ?)",
        (repository_id, tag, repository_id, tag, MAX_TAG_HISTORY),
    )
