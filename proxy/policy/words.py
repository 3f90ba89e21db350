"""A rule in plain words, for people who do not know the keys of the configuration. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any

_TRUSTED = {
    "official": "Docker Official Images",
    "verified_publisher": "images of verified publishers",
    "sponsored": "sponsored open source",
}


def describe_rule(rule: Mapping[str, Any]) -> list[str]:
    """Return what a rule, as the configuration has it, says about its images, a sentence each."""
    sentences = [*_describe_names(rule), *_describe_age(rule)]
    if not sentences:
        return ["Everything is allowed."]
    if rule.get("mode") == "audit":
        return sentences
    if rule.get("unknown") == "allow":
        sentences.append("While a fact about an image cannot be had, it is allowed.")
    elif rule.get("trusted") or _has_age(rule):
        sentences.append("While a fact about an image cannot be had, it is not served (503).")
    return sentences


def _describe_names(rule: Mapping[str, Any]) -> list[str]:
    sentences = []
    allowed = [_TRUSTED.get(one, one) for one in rule.get("trusted") or ()]
    if names := rule.get("allow"):
        allowed.append(_list(names))
    if allowed:
        sentences.append(f"Only these are allowed: {', '.join(allowed)}.")
    if tags := rule.get("deny_tags"):
        sentences.append(f"Tags that match {_list(tags)} are refused.")
    if excluded := rule.get("except"):
        sentences.append(f"It is not about {_list(excluded)}.")
    return sentences


def _describe_age(rule: Mapping[str, Any]) -> list[str]:
    if not _has_age(rule):
        return []
    age = rule["min_age"]
    if rule.get("unripe") == "deny":
        young = f"Content younger than {age} is refused."
    else:
        young = f"Until new content is {age} old, a tag means what it meant before."
    if rule.get("first_seen") == "deny":
        first = "An image of unknown age is refused when this cache sees it first."
    else:
        first = "An image of unknown age is allowed when this cache sees it first."
    return [young, first]


def _has_age(rule: Mapping[str, Any]) -> bool:
    return bool(rule.get("min_age", "0s") != "0s")


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
