"""Rules in plain words."""

import pytest

from proxy.policy.words import describe_rule


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({}, ["Everything is allowed."]),
        (
            {"trusted": ["official"], "allow": ["docker.io/me/*"]},
            [
                "Only these are allowed: Docker Official Images, docker.io/me/*.",
                "While a fact about an image cannot be had, it is not served (503).",
            ],
        ),
        (
            {"deny_tags": ["*-rc*"], "except": ["docker.io/me/*"]},
            ["Tags that match *-rc* are refused.", "It is not about docker.io/me/*."],
        ),
        (
            {"min_age": "3d", "unknown": "allow"},
            [
                "Until new content is 3d old, a tag means what it meant before.",
                "An image of unknown age is allowed when this cache sees it first.",
                "While a fact about an image cannot be had, it is allowed.",
            ],
        ),
        (
            {"mode": "audit", "trusted": ["sponsored"]},
            ["Only these are allowed: sponsored open source."],
        ),
        (
            {"min_age": "3d", "unripe": "deny", "first_seen": "deny"},
            [
                "Content younger than 3d is refused.",
                "An image of unknown age is refused when this cache sees it first.",
                "While a fact about an image cannot be had, it is not served (503).",
            ],
        ),
    ],
)
def test_a_rule_is_described_in_sentences(rule, words):
    assert describe_rule(rule) == words
