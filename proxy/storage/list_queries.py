"""Lists and searches of the index, a page at a time. `Index.read` runs these functions in a thread.

Repositories are listed under the names that clients pull by, in ASCII order: those of Docker Hub without
the upstream, the others after `<upstream>/`.
"""

import json
import sqlite3
from collections.abc import Callable, Collection, Sequence
from contextlib import closing

from proxy.oci.digest import Digest
from proxy.oci.reference import Repository

# Tags of one repository that are counted for a search.
MAX_COUNTED_TAGS = 100

# Docker Hub's official images, which people call `nginx` and the catalog `library/nginx`.
_OFFICIAL = "name >= 'library/' AND name < 'library0' AND instr(substr(name, 9), '/') = 0"
_OTHER = "(name < 'library/' OR name >= 'library0' OR instr(substr(name, 9), '/'))"
# What is known of the repository of a row of `catalog`.
_BADGE = """(
    SELECT f.badge FROM repositories r JOIN facts f ON f.repository = r.id
    WHERE r.upstream = catalog.upstream AND r.name =
        iif(catalog.upstream = 'docker.io', catalog.name, substr(catalog.name, length(catalog.upstream) + 2)))"""


def list_repositories(
    connection: sqlite3.Connection,
    after: str,
    count: int,
    is_allowed: Callable[[Repository], bool],
) -> list[Repository]:
    """Return up to `count` allowed repositories with a stored manifest whose names follow `after`."""
    found: list[Repository] = []
    query = "SELECT name, upstream FROM catalog WHERE name > ? ORDER BY name, upstream"
    with closing(connection.execute(query, (after,))) as rows:
        for name, upstream in rows:
            if len(found) == count:
                break
            repository = _to_repository(name, upstream)
            if is_allowed(repository):
                found.append(repository)
    return found


def search_repositories(
    connection: sqlite3.Connection,
    terms: Sequence[str],
    upstream: str | None,
    *,
    offset: int,
    count: int,
    is_allowed: Callable[[Repository], bool],
    unrestricted: Collection[str],
    badges: Collection[str] = (),
) -> tuple[list[Repository], int]:
    """Return some of the allowed repositories whose names contain all terms, and how many there are.

    Official images come first, then the others by name. Without an `upstream`, all are searched. All
    repositories of the `unrestricted` upstreams are allowed. With `badges`, only repositories with one of them
    are found; an official image has its badge by its name.
    """
    connection.create_function(
        "is_allowed", 2, lambda name, owner: is_allowed(_to_repository(name, owner))
    )
    official = _Selection(connection, f"FROM catalog WHERE {_OFFICIAL}")
    other = _Selection(connection, f"FROM catalog WHERE {_OTHER}")
    for selection, shown, badge in (
        (official, "substr(name, 9)", f"coalesce({_BADGE}, 'official')"),
        (other, "name", _BADGE),
    ):
        if badges:
            selection.require(f"{badge} IN ({', '.join('?' * len(badges))})", *badges)
        if upstream:
            selection.require("upstream = ?", upstream)
        for term in terms:
            selection.require(f"instr({shown}, ?) > 0", term)
        # A call of Python takes ten times as long as the rest of a row.
        if restricted := [one for one in _list_upstreams(connection) if one not in unrestricted]:
            marks = ", ".join("?" * len(restricted))
            condition = f"(upstream NOT IN ({marks}) OR is_allowed(name, upstream))"
            selection.require(condition, *restricted)
    officials, others = official.count(), other.count()
    found = official.read(offset, count) if offset < officials else []
    if others and len(found) < count:
        found += other.read(max(0, offset - officials), count - len(found))
    return found, officials + others


class _Selection:
    """Rows of `catalog`: a clause FROM with conditions and their parameters."""

    def __init__(self, connection: sqlite3.Connection, clause: str) -> None:
        self._connection = connection
        self._clause = clause
        self._parameters: list[str] = []

    def require(self, condition: str, *parameters: str) -> None:
        """Leave out the rows for which the condition does not hold."""
        self._clause += f" AND {condition}"
        self._parameters += parameters

    def count(self) -> int:
        """Return the number of rows."""
        row = self._connection.execute(f"SELECT count(*) {self._clause}", self._parameters)
        return int(row.fetchone()[0])

    def read(self, offset: int, count: int) -> list[Repository]:
        """Return a page of the rows by name."""
        query = f"SELECT name, upstream {self._clause} ORDER BY name LIMIT ? OFFSET ?"
        rows = self._connection.execute(query, (*self._parameters, count, offset))
        return [_to_repository(*row) for row in rows]


def _list_upstreams(connection: sqlite3.Connection) -> list[str]:
    """Return the upstreams that have repositories in the index."""
    # One row for each upstream; DISTINCT would read all repositories.
    rows = connection.execute(
        "WITH RECURSIVE found (upstream) AS (SELECT min(upstream) FROM repositories UNION ALL"
        " SELECT (SELECT min(upstream) FROM repositories WHERE upstream > found.upstream) FROM found"
        " WHERE upstream IS NOT NULL) SELECT upstream FROM found WHERE upstream IS NOT NULL"
    )
    return [str(row[0]) for row in rows]


def list_tags(connection: sqlite3.Connection, repository: Repository, count: int) -> list[str]:
    """Return up to `count` cached tags of the repository, in ASCII order."""
    rows = connection.execute(
        "SELECT tag FROM tags WHERE repository ="
        " (SELECT id FROM repositories WHERE upstream = ? AND name = ?) ORDER BY tag LIMIT ?",
        (repository.upstream, repository.name, count),
    )
    return [str(row[0]) for row in rows]


def count_stored_tags(
    connection: sqlite3.Connection, repositories: Sequence[Repository]
) -> dict[Repository, int]:
    """Return how many tags of each repository are stored, up to `MAX_COUNTED_TAGS`; none without any."""
    rows = connection.execute(
        "SELECT r.upstream, r.name, (SELECT count(*) FROM (SELECT 1 FROM tags t"
        " CROSS JOIN blobs b ON b.digest = t.digest WHERE t.repository = r.id LIMIT ?)) AS stored"
        " FROM json_each(?) wanted CROSS JOIN repositories r ON"
        " r.upstream = wanted.value ->> 0 AND r.name = wanted.value ->> 1 WHERE stored",
        (MAX_COUNTED_TAGS, json.dumps([(one.upstream, one.name) for one in repositories])),
    )
    return {Repository(upstream, name): count for upstream, name, count in rows}


def is_listed_referrer(
    connection: sqlite3.Connection, repository: Repository, digest: Digest
) -> bool:
    """Tell whether a preload found the manifest in a list of referrers; it may not be stored."""
    rows = connection.execute(
        "SELECT 1 FROM referrer_records WHERE repository ="
        " (SELECT id FROM repositories WHERE upstream = ? AND name = ?) AND instr(record, ?) LIMIT 1",
        (repository.upstream, repository.name, f'"{digest}"'),
    )
    return rows.fetchone() is not None


def _to_repository(name: str, upstream: str) -> Repository:
    return Repository(
        upstream, name if upstream == "docker.io" else name.removeprefix(f"{upstream}/")
    )
