"""Selections: an image and its requested platforms, as preloads and offline checks take them."""

from collections.abc import Iterable

import msgspec

from proxy.oci.platform import Platform, parse_platform

# Selects every platform that the image has.
ALL_PLATFORMS = "all"


class ImageSelection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image and its platforms, `os/architecture[/variant]`; without any, the daemon's own."""

    image: str
    platforms: tuple[str, ...] = ()


def parse_platforms(texts: Iterable[str]) -> list[Platform]:
    """Return the platforms, or an empty list, which selects all, if `ALL_PLATFORMS` is among them.

    Raises `InvalidReferenceError`.
    """
    selected = list(texts)
    platforms = [parse_platform(text) for text in selected if text != ALL_PLATFORMS]
    return [] if ALL_PLATFORMS in selected else platforms
