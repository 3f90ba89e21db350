"""Which blobs the rules by repository let go: what is over a quota, and what is idle.

A blob of several repositories belongs to the first rule, by number, of those that match them. The rules
are matched in Python against the repositories, of which there are few; the rest is SQL on a connection
that only reads, in a thread.
"""

import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.repository_rules import DEFAULT_RULE
from proxy.storage.index_writes import allocated_size_sql

# Returns the number of the rule that a repository (`docker.io/library/nginx`) belongs to, 0 for none.
FindRule = Callable[[str], int]

# Blobs of one rule that one plan lets go.
MAX_PLANNED_BLOBS = 1000
# Blobs that one sweep looks at, of those that are idle by the shortest time.
MAX_IDLE_CANDIDATES = 20_000

# The first rule of each blob that belongs to any.
_OWNED = (
    "SELECT l.digest, min(q.rule) AS rule FROM ruled q CROSS JOIN links l ON l.repository = q.repository"
    " GROUP BY l.digest"
)
_USAGE_SQL = (
    f"SELECT rule, sum({allocated_size_sql('b.size')}) FROM ({_OWNED}) o CROSS JOIN blobs b"
    " ON b.digest = o.digest GROUP BY rule"
)
_VICTIMS_SQL = (
    f"SELECT b.digest, {allocated_size_sql('b.size')}, b.used FROM ({_OWNED}) o CROSS JOIN blobs b"
    " ON b.digest = o.digest WHERE o.rule = ? AND NOT b.pinned ORDER BY b.used LIMIT ?"
)
_OWNER_SQL = (
    "SELECT r.upstream, r.name FROM links l CROSS JOIN ruled q ON q.repository = l.repository"
    " CROSS JOIN repositories r ON r.id = l.repository WHERE l.digest = ? ORDER BY q.rule LIMIT 1"
)
_CANDIDATES_SQL = (
    "SELECT b.digest, b.used, coalesce((SELECT min(q.rule) FROM links l CROSS JOIN ruled q"
    " ON q.repository = l.repository WHERE l.digest = b.digest), ?) FROM blobs b"
    " WHERE NOT b.pinned AND b.used > ? AND b.used < ? ORDER BY b.used LIMIT ?"
)


class QuotaUsage(NamedTuple):
    """The bytes that blobs of a rule take on disk, and those that are over its share."""

    used: int
    excess: int


class ExcessBlob(NamedTuple):
    """A blob of a rule that is over its quota: bytes on disk, and Unix time of the last use."""

    digest: Digest
    size: int
    used: float


class IdleBlobs(NamedTuple):
    """Idle blobs, and the time of use up to which all blobs were looked at; None if there are no more."""

    digests: list[Digest]
    looked_up_to: float | None


def quota_usage(
    connection: sqlite3.Connection, find_rule: FindRule, limits: Mapping[int, int]
) -> dict[int, QuotaUsage]:
    """Return the usage of each rule with a limit in bytes."""
    _fill_ruled(connection, find_rule)
    used = dict(connection.execute(_USAGE_SQL).fetchall())
    return {
        rule: QuotaUsage(used.get(rule, 0), max(0, used.get(rule, 0) - limit))
        for rule, limit in limits.items()
    }


def over_quota(
    connection: sqlite3.Connection,
    find_rule: FindRule,
    limits: Mapping[int, int],
    spared: Collection[Digest],
) -> list[ExcessBlob]:
    """Return the least recently used blobs of the rules over their limit, as many as are over."""
    victims: list[ExcessBlob] = []
    names = {*map(str, spared)}
    for rule, usage in quota_usage(connection, find_rule, limits).items():
        excess = usage.excess
        if excess <= 0:
            continue
        rows = connection.execute(_VICTIMS_SQL, (rule, MAX_PLANNED_BLOBS + len(names)))
        for name, size, used in rows:
            if excess <= 0:
                break
            if name not in names:
                victims.append(ExcessBlob(Digest.parse(name), size, used))
                excess -= size
        rows.close()
    return victims


def over_quota_by_repository(
    connection: sqlite3.Connection, find_rule: FindRule, limits: Mapping[int, int]
) -> list[tuple[ExcessBlob, Repository]]:
    """Return what `over_quota` does, each blob with the repository that it counts for."""
    found = over_quota(connection, find_rule, limits, ())
    return [
        (one, Repository(*connection.execute(_OWNER_SQL, (str(one.digest),)).fetchone()))
        for one in found
    ]


def idle_blobs(
    connection: sqlite3.Connection,
    find_rule: FindRule,
    max_idles: Mapping[int, float],
    now: float,
    after: float,
    count: int,
) -> IdleBlobs:
    """Return up to `count` blobs, last used after the time `after`, that are idle by their rule."""
    shortest = min(seconds for seconds in max_idles.values() if seconds)
    _fill_ruled(connection, find_rule)
    rows = connection.execute(
        _CANDIDATES_SQL, (DEFAULT_RULE, after, now - shortest, MAX_IDLE_CANDIDATES)
    )
    found: list[Digest] = []
    looked_at = 0
    for name, used, rule in rows:
        looked_at += 1
        after = used
        seconds = max_idles[rule]
        if seconds and used < now - seconds:
            found.append(Digest.parse(name))
            if len(found) == count:
                break
    rows.close()
    is_end = len(found) < count and looked_at < MAX_IDLE_CANDIDATES
    return IdleBlobs(found, None if is_end else after)


def _fill_ruled(connection: sqlite3.Connection, find_rule: FindRule) -> None:
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute(
        "CREATE TEMP TABLE IF NOT EXISTS ruled (repository INTEGER PRIMARY KEY, rule INTEGER NOT NULL)"
    )
    connection.execute("BEGIN")
    try:
        connection.execute("DELETE FROM ruled")
        connection.executemany("INSERT INTO ruled VALUES (?, ?)", _ruled(connection, find_rule))
    finally:
        connection.execute("COMMIT")


def _ruled(connection: sqlite3.Connection, find_rule: FindRule) -> Iterator[tuple[int, int]]:
    rows = connection.execute("SELECT id, upstream, name FROM repositories").fetchall()
    for number, upstream, name in rows:
        if rule := find_rule(f"{upstream}/{name}"):
            yield number, rule
