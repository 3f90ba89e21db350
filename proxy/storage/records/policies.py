"""What policies remember in the index: facts, what tags meant when, exceptions and decisions.

`Index.set_tag` writes the history of tags, also without policies, so that the age of content is known
when one is added.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from functools import partial

from proxy.oci.digest import Digest
from proxy.oci.reference import Repository, Tag
from proxy.policy.facts import DOCKER_HUB, RepositoryFacts
from proxy.storage import index_writes
from proxy.storage.index import Index
from proxy.storage.records import tag_history
from proxy.storage.records.policy_rows import (
    EXCEPTION_SQL,
    FACTS_SQL,
    MEANING_SQL,
    MEANINGS_SQL,
    DecisionRecord,
    PolicyException,
    TagMeaning,
    combine_meanings,
    to_facts,
    to_meaning,
)

# Decisions that are kept.
MAX_DECISIONS = 10_000
# Exceptions that are kept, ended ones included.
MAX_EXCEPTIONS = 1_000

_REPOSITORY = "(SELECT id FROM repositories WHERE upstream = ? AND name = ?)"


class PolicyRecords:
    """Reads in the event loop, writes in the index's thread. Writes raise `StorageError`."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def facts(self, repository: Repository) -> RepositoryFacts | None:
        """Return the facts that were last said about a repository."""
        return self._index.lookup(FACTS_SQL, to_facts, repository)

    async def set_facts(self, said: Iterable[tuple[Repository, RepositoryFacts]]) -> None:
        """Keep facts about repositories, in place of older ones, and Docker Hub's in place of a bundle's."""
        await self._index.transact(_set_facts, list(said))

    def meanings(self, repository: Repository, tag: Tag | None) -> list[TagMeaning]:
        """Return what a tag meant, the most recent first; for None what was asked for by digest."""
        parameters = (repository.upstream, repository.name, tag or tag_history.BY_DIGEST)
        return [to_meaning(row) for row in self._index.select(MEANINGS_SQL, parameters)]

    def meaning(self, repository: Repository, digest: Digest) -> TagMeaning | None:
        """Return since when the repository is known to hold the digest, under any tag."""
        parameters = (repository.upstream, repository.name, str(digest))
        return combine_meanings(map(to_meaning, self._index.select(MEANING_SQL, parameters)))

    def has_history(self, repository: Repository, tag: Tag | None, digest: Digest) -> bool:
        """Tell whether the cache knows other content of the tag; for None, of the repository.

        Content that was imported, and not served yet, does not count.
        """
        condition = "" if tag is None else " AND tag = ?"
        names = (repository.upstream, repository.name)
        return bool(
            self._index.select(
                f"SELECT 1 FROM tag_history WHERE repository = {_REPOSITORY} AND digest <> ?"
                f" AND (ripe OR source <> '{tag_history.IMPORTED}'){condition} LIMIT 1",
                (*names, str(digest), *(() if tag is None else (tag,))),
            )
        )

    async def record_meaning(
        self,
        repository: Repository,
        tag: Tag | None,
        digest: Digest,
        at: float,
        pushed_at: float | None = None,
    ) -> None:
        """Record that a tag means the digest now, or that the digest was asked for without a tag."""
        await self._index.transact(
            _record_meaning, repository, tag or tag_history.BY_DIGEST, digest, at, pushed_at
        )

    async def add_bundle_facts(
        self,
        facts: Sequence[tuple[Repository, RepositoryFacts]],
        ages: Sequence[tuple[Repository, Tag | None, TagMeaning]],
    ) -> None:
        """Keep what a bundle says about repositories, and about the age of content that was imported.

        Newer facts stay, and so does what Docker Hub has told this cache about the age.
        """
        await self._index.transact(_add_bundle_facts, facts, ages, is_durable=True)

    async def mark_ripe(self, repository: Repository, digest: Digest) -> None:
        """Record that the content has reached its minimum age."""
        await self._index.transact(_mark_ripe, repository, digest)

    def exception(
        self, repository: Repository, digest: Digest, now: float
    ) -> PolicyException | None:
        """Return the exception for an image that has not ended at the time `now`."""
        found = self._index.lookup(
            EXCEPTION_SQL,
            lambda row: PolicyException(repository, digest, *row),
            repository,
            digest,
        )
        return found if found and found.until > now else None

    def exceptions(self) -> list[PolicyException]:
        """Return all exceptions, those that end last first."""
        rows = self._index.select(
            "SELECT upstream, name, digest, made, until, reason FROM policy_exceptions"
            " JOIN repositories ON id = repository ORDER BY until DESC"
        )
        return [
            PolicyException(Repository(*row[:2]), Digest.parse(row[2]), *row[3:]) for row in rows
        ]

    async def add_exception(self, exception: PolicyException) -> None:
        """Add an exception, or replace the one for the same image."""
        await self._index.transact(_add_exception, exception, is_durable=True)

    async def remove_exception(self, repository: Repository, digest: Digest) -> bool:
        """Remove the exception for an image; return whether there was one."""
        return await self._index.transact(_remove_exception, repository, digest, is_durable=True)

    async def young_content(self, since: float, limit: int) -> list[tag_history.YoungContent]:
        """Return the newest content of tags that exists since later than `since`."""
        return await self._index.read(partial(tag_history.find_young, since=since, limit=limit))

    async def add_decisions(self, decisions: Iterable[DecisionRecord]) -> None:
        """Add decisions; beyond `MAX_DECISIONS` the oldest are forgotten."""
        await self._index.transact(_add_decisions, list(decisions))

    def decisions(self, since: float, decision: str, limit: int) -> list[DecisionRecord]:
        """Return up to `limit` decisions from `since` on, the latest first; all kinds if empty."""
        rows = self._index.select(
            "SELECT at, policy, decision, image, digest, reason, request FROM policy_decisions"
            " WHERE at >= ? AND (? = '' OR decision = ?) ORDER BY id DESC LIMIT ?",
            (since, decision, decision, limit),
        )
        return [DecisionRecord(*row) for row in rows]


def _set_facts(
    connection: sqlite3.Connection, said: list[tuple[Repository, RepositoryFacts]]
) -> None:
    for repository, facts in said:
        connection.execute(
            "INSERT INTO facts (repository, badge, publisher, description, stars, pulls, archived,"
            " asked, source) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (repository) DO UPDATE SET"
            " badge = excluded.badge, publisher = excluded.publisher, description ="
            " excluded.description, stars = excluded.stars, pulls = excluded.pulls, archived ="
            " excluded.archived, asked = excluded.asked, source = excluded.source WHERE"
            f" excluded.asked > asked OR excluded.source = '{DOCKER_HUB}'"
            f" AND (excluded.asked = asked OR source <> '{DOCKER_HUB}')",
            (
                index_writes.repository_id(connection, repository),
                facts.badge.value,
                facts.publisher,
                facts.description,
                facts.stars,
                facts.pulls,
                facts.is_archived,
                facts.asked_at,
                facts.source,
            ),
        )


def _record_meaning(
    connection: sqlite3.Connection,
    repository: Repository,
    tag: str,
    digest: Digest,
    at: float,
    pushed_at: float | None,
) -> None:
    number = index_writes.repository_id(connection, repository)
    tag_history.record(connection, number, tag, digest, at, pushed_at)


def _add_bundle_facts(
    connection: sqlite3.Connection,
    facts: list[tuple[Repository, RepositoryFacts]],
    ages: list[tuple[Repository, Tag | None, TagMeaning]],
) -> None:
    _set_facts(connection, facts)
    for repository, tag, meaning in ages:
        number = index_writes.repository_id(connection, repository)
        name, at = tag or tag_history.BY_DIGEST, meaning.last_seen
        tag_history.record(
            connection, number, name, meaning.digest, at, source=tag_history.IMPORTED
        )
        tag_history.add_said_age(
            connection,
            number,
            name,
            meaning.digest,
            first_seen=meaning.first_seen,
            pushed_at=meaning.pushed_at,
            is_ripe=meaning.is_ripe,
            source=meaning.source,
        )


def _mark_ripe(connection: sqlite3.Connection, repository: Repository, digest: Digest) -> None:
    connection.execute(
        f"UPDATE tag_history SET ripe = 1 WHERE repository = {_REPOSITORY} AND digest = ?",
        (repository.upstream, repository.name, str(digest)),
    )


def _add_exception(connection: sqlite3.Connection, exception: PolicyException) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO policy_exceptions (repository, digest, made, until, reason)"
        " VALUES (?, ?, ?, ?, ?)",
        (
            index_writes.repository_id(connection, exception.repository),
            str(exception.digest),
            exception.made_at,
            exception.until,
            exception.reason,
        ),
    )
    connection.execute(
        "DELETE FROM policy_exceptions WHERE (repository, digest) NOT IN (SELECT repository, digest"
        " FROM policy_exceptions ORDER BY until DESC LIMIT ?)",
        (MAX_EXCEPTIONS,),
    )


def _remove_exception(
    connection: sqlite3.Connection, repository: Repository, digest: Digest
) -> bool:
    deleted = connection.execute(
        f"DELETE FROM policy_exceptions WHERE repository = {_REPOSITORY} AND digest = ?",
        (repository.upstream, repository.name, str(digest)),
    )
    return deleted.rowcount > 0


def _add_decisions(connection: sqlite3.Connection, decisions: list[DecisionRecord]) -> None:
    connection.executemany(
        "INSERT INTO policy_decisions (at, policy, decision, image, digest, reason, request)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        [astuple(decision) for decision in decisions],
    )
    connection.execute(
        "DELETE FROM policy_decisions WHERE id <= (SELECT max(id) FROM policy_decisions) - ?",
        (MAX_DECISIONS,),
    )
