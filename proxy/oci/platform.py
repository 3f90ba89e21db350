"""Platforms (image-spec, image-index.md): parsing, and choosing the best match from an index.

Follows containerd's `platforms` package: `arm64` is `arm64/v8`, `arm` is `arm/v7`, and ARM v7 also
runs images for v6 and v5 if there is no better match.
"""

import re
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from proxy.errors import InvalidReferenceError

T = TypeVar("T")

_PLATFORM_PATTERN = re.compile(r"[a-z0-9]+/[a-z0-9_]+(?:/[a-z0-9.]+)?")
# Other names of an architecture, mapped to architecture and variant.
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
# The variant of a platform that does not name one.
_DEFAULT_VARIANTS = {"arm64": "v8", "arm": "v7", "amd64": "v1"}


class Platform(msgspec.Struct, frozen=True):
    """Operating system and architecture that an image is built for."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


def parse_platform(text: str) -> Platform:
    """Parse `os/architecture[/variant]`, or raise `InvalidReferenceError`."""
    if _PLATFORM_PATTERN.fullmatch(text.lower()) is None:
        raise InvalidReferenceError(
            f"{text[:60]!r} is not a platform: write it as linux/arm64 or linux/arm/v7"
        )
    os, architecture, variant = (*text.lower().split("/"), "")[:3]
    architecture, implied = _ARCHITECTURE_ALIASES.get(architecture, (architecture, ""))
    return Platform(os, architecture, variant or implied)


def machine_platform(machine: str) -> Platform:
    """Return the platform of Linux containers on a machine, from the output of `uname -m`."""
    return Platform("linux", *_ARCHITECTURE_ALIASES.get(machine.lower(), (machine.lower(), "")))


def is_runnable(platform: Platform | None) -> bool:
    """Tell whether this is the platform of an image: attestations have `unknown/unknown`."""
    return platform is None or (platform.os, platform.architecture) != ("unknown", "unknown")


def choose_platform(
    candidates: Sequence[tuple[Platform | None, T]], requested: Platform
) -> T | None:
    """Return the candidate that a client of the requested platform uses: the first of the best."""
    ranked = [
        (rank, candidate)
        for platform, candidate in candidates
        if platform and (rank := _rank(platform, requested)) is not None
    ]
    return min(ranked, key=lambda pair: pair[0])[1] if ranked else None


def _rank(platform: Platform, requested: Platform) -> int | None:
    """Return 0 for an exact match, more for a worse one, None if it does not run there."""
    if (platform.os, platform.architecture) != (requested.os, requested.architecture):
        return None
    offered, wanted = _variant(platform), _variant(requested)
    if offered == wanted:
        return 0
    if platform.architecture == "arm" and offered in ("v5", "v6") and wanted in ("v6", "v7"):
        return int(wanted[1]) - int(offered[1]) if offered < wanted else None
    return None


def _variant(platform: Platform) -> str:
    return platform.variant or _DEFAULT_VARIANTS.get(platform.architecture, "")
