"""Queries for what takes the space of a store, and for what goes next."""

import sqlite3
from dataclasses import dataclass

from proxy.oci.reference import Repository

# The number of repositories, or of upstreams, that each stored blob belongs to is counted once.
_BY_REPOSITORY = """
    WITH owners (digest, count) AS (SELECT digest, count(*) FROM links GROUP BY digest)
    SELECT r.upstream, r.name, sum(b.size),
        coalesce(sum(b.size) FILTER (WHERE o.count = 1), 0),
        coalesce(sum(b.size) FILTER (WHERE b.pinned), 0),
        coalesce(sum(b.size) FILTER (WHERE o.count = 1 AND NOT b.pinned), 0)
    FROM links l JOIN blobs b USING (digest) JOIN owners o USING (digest)
    JOIN repositories r ON r.id = l.repository
    GROUP BY r.id ORDER BY sum(b.size) DESC, r.upstream, r.name
"""
_BY_UPSTREAM = """
    WITH held (upstream, digest) AS (
        SELECT DISTINCT r.upstream, l.digest FROM links l JOIN repositories r ON r.id = l.repository),
    owners (digest, count) AS (SELECT digest, count(*) FROM held GROUP BY digest)
    SELECT h.upstream, '', sum(b.size),
        coalesce(sum(b.size) FILTER (WHERE o.count = 1), 0),
        coalesce(sum(b.size) FILTER (WHERE b.pinned), 0),
        coalesce(sum(b.size) FILTER (WHERE o.count = 1 AND NOT b.pinned), 0)
    FROM held h JOIN blobs b USING (digest) JOIN owners o USING (digest)
    GROUP BY h.upstream ORDER BY sum(b.size) DESC, h.upstream
"""
_OLDEST = """
    SELECT b.size, b.used, r.upstream, r.name FROM (
        SELECT digest, size, used FROM blobs WHERE NOT pinned ORDER BY used LIMIT ?) b
    LEFT JOIN repositories r ON r.id = (SELECT min(repository) FROM links WHERE digest = b.digest)
    ORDER BY b.used
"""


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of the blobs of a repository or, if its name is empty, of an upstream.

    `unique` are those that no other has, `reclaimable` those of them that are not pinned.
    """

    upstream: str
    name: str
    size: int
    unique: int
    pinned: int
    reclaimable: int


@dataclass(frozen=True, slots=True)
class OldBlob:
    """A blob, when it was last used, and a repository that has it, None if none does."""

    size: int
    used: float
    repository: Repository | None


def usage_by_upstream(connection: sqlite3.Connection) -> list[Usage]:
    """Return the usage of each upstream, the largest first."""
    return [Usage(*row) for row in connection.execute(_BY_UPSTREAM)]


def usage_by_repository(connection: sqlite3.Connection, limit: int = -1) -> list[Usage]:
    """Return the usage of each repository, the largest first; at most `limit`, unless it is negative."""
    return [Usage(*row) for row in connection.execute(f"{_BY_REPOSITORY} LIMIT ?", (limit,))]


def oldest_blobs(connection: sqlite3.Connection, count: int) -> list[OldBlob]:
    """Return the blobs that eviction takes first."""
    return [
        OldBlob(size, used, Repository(upstream, name) if upstream else None)
        for size, used, upstream, name in connection.execute(_OLDEST, (count,))
    ]
