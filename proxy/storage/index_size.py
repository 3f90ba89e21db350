"""The size of the index: its pages, and the rows to delete when it takes too much of the store.

Everything in the index belongs to a manifest (its edges) or to a repository (its links and tags), and
both are ordered by their last use.
"""

import heapq
import sqlite3
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing, suppress
from operator import itemgetter
from typing import NamedTuple

from proxy.oci.digest import Digest

# Bytes of a page of the index: SQLite's default.
PAGE_SIZE = 4096
# Bytes that a row of `edges` or `links` takes with its indexes, or a repository, an image tag, or a blob.
ROW_SIZE = 400
# Pages that adding such a row changes at most, and thus adds to the log.
PAGES_PER_ROW = 3
# Manifests chosen at a time to make room in the index.
_MAX_VICTIMS = 64


class IndexVictims(NamedTuple):
    """Rows to delete from the index: manifests, and ids of repositories. They take about `size` bytes."""

    manifests: list[Digest]
    repositories: list[int]
    size: int


def vacuum(connection: sqlite3.Connection) -> None:
    """Write the index anew, without free pages, if the disk has room for a copy. Not in a transaction."""
    with suppress(sqlite3.OperationalError):
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def release_pages(connection: sqlite3.Connection, count: int) -> None:
    """Give up to `count` free pages back to the file system. Not in a transaction."""
    # The checkpoint makes the file shorter.
    connection.executescript(f"PRAGMA incremental_vacuum({count}); PRAGMA wal_checkpoint")


def truncate_log(connection: sqlite3.Connection) -> None:
    """Shorten the log that a large transaction has left, unless another connection reads from it."""
    connection.executescript("PRAGMA wal_checkpoint(TRUNCATE)")


def count_pages(connection: sqlite3.Connection) -> tuple[int, int]:
    """Return the number of pages that the index uses, and of those that are free."""
    (total,) = connection.execute("PRAGMA page_count").fetchone()
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    return total - free, free


def delete_empty_repositories(connection: sqlite3.Connection, numbers: Iterable[int]) -> None:
    """Delete those repositories of which the index knows nothing any more, not even the history of a tag."""
    tables = ("links", "tags", "pins", "tag_history", "facts", "policy_exceptions")
    conditions = "".join(
        f" AND NOT EXISTS (SELECT 1 FROM {table} WHERE repository = id)" for table in tables
    )
    connection.executemany(
        f"DELETE FROM repositories WHERE id = ?{conditions}", [(number,) for number in numbers]
    )


def choose_victims(
    connection: sqlite3.Connection, size: int, spared: Collection[str]
) -> IndexVictims:
    """Return the least recently used manifests and repositories, whose rows take about `size` bytes.

    Pinned and spared manifests, and repositories with pins or exceptions of policies, are left out.
    """
    manifests = connection.execute(
        "SELECT used, digest, (SELECT count(*) FROM edges WHERE parent = digest)"
        " FROM blobs WHERE media_type IS NOT NULL AND NOT pinned ORDER BY used"
    )
    repositories = connection.execute(
        "SELECT used, id, (SELECT count(*) FROM links WHERE repository = id)"
        " + (SELECT count(*) FROM tags WHERE repository = id)"
        " + (SELECT count(*) FROM tag_history WHERE repository = id) FROM repositories"
        " WHERE NOT EXISTS (SELECT 1 FROM pins WHERE repository = id)"
        " AND NOT EXISTS (SELECT 1 FROM policy_exceptions WHERE repository = id) ORDER BY used"
    )
    victims = IndexVictims([], [], 0)
    with closing(manifests), closing(repositories):
        for _, victim, rows in heapq.merge(manifests, repositories, key=itemgetter(0)):
            if victims.size >= size or len(victims.manifests) == _MAX_VICTIMS:
                break
            if isinstance(victim, int):
                victims.repositories.append(victim)
            elif victim not in spared:
                victims.manifests.append(Digest.parse(victim))
            else:
                continue
            victims = victims._replace(size=victims.size + (rows + 1) * ROW_SIZE)
    return victims


def delete_repositories(connection: sqlite3.Connection, numbers: Sequence[int]) -> None:
    """Delete repositories with all that the index knows of them; their blobs stay."""
    parameters = [(number,) for number in numbers]
    # None of it may stay: the ids are used again.
    for table in ("links", "tags", "tag_history", "referrer_records", "facts"):
        connection.executemany(f"DELETE FROM {table} WHERE repository = ?", parameters)
    connection.executemany("DELETE FROM repositories WHERE id = ?", parameters)
