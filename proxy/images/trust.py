"""What is known about the publisher of an image, what its tag meant, and what the policies say of it.

Nothing is asked: these are the facts in the index.
"""

from collections.abc import Sequence

import msgspec

from proxy.names import policy_name
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository, Tag
from proxy.policy.facts import FIRST_SEEN, Badge, ContentAge, ImageFacts, is_official
from proxy.policy.judge import PolicyDecision, judge
from proxy.policy.rules import RuleSet
from proxy.storage.image_queries import ImageQueries
from proxy.timestamps import to_seconds


class TrustSummary(msgspec.Struct, frozen=True):
    """What `source` said about a repository at the Unix time `asked`; 0 if only the name says it."""

    badge: Badge
    publisher: str = ""
    description: str = ""
    stars: int = 0
    pulls: int = 0
    is_archived: bool = False
    asked: int = 0
    source: str = ""


class PolicySummary(msgspec.Struct, frozen=True):
    """What policy number `policy` says about an image; `is_allowed` is also true if it only audits.

    `until` is when that ends, in Unix time: an unripe image may be pulled, or an exception is over.
    """

    policy: int
    mode: str
    decision: str
    is_allowed: bool
    reason: str
    until: int | None


class MeaningSummary(msgspec.Struct, frozen=True):
    """A digest that a tag meant from `first_seen` to `last_seen`, in Unix time.

    `pushed` is when Docker Hub says that it was pushed. `source` is the bundle that says so, `import` for one
    without facts, empty if this cache saw it.
    """

    digest: str
    first_seen: int
    last_seen: int
    pushed: int | None
    source: str


def describe_trust(queries: ImageQueries, repository: Repository) -> TrustSummary:
    """Return what is known about the publisher of a repository."""
    facts = queries.facts(repository)
    badge = Badge.OFFICIAL if is_official(policy_name(repository)) else Badge.NOT_ASKED
    if facts is None:
        return TrustSummary(badge)
    return TrustSummary(
        facts.badge if badge is Badge.NOT_ASKED else badge,
        facts.publisher,
        facts.description,
        facts.stars,
        facts.pulls,
        facts.is_archived,
        to_seconds(facts.asked_at),
        facts.source,
    )


def describe_policy(
    queries: ImageQueries,
    rules: RuleSet,
    repository: Repository,
    reference: Reference,
    digest: Digest,
    now: float,
) -> PolicySummary | None:
    """Return what the policies say about a stored image by the facts in the index.

    None if no rule is about it. An image of unknown age counts as seen for the first time.
    """
    rule = rules.find(policy_name(repository))
    if rule is None:
        return None
    until = queries.exception_end(repository, digest, now)
    if until is not None:
        decision, reason = PolicyDecision.ALLOW, "an exception allows it"
    else:
        meaning = queries.meaning(repository, digest)
        facts = ImageFacts(
            policy_name(repository),
            reference if isinstance(reference, Tag) else None,
            describe_trust(queries, repository).badge,
            has_badges=True,
            age=meaning.age if meaning else ContentAge(now, FIRST_SEEN, is_first_sight=True),
            is_ripe=meaning is not None and meaning.is_ripe,
        )
        verdict = judge(rule.settings, facts, now)
        decision, reason, until = verdict.decision, verdict.reason, verdict.until
    is_allowed = decision is PolicyDecision.ALLOW or rule.settings.mode == "audit"
    return PolicySummary(
        rule.number, rule.settings.mode, decision.value, is_allowed, reason, to_seconds(until)
    )


def describe_history(
    queries: ImageQueries, repository: Repository, reference: Reference
) -> Sequence[MeaningSummary]:
    """Return what a tag meant, the most recent first; nothing for a digest."""
    if isinstance(reference, Digest):
        return []
    return [
        MeaningSummary(
            str(one.digest),
            to_seconds(one.first_seen),
            to_seconds(one.last_seen),
            to_seconds(one.pushed_at),
            one.source,
        )
        for one in queries.meanings(repository, reference)
    ]
