"""Rules by repository: which rule decides about each key."""

import math
from collections.abc import Mapping

import pytest

from proxy.config import Config, load
from proxy.config.values import InheritedDuration, InheritedShare
from proxy.errors import ConfigError
from proxy.repository_rules import NEVER, RepositoryRules

NGINX, OTHER = "docker.io/library/nginx", "docker.io/me/app"


def config(*rules: Mapping[str, object], **sections: object) -> Config:
    return load(None, {}, {"rules": [*rules], **sections})


def rules(*tables: Mapping[str, object], **sections: object) -> RepositoryRules:
    return RepositoryRules(config(*tables, **sections))


def test_without_rules_the_keys_of_the_cache_apply():
    found = rules(manifests={"ttl": "5m"}, store={"max_idle": "2d"}).settings(NGINX)
    assert (found.ttl, found.max_idle, found.max_share) == (300, 172_800, None)
    assert (found.tag_ttl, found.immutable, found.prefetches) == ({"latest": 60}, (), True)
    assert set(found.sources.values()) == {0}


def test_for_each_key_the_first_rule_decides_that_matches_and_has_it():
    found = rules(
        {"images": ["ghcr.io/*", "docker.io/library/*"], "ttl": "6h"},
        {"images": ["docker.io/library/nginx"], "ttl": "1h", "max_idle": "7d", "prefetch": "off"},
        {"images": ["docker.io/*"], "max_idle": "0s", "max_share": "30%", "tag_ttl": {"x": "1s"}},
        upstreams={"docker.io": {}, "ghcr.io": {}},
    )
    nginx, other = found.settings(NGINX), found.settings(OTHER)
    assert (nginx.ttl, nginx.max_idle, nginx.max_share) == (21_600, 604_800, 0.3)
    assert not nginx.prefetches
    assert dict(nginx.sources) == {
        "ttl": 1,
        "tag_ttl": 3,
        "immutable": 0,
        "max_idle": 2,
        "max_share": 3,
        "prefetch": 2,
    }
    assert (other.ttl, other.max_idle, other.tag_ttl) == (600, 0, {"x": 1})
    assert other.prefetches
    assert found.max_shares == {3: 0.3}
    assert found.quotas(1000) == {3: 300}
    assert (found.quota_rule(NGINX), found.idle_rule(NGINX), found.idle_rule(OTHER)) == (3, 2, 3)
    assert found.globs(3) == ("docker.io/*",)
    assert found.max_idles == {0: 0, 2: 604_800, 3: 0}


def test_the_ttl_of_a_tag_is_that_of_the_first_glob_and_immutable_tags_have_none():
    found = rules(
        {"images": ["docker.io/library/*"], "ttl": "6h", "immutable": ["v*", "sha-*"]},
        {"images": ["*"], "tag_ttl": {"v*": "1s", "nightly-*": "5m"}},
    )
    assert found.tag_ttl(NGINX, "v1") == (NEVER, 'rules[1].immutable "v*"')
    assert found.tag_ttl(OTHER, "v1") == (1, 'rules[2].tag_ttl "v*"')
    assert found.tag_ttl(NGINX, "nightly-1") == (300, 'rules[2].tag_ttl "nightly-*"')
    assert found.tag_ttl(NGINX, "1.27") == (21_600, "rules[1].ttl")
    assert found.tag_ttl(OTHER, "1.27") == (600, "manifests.ttl")
    assert found.ttl(NGINX, "sha-1") == math.inf
    assert rules().tag_ttl(NGINX, "latest") == (60, 'manifests.tag_ttl "latest"')


def test_a_rule_may_prefetch_what_the_cache_does_not():
    on = {"images": ["docker.io/me/*"], "prefetch": "layers"}
    found = rules(on, fetch={"prefetch": "off"})
    assert (found.settings(OTHER).prefetches, found.settings(NGINX).prefetches) == (True, False)
    assert found.has_prefetch
    assert not rules(fetch={"prefetch": "off"}).has_prefetch
    assert rules({"images": ["docker.io/me/*"], "prefetch": "off"}).has_prefetch


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"images": ["docker.io/*"]}, "sets nothing"),
        ({"ttl": "1h"}, "images"),
        ({"images": [], "ttl": "1h"}, "images"),
        ({"images": ["nginx"], "ttl": "1h"}, r"rules\[1\].images: .nginx. can never match"),
        ({"images": ["docker.io/*"], "ttl": "soon"}, "is not a duration"),
        ({"images": ["docker.io/*"], "max_share": "30"}, 'write "1%" to "100%"'),
        ({"images": ["docker.io/*"], "max_share": "0%"}, 'write "1%" to "100%"'),
        ({"images": ["docker.io/*"], "prefetch": "all"}, "prefetch"),
    ],
)
def test_a_wrong_rule_says_what_to_write(rule, message):
    with pytest.raises(ConfigError, match=message):
        config(rule)


def test_a_key_that_is_not_set_is_empty():
    assert not InheritedDuration.parse("")
    assert not InheritedShare.parse("")
    assert (InheritedDuration.parse("90m"), InheritedShare.parse("5 %")) == ("1h30m", "5%")
    assert InheritedDuration.parse(0) == "0s"


def test_tags_for_referrers_always_move():
    found = rules({"images": ["*"], "immutable": ["*"], "ttl": "1h"})
    assert found.ttl(NGINX, "sha256-cafe") == NEVER
    assert found.ttl(NGINX, f"sha256-{'0' * 64}.sig") == 3600
