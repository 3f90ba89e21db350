"""What an image has of packages, as it is kept and answered. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import msgspec

from proxy.contents.layers.layer_contents import LayerContents, merge_layers
from proxy.contents.packages import OsRelease, Package
from proxy.contents.purls import with_purl
from proxy.contents.sboms.reader import SbomContents

ContentsSource = Literal["attached", "layers", "none"]

# What reading layers does not find, in words for people.
NOT_READ = "Go, Rust and Java programs, and files that were copied, are not read"

# Why no attached SBOM was fetched, where images are read in bulk: each would cost requests of upstream.
NOT_ASKED = "it is fetched when the packages of this image alone are asked for"


class SbomOrigin(msgspec.Struct, frozen=True):
    """The attached SBOM that was taken: the digests of its manifest and of itself, and its format.

    Its signature, if it has one, was not verified.
    """

    manifest: str
    digest: str
    format: str


class ImageContents(msgspec.Struct, frozen=True, kw_only=True):
    """The packages of a manifest of an image, by their `source`: an attached SBOM, or the layers.

    `none` is for what has no file system, such as a chart. `problems` say what of it could not be read,
    `unread` what is never read. `read` is Unix time.
    `not_fetched` says why upstream was not asked for an attached SBOM, or did not send it; empty if it has none.
    """

    source: ContentsSource
    read: int
    sbom: SbomOrigin | None = None
    release: OsRelease = OsRelease()
    packages: Sequence[Package] = ()
    problems: Sequence[str] = ()
    unread: str = ""
    not_fetched: str = NOT_ASKED


def from_layers(layers: Iterable[LayerContents], now: int) -> ImageContents:
    """Return what layers on top of each other have, the lowest first."""
    stack = list(layers)
    merged = merge_layers(stack)
    archives = sum(one.archives for one in stack)
    return ImageContents(
        source="layers",
        read=now,
        release=merged.release,
        packages=merged.packages,
        problems=merged.problems,
        unread=f"{NOT_READ}; {archives} Java archives were seen" if archives else NOT_READ,
    )


def from_sbom(sbom: SbomContents, origin: SbomOrigin, now: int) -> ImageContents:
    """Return what an attached SBOM lists."""
    return ImageContents(
        source="attached",
        read=now,
        sbom=origin,
        release=sbom.release,
        packages=[with_purl(one, sbom.release) for one in sbom.packages],
        problems=[sbom.problem] if sbom.problem else [],
        unread="what the SBOM does not list is not known, and its signature was not verified",
        not_fetched="",
    )


def distinct(packages: Iterable[Package]) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield name, kind, version, source and its version of the packages that differ in one of them."""
    yield from dict.fromkeys(
        (one.name, one.kind, one.version, one.source, one.source_version) for one in packages
    )
