from dataclasses import replace
from typing import Any

import msgspec
from hypothesis import assume, given, strategies as st

from proxy.config import Duration, PolicySettings
from proxy.policy.facts import Badge, ContentAge, ImageFacts
from proxy.policy.judge import PolicyDecision, judge
from proxy.policy.rules import RuleSet

NOW = 1_800_000_000.0
DAY = 86_400.0

# From the worst to the best, where `worse` never gets what `better` does not.
_RANK = {
    PolicyDecision.DENY: 0,
    PolicyDecision.UNKNOWN: 1,
    PolicyDecision.UNRIPE: 2,
    PolicyDecision.ALLOW: 3,
}

names = st.sampled_from(["docker.io/library/nginx", "docker.io/acme/x", "ghcr.io/acme/x"])
globs = st.sampled_from(["*", "docker.io/*", "docker.io/library/*", "*/acme/*", "ghcr.io/*"])
rules = st.builds(
    PolicySettings,
    images=st.lists(globs, min_size=1, max_size=2).map(tuple),
    exclude=st.lists(globs, max_size=1).map(tuple),
    trusted=st.lists(
        st.sampled_from(["official", "verified_publisher", "sponsored"]), max_size=3
    ).map(tuple),
    allow=st.lists(globs, max_size=1).map(tuple),
    deny_tags=st.lists(st.sampled_from(["latest", "*-rc*"]), max_size=2).map(tuple),
    min_age=st.sampled_from([Duration(0), Duration(3600), Duration(3 * DAY)]),
    first_seen=st.sampled_from(["allow", "deny"]),
    unknown=st.sampled_from(["allow", "deny"]),
)
ages = st.builds(
    ContentAge,
    since=st.floats(NOW - 10 * DAY, NOW + DAY),
    source=st.just("first seen here"),
    is_first_sight=st.booleans(),
)
facts_of_images = st.builds(
    ImageFacts,
    name=names,
    tag=st.sampled_from([None, "latest", "1.2", "1.3-rc1"]),
    badge=st.sampled_from(list(Badge)),
    has_badges=st.booleans(),
    age=st.none() | ages,
    is_ripe=st.booleans(),
)


@given(rule=rules, facts=facts_of_images, older=st.floats(0, 20 * DAY))
def test_an_image_that_gets_older_is_never_refused_for_it(
    rule: PolicySettings, facts: ImageFacts, older: float
):
    assert (
        _RANK[judge(rule, facts, NOW).decision] <= _RANK[judge(rule, facts, NOW + older).decision]
    )


@given(rule=rules, facts=facts_of_images)
def test_a_badge_that_the_rule_trusts_never_refuses_an_image(
    rule: PolicySettings, facts: ImageFacts
):
    assume(rule.trusted)
    better = replace(facts, badge=Badge(rule.trusted[0]))
    assert _RANK[judge(rule, facts, NOW).decision] <= _RANK[judge(rule, better, NOW).decision]


@given(settings=st.lists(rules, max_size=4), added=rules, name=names)
def test_a_rule_that_is_added_below_changes_nothing_for_images_with_a_rule(
    settings: list[PolicySettings], added: PolicySettings, name: str
):
    before = RuleSet(settings).find(name)
    after = RuleSet([*settings, added]).find(name)
    assert after == before or (before is None and after and after.settings == added)


@given(rule=rules, facts=facts_of_images)
def test_only_a_missing_fact_makes_the_decision_unknown(rule: PolicySettings, facts: ImageFacts):
    if judge(rule, facts, NOW).decision is PolicyDecision.UNKNOWN:
        assert rule.unknown == "deny"
        assert facts.badge.is_open or facts.age is None


def decide(facts: ImageFacts, **keys: Any) -> tuple[str, str]:
    verdict = judge(PolicySettings(images=("*",), **keys), facts, NOW)
    return verdict.decision.value, verdict.reason


NGINX = ImageFacts("docker.io/library/nginx", "latest", has_badges=True)
COMMUNITY = ImageFacts("docker.io/acme/x", "1", Badge.COMMUNITY, has_badges=True)


def test_official_is_a_fact_of_the_name():
    assert decide(NGINX, trusted=("official",))[0] == "allow"
    # A name of three parts is not one of Docker Hub's own.
    nested = replace(NGINX, name="docker.io/library/nginx/x", badge=Badge.COMMUNITY)
    assert decide(nested, trusted=("official",))[0] == "deny"
    elsewhere = replace(NGINX, name="ghcr.io/library/nginx", has_badges=False)
    assert decide(elsewhere, trusted=("official",))[0] == "deny"


def test_a_community_image_is_denied_with_all_that_was_wanted():
    assert decide(COMMUNITY, trusted=("official", "verified_publisher"), allow=("ghcr.io/*",)) == (
        "deny",
        "it is neither official, nor of a verified publisher, nor in the list",
    )


def test_the_list_allows_what_is_not_trusted():
    assert decide(COMMUNITY, trusted=("official",), allow=("docker.io/acme/*",))[0] == "allow"


def test_a_list_alone_restricts():
    assert decide(COMMUNITY, allow=("docker.io/other/*",)) == ("deny", "it is not in the list")


def test_a_badge_that_was_not_asked_is_unknown_not_denied():
    unasked = replace(COMMUNITY, badge=Badge.NOT_ASKED)
    assert decide(unasked, trusted=("verified_publisher",))[0] == "unknown"
    assert decide(unasked, trusted=("verified_publisher",), unknown="allow")[0] == "allow"
    # Official is a fact of the name, so nothing is missing.
    assert decide(unasked, trusted=("official",))[0] == "deny"


def test_what_is_allowed_without_knowing_says_so():
    unasked = replace(
        COMMUNITY, badge=Badge.NOT_ASKED, age=ContentAge(NOW, "x", is_first_sight=True)
    )
    rule = PolicySettings(
        images=("*",),
        trusted=("verified_publisher",),
        unknown="allow",
        min_age=Duration.parse("1d"),
    )
    verdict = judge(rule, unasked, NOW)
    assert verdict.is_uncertain
    assert verdict.reason == "Docker Hub was not asked whether it is trusted"
    assert not judge(rule, replace(unasked, badge=Badge.VERIFIED_PUBLISHER), NOW).is_uncertain


def test_a_registry_without_badges_is_denied_not_unknown():
    elsewhere = ImageFacts("quay.io/acme/x", "1")
    assert decide(elsewhere, trusted=("verified_publisher",))[0] == "deny"


def test_a_denied_tag_is_denied_and_its_digest_is_not():
    assert decide(NGINX, deny_tags=("late*",))[0] == "deny"
    assert decide(replace(NGINX, tag=None), deny_tags=("late*",))[0] == "allow"


def test_a_young_image_says_how_old_it_is_and_until_when_it_waits():
    young = replace(NGINX, age=ContentAge(NOW - 5 * 3600, "first seen here"))
    rule = PolicySettings(images=("*",), min_age=Duration.parse("3d"))
    verdict = judge(rule, young, NOW)
    assert verdict.decision is PolicyDecision.UNRIPE
    assert verdict.reason == "it is 5h old (first seen here), and min_age is 3d"
    assert verdict.until == NOW - 5 * 3600 + 3 * DAY
    assert judge(rule, young, verdict.until).decision is PolicyDecision.ALLOW


def test_what_was_ripe_stays_ripe_when_the_clock_goes_back():
    ripe = replace(NGINX, age=ContentAge(NOW, "first seen here"), is_ripe=True)
    assert decide(ripe, min_age=Duration.parse("3d"))[0] == "allow"


def test_first_seen_decides_only_if_no_other_age_is_known():
    first = replace(NGINX, age=ContentAge(NOW, "first seen here", is_first_sight=True))
    pushed = replace(NGINX, age=ContentAge(NOW, "pushed, says Docker Hub"))
    age = Duration.parse("3d")
    assert decide(first, min_age=age, first_seen="allow")[0] == "allow"
    assert decide(first, min_age=age, first_seen="deny")[0] == "unripe"
    assert decide(pushed, min_age=age, first_seen="allow")[0] == "unripe"


def test_a_denial_takes_precedence_over_what_is_not_known():
    unasked = replace(COMMUNITY, tag="latest", badge=Badge.NOT_ASKED)
    assert decide(unasked, trusted=("sponsored",), deny_tags=("latest",))[0] == "deny"


def test_the_version_of_a_rule_changes_with_all_but_its_mode():
    rule = PolicySettings(images=("*",), allow=("a/*",))
    versions = {
        RuleSet([one]).rules[0].version
        for one in (rule, msgspec.structs.replace(rule, mode="enforce"))
    }
    assert len(versions) == 1
    other = msgspec.structs.replace(rule, allow=("b/*",))
    assert RuleSet([other]).rules[0].version not in versions
