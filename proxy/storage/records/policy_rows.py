"""The rows of the index that policies keep, as values, and the queries that read them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.policy.facts import FIRST_SEEN, PUSHED, Badge, ContentAge, RepositoryFacts
from proxy.storage.records.tag_history import IMPORTED

_REPOSITORY = "(SELECT id FROM repositories WHERE upstream = ? AND name = ?)"

# Parameters: upstream, repository.
FACTS_SQL = (
    "SELECT badge, publisher, description, stars, pulls, archived, asked, source FROM facts"
    f" WHERE repository = {_REPOSITORY}"
)
# Parameters: upstream, repository, tag.
MEANINGS_SQL = (
    "SELECT digest, first_seen, last_seen, pushed, ripe, source FROM tag_history"
    f" WHERE repository = {_REPOSITORY} AND tag = ? ORDER BY last_seen DESC"
)
# Parameters: upstream, repository, digest.
MEANING_SQL = (
    "SELECT digest, first_seen, last_seen, pushed, ripe, source FROM tag_history"
    f" WHERE repository = {_REPOSITORY} AND digest = ?"
)
# Parameters: upstream, repository, digest.
EXCEPTION_SQL = (
    "SELECT made, until, reason FROM policy_exceptions"
    f" WHERE repository = {_REPOSITORY} AND digest = ?"
)


@dataclass(frozen=True, slots=True)
class TagMeaning:
    """A digest that a tag meant, from `first_seen` to `last_seen` as far as the cache knows.

    Times are Unix seconds. `pushed_at` is when Docker Hub says that it was pushed. `is_ripe` means that
    its minimum age has been reached once, whatever the clock says later. `source` is the bundle that said
    since when the content exists; `IMPORTED` for a bundle that did not say it; empty if this cache saw it.
    """

    digest: Digest
    first_seen: float
    last_seen: float
    pushed_at: float | None
    is_ripe: bool
    source: str = ""

    @property
    def age(self) -> ContentAge:
        """Since when the content exists, as far as is known."""
        if self.source == IMPORTED:
            return ContentAge(self.first_seen, "imported without facts", is_first_sight=True)
        if self.pushed_at is not None:
            told = f" in the {self.source}" if self.source else ""
            return ContentAge(self.pushed_at, f"{PUSHED}{told}")
        said = f"first seen elsewhere, says the {self.source}" if self.source else FIRST_SEEN
        return ContentAge(self.first_seen, said)


@dataclass(frozen=True, slots=True)
class PolicyException:
    """An image that is allowed until a time, whatever the policies say, and why."""

    repository: Repository
    digest: Digest
    made_at: float
    until: float
    reason: str


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """A decision of a policy about an image; `request` is its number in the log."""

    at: float
    policy: int
    decision: str
    image: str
    digest: str
    reason: str
    request: str


def to_facts(row: tuple[Any, ...]) -> RepositoryFacts:
    """Return a row of `FACTS_SQL`."""
    return RepositoryFacts(
        Badge(row[0]), row[1], row[2], row[3], row[4], bool(row[5]), row[6], row[7]
    )


def to_meaning(row: tuple[Any, ...]) -> TagMeaning:
    """Return a row of `MEANINGS_SQL` or `MEANING_SQL`."""
    return TagMeaning(Digest.parse(row[0]), row[1], row[2], row[3], bool(row[4]), row[5])


def combine_meanings(meanings: Iterable[TagMeaning]) -> TagMeaning | None:
    """Return what the meanings of one digest under several tags say together; None without any.

    Docker Hub's time counts before the first sight, and that before an import of unknown age.
    """
    known = sorted(
        meanings,
        key=lambda one: (
            one.source == IMPORTED,
            one.pushed_at is None,
            one.first_seen if one.pushed_at is None else one.pushed_at,
        ),
    )
    if not known:
        return None
    last_seen = max(one.last_seen for one in known)
    return replace(known[0], last_seen=last_seen, is_ripe=any(one.is_ripe for one in known))
