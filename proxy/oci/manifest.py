"""Manifests and image indexes: what they name, read without changing a byte.

A manifest is stored and served as it was received; parsing is for looking only. What two parsers
could read differently is refused (CVE-2021-41190: a document that is both index and manifest), since
the clients behind us have other parsers than ours.
"""

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from proxy.errors import InvalidDigestError, InvalidManifestError
from proxy.oci.digest import Digest

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_MANIFEST_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"

INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_MANIFEST_LIST})
MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST}) | INDEX_TYPES

# Registries choose by exact type and some answer 404 to anything less than the full set.
ACCEPT = f"{OCI_INDEX}, {OCI_MANIFEST}, {DOCKER_MANIFEST_LIST}, {DOCKER_MANIFEST}, */*;q=0.1"

# The specification has registries take 4 MiB at least (distribution-spec, "Pushing manifests"); the
# clients read no more.
MAX_MANIFEST_SIZE = 4 << 20

_DIGEST_GRAMMAR = re.compile(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[a-zA-Z0-9=_-]+")
# What JSON may spell and UTF-8 may not.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class Platform(msgspec.Struct, frozen=True):
    """What an image runs on (image-spec, image-index.md)."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


class _RawDescriptor(msgspec.Struct, rename="camel"):
    media_type: str
    digest: str
    size: _Size
    platform: Platform | None = None
    urls: list[str] | None = None


class _ManifestDocument(msgspec.Struct, rename="camel"):
    media_type: str | None = None
    manifests: list[_RawDescriptor] | None = None
    config: _RawDescriptor | None = None
    layers: list[_RawDescriptor] | None = None
    subject: _RawDescriptor | None = None
    artifact_type: str | None = None
    annotations: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a manifest names: its config, a layer, or a manifest of one platform."""

    digest: Digest
    size: int
    media_type: str
    platform: Platform | None
    # Foreign layers are fetched from elsewhere and no registry has checked that it holds them.
    is_foreign: bool


@dataclass(frozen=True, slots=True)
class Manifest:
    """What can be said of a manifest's bytes. `children` keep their order."""

    media_type: str
    children: tuple[Descriptor, ...]
    subject: Digest | None
    artifact_type: str
    annotations: dict[str, str]

    @property
    def is_index(self) -> bool:
        """Whether the children are manifests."""
        return self.media_type in INDEX_TYPES

    def select_platform(self, os: str, architecture: str) -> Digest | None:
        """Return the first child of an index for that platform, as Docker Hub chooses it."""
        for child in self.children:
            platform = child.platform
            if platform and (platform.os, platform.architecture) == (os, architecture):
                return child.digest
        return None


def parse_manifest(content: bytes, content_type: str) -> Manifest:
    """Return what `content`, sent under `content_type`, names.

    Raises `InvalidManifestError` if it is no manifest, or one that parsers may disagree about.
    """
    document = _decode(content)
    media_type = _check_media_type(document, content_type)
    if media_type in INDEX_TYPES:
        named = document.manifests
        if named is None or document.layers is not None or document.config is not None:
            raise InvalidManifestError("an index must have manifests, and no layers or config")
    else:
        if document.manifests is not None or document.config is None or document.layers is None:
            raise InvalidManifestError("a manifest must have a config and layers, no manifests")
        named = [document.config, *document.layers]
    config = document.config
    return Manifest(
        media_type,
        tuple(child for item in named if (child := _parse_descriptor(item))),
        _parse_digest(document.subject.digest) if document.subject else None,
        # image-spec, manifest.md: without an artifactType of its own, the config's type is it.
        document.artifact_type or (config.media_type if config else ""),
        document.annotations or {},
    )


def _decode(content: bytes) -> _ManifestDocument:
    if len(content) > MAX_MANIFEST_SIZE:
        raise InvalidManifestError(f"larger than {MAX_MANIFEST_SIZE} bytes")
    try:
        # The standard decoder, because it alone shows duplicate keys; given text, because from bytes
        # it takes UTF-16 too. A surrogate on its own is text that nobody can write again.
        text = content.decode()
        document = json.loads(
            text, object_pairs_hook=_reject_duplicate_keys, parse_constant=_reject_constant
        )
        if _SURROGATE.search(text):
            json.dumps(document, ensure_ascii=False).encode()
        return msgspec.convert(document, _ManifestDocument)
    except (ValueError, RecursionError) as error:
        raise InvalidManifestError(f"not a manifest: {str(error)[:80]}") from error


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Go's decoder takes keys without regard to case, ours does not: both must see one document.
    if len({key.lower() for key, _ in pairs}) != len(pairs):
        raise ValueError("duplicate keys")
    return dict(pairs)


def _check_media_type(document: _ManifestDocument, content_type: str) -> str:
    sent = content_type.partition(";")[0].strip().lower()
    stated = document.media_type
    if sent in MANIFEST_TYPES:
        if stated not in (None, "", sent):
            raise InvalidManifestError(f"sent as {sent}, but says that it is {stated[:80]}")
        return sent
    if stated in MANIFEST_TYPES:
        return stated
    raise InvalidManifestError(f"of type {sent[:80] or 'nothing'}, which is no manifest's")


def _parse_descriptor(descriptor: _RawDescriptor) -> Descriptor | None:
    digest = _parse_digest(descriptor.digest)
    if digest is None:
        return None
    media_type = descriptor.media_type
    is_foreign = bool(descriptor.urls) or "foreign" in media_type or "nondistrib" in media_type
    return Descriptor(digest, descriptor.size, media_type, descriptor.platform, is_foreign)


def _parse_digest(text: str) -> Digest | None:
    """Return None for an algorithm that cannot be verified here: such content is never cached."""
    try:
        return Digest.parse(text)
    except InvalidDigestError:
        if _DIGEST_GRAMMAR.fullmatch(text) and not text.startswith(("sha256:", "sha512:")):
            return None
        raise InvalidManifestError(f"{text[:80]!r} is not a digest") from None
