"""Platforms: how they are written, and which one of an image a client of a platform takes.

As containerd's `platforms` package has it: `arm64` is `arm64/v8`, `arm` is `arm/v7`, and an ARM of version 7 takes
what was made for 6 or 5 where there is nothing better.
"""

import re
from collections.abc import Sequence
from typing import TypeVar

from proxy.errors import InvalidReferenceError
from proxy.oci.manifest import Platform

T = TypeVar("T")

_PLATFORM_PATTERN = re.compile(r"[a-z0-9]+/[a-z0-9_]+(?:/[a-z0-9.]+)?")
# What machines and people call them: architecture, variant.
_ARCHITECTURE_ALIASES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armv7l": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv6l": ("arm", "v6"),
    "i386": ("386", ""),
    "i686": ("386", ""),
}
# What a platform without a variant means; of amd64 it is v1.
_DEFAULT_VARIANTS = {"arm64": "v8", "arm": "v7", "amd64": "v1"}


def parse_platform(text: str) -> Platform:
    """Return what `os/architecture[/variant]` says, or raise `InvalidReferenceError`."""
    if _PLATFORM_PATTERN.fullmatch(text.lower()) is None:
        raise InvalidReferenceError(
            f"{text[:60]!r} is not a platform: write it as linux/arm64 or linux/arm/v7"
        )
    os, architecture, variant = (*text.lower().split("/"), "")[:3]
    architecture, usual = _ARCHITECTURE_ALIASES.get(architecture, (architecture, ""))
    return Platform(os, architecture, variant or usual)


def machine_platform(machine: str) -> Platform:
    """Return the platform of containers on a machine, named as `uname -m` names it."""
    return Platform("linux", *_ARCHITECTURE_ALIASES.get(machine.lower(), (machine.lower(), "")))


def is_runnable(platform: Platform | None) -> bool:
    """Tell whether what is for this platform can run: attestations are for `unknown/unknown`."""
    return platform is None or (platform.os, platform.architecture) != ("unknown", "unknown")


def choose_platform(
    candidates: Sequence[tuple[Platform | None, T]], requested: Platform
) -> T | None:
    """Return what a client of the platform `wanted` takes of an index: the first of the best."""
    ranked = [
        (rank, thing)
        for platform, thing in candidates
        if platform and (rank := _rank(platform, requested)) is not None
    ]
    return min(ranked, key=lambda pair: pair[0])[1] if ranked else None


def _rank(platform: Platform, requested: Platform) -> int | None:
    """Return how far `platform` is from the one wanted, or None if it will not do."""
    if (platform.os, platform.architecture) != (requested.os, requested.architecture):
        return None
    has, needs = _variant(platform), _variant(requested)
    if has == needs:
        return 0
    if platform.architecture == "arm" and has in ("v5", "v6", "v7") and needs in ("v6", "v7"):
        return int(needs[1]) - int(has[1]) if has < needs else None
    return None


def _variant(platform: Platform) -> str:
    return platform.variant or _DEFAULT_VARIANTS.get(platform.architecture, "")
