"""The decision of one rule about one image. Pure.

Every condition of a rule must hold; `trusted` and `allow` are one condition: meeting either is enough.
"""

from dataclasses import dataclass
from enum import StrEnum

from proxy.config import Duration, PolicySettings
from proxy.globs import matches_any
from proxy.policy.facts import Badge, ImageFacts, is_official


class PolicyDecision(StrEnum):
    """What a rule says about an image."""

    ALLOW = "allow"
    DENY = "deny"
    # Too young; its time will come.
    UNRIPE = "unripe"
    # A fact is missing that may be known later.
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision with its reason, a clause such as `it is 5h old (first seen here), and min_age is 3d`.

    `until` is the Unix time at which it ends: an unripe image becomes ripe, or an exception is over.
    `is_uncertain` says that a fact is missing, and that the rule allows the image all the same.
    """

    decision: PolicyDecision
    reason: str = ""
    until: float | None = None
    is_uncertain: bool = False


ALLOWED = Verdict(PolicyDecision.ALLOW)

_BADGE_NAMES = {
    "official": "official",
    "verified_publisher": "of a verified publisher",
    "sponsored": "sponsored open source",
}


def judge(rule: PolicySettings, facts: ImageFacts, now: float) -> Verdict:
    """Return what the rule says about an image at the time `now`, in Unix seconds.

    A denial takes precedence over a missing fact, and that over a minimum age.
    """
    verdicts = [_judge_tag(rule, facts), _judge_trust(rule, facts), _judge_age(rule, facts, now)]
    for decision in (PolicyDecision.DENY, PolicyDecision.UNKNOWN, PolicyDecision.UNRIPE):
        for verdict in verdicts:
            if verdict.decision is decision:
                return verdict
    # What is uncertain comes first.
    verdicts.sort(key=lambda verdict: not verdict.is_uncertain)
    return next((verdict for verdict in verdicts if verdict.reason), ALLOWED)


def _judge_tag(rule: PolicySettings, facts: ImageFacts) -> Verdict:
    if facts.tag is None or not matches_any(facts.tag, rule.deny_tags):
        return ALLOWED
    return Verdict(
        PolicyDecision.DENY, f"the tag {facts.tag} is denied (pull another tag, or a digest)"
    )


def _judge_trust(rule: PolicySettings, facts: ImageFacts) -> Verdict:
    if not (rule.trusted or rule.allow) or matches_any(facts.name, rule.allow):
        return ALLOWED
    badge = Badge.OFFICIAL if is_official(facts.name) else facts.badge
    if badge in rule.trusted:
        return ALLOWED
    can_be_known_later = facts.has_badges and badge.is_open
    if can_be_known_later and set(rule.trusted) - {"official"}:
        said = "was not asked" if badge is Badge.NOT_ASKED else "did not answer"
        return _judge_unknown(rule, f"Docker Hub {said} whether it is trusted")
    if badge is Badge.NOT_LISTED and not rule.allow:
        return Verdict(PolicyDecision.DENY, "Docker Hub's search does not list it")
    wanted = [_BADGE_NAMES[name] for name in rule.trusted] + ["in the list"] * bool(rule.allow)
    return Verdict(PolicyDecision.DENY, f"it is {_neither(wanted)}")


def _judge_unknown(rule: PolicySettings, reason: str) -> Verdict:
    if rule.unknown == "allow":
        return Verdict(PolicyDecision.ALLOW, reason, is_uncertain=True)
    return Verdict(PolicyDecision.UNKNOWN, reason)


def _neither(terms: list[str]) -> str:
    """Join terms as `neither a, nor b, nor c`, or `not a`."""
    return f"not {terms[0]}" if len(terms) == 1 else f"neither {', nor '.join(terms)}"


def _judge_age(rule: PolicySettings, facts: ImageFacts, now: float) -> Verdict:
    if not rule.min_age or facts.is_ripe:
        return ALLOWED
    age = facts.age
    if age is None:
        return _judge_unknown(rule, "its age is not known")
    if age.is_first_sight and rule.first_seen == "allow":
        return Verdict(
            PolicyDecision.ALLOW, "its age is not known, and this cache never served it before"
        )
    until = age.since + rule.min_age
    if now >= until:
        return ALLOWED
    young = Duration(max(1, round(now - age.since)))
    reason = f"it is {young} old ({age.source}), and min_age is {rule.min_age}"
    return Verdict(PolicyDecision.UNRIPE, reason, until)
