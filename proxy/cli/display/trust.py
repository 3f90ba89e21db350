"""What is known about the publisher of an image, and what policies say of it, as tables show it."""

from collections.abc import Mapping
from typing import Any

from proxy.cli.display.text import escape_unprintable

_LABELS = {
    "official": "official",
    "verified_publisher": "verified",
    "sponsored": "sponsored",
    "community": "community",
    "private": "private",
}


def format_trust(facts: Mapping[str, Any]) -> str:
    """Return the badge, and the publisher of one that Docker Hub has verified; `-` if unknown."""
    label = _LABELS.get(facts["badge"], "-")
    if facts["badge"] == "verified_publisher" and facts["publisher"]:
        label = f"{label} ({escape_unprintable(facts['publisher'])})"
    return f"{label}, archived" if facts["is_archived"] else label


_VERDICTS = {"deny": "refused by", "unripe": "too new for", "unknown": "undecided by"}


def format_policy(policy: Mapping[str, Any] | None) -> str:
    """Return what a policy says that does not allow an image, as `refused by policy 1`; empty if it allows."""
    if policy is None or policy["decision"] == "allow":
        return ""
    audit = " (audit)" if policy["mode"] == "audit" else ""
    return f"{_VERDICTS[policy['decision']]} policy {policy['policy']}{audit}"
