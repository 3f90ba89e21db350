"""Manifests and image indexes (image-spec, manifest.md and image-index.md).

Manifests are stored and served exactly as received. A document that two parsers could read
differently is rejected, because clients use other parsers than ours (CVE-2021-41190: a document
that is both an index and a manifest).
"""

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from proxy.errors import InvalidDigestError, InvalidManifestError
from proxy.oci.digest import Digest
from proxy.oci.platform import Platform

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_MANIFEST_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"

INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_MANIFEST_LIST})
MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST}) | INDEX_TYPES

# Registries match exact types, and some respond 404 unless all of them are listed.
ACCEPT = f"{OCI_INDEX}, {OCI_MANIFEST}, {DOCKER_MANIFEST_LIST}, {DOCKER_MANIFEST}, */*;q=0.1"

# The least that a registry must accept (distribution-spec, "Pushing manifests"), and the most that
# clients read.
MAX_MANIFEST_SIZE = 4 << 20

_DIGEST_GRAMMAR = re.compile(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[a-zA-Z0-9=_-]+")
# A surrogate: valid as a JSON escape, invalid in UTF-8.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


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
    """A child of a manifest or index: the config, a layer, or the manifest of one platform."""

    digest: Digest
    size: int
    media_type: str
    platform: Platform | None
    # A foreign layer is downloaded from its own URLs; registries need not have it.
    is_foreign: bool


@dataclass(frozen=True, slots=True)
class Manifest:
    """A parsed manifest or index. `children` are in the order of the document."""

    media_type: str
    children: tuple[Descriptor, ...]
    subject: Digest | None
    artifact_type: str
    annotations: dict[str, str]

    @property
    def is_index(self) -> bool:
        """Whether this is an index, whose children are manifests."""
        return self.media_type in INDEX_TYPES

    @property
    def child_count(self) -> int:
        """The number of different blobs that it names."""
        return len({child.digest for child in self.children})

    def select_platform(self, os: str, architecture: str) -> Digest | None:
        """Return the first manifest of an index for a platform; Docker Hub selects the same."""
        for child in self.children:
            platform = child.platform
            if platform and (platform.os, platform.architecture) == (os, architecture):
                return child.digest
        return None


def parse_manifest(content: bytes, content_type: str) -> Manifest:
    """Parse a manifest or index that was received with the header `content_type`.

    Raises `InvalidManifestError` if it is malformed or ambiguous.
    """
    document = _decode(content)
    media_type = _check_media_type(document, content_type)
    if media_type in INDEX_TYPES:
        descriptors = document.manifests
        if descriptors is None or document.layers is not None or document.config is not None:
            raise InvalidManifestError("an index must have manifests, and no layers or config")
    else:
        if document.manifests is not None or document.config is None or document.layers is None:
            raise InvalidManifestError("a manifest must have a config and layers, no manifests")
        descriptors = [document.config, *document.layers]
    config = document.config
    return Manifest(
        media_type,
        tuple(child for item in descriptors if (child := _parse_descriptor(item))),
        _parse_digest(document.subject.digest) if document.subject else None,
        # image-spec, manifest.md: without an artifactType, the config's media type is used.
        document.artifact_type or (config.media_type if config else ""),
        document.annotations or {},
    )


def _decode(content: bytes) -> _ManifestDocument:
    if len(content) > MAX_MANIFEST_SIZE:
        raise InvalidManifestError(f"larger than {MAX_MANIFEST_SIZE} bytes")
    try:
        # Only the standard decoder reports duplicate keys. It gets text, because it would accept
        # bytes in UTF-16. Lone surrogates are rejected, because they cannot be encoded again.
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
    # Go's decoder ignores the case of keys, ours does not.
    if len({key.lower() for key, _ in pairs}) != len(pairs):
        raise ValueError("duplicate keys")
    return dict(pairs)


def _check_media_type(document: _ManifestDocument, content_type: str) -> str:
    header = content_type.partition(";")[0].strip().lower()
    field = document.media_type
    if header in MANIFEST_TYPES:
        if field not in (None, "", header):
            raise InvalidManifestError(f"sent as {header}, but its mediaType is {field[:80]}")
        return header
    if field in MANIFEST_TYPES:
        return field
    raise InvalidManifestError(
        f"{header[:80]} is not a manifest type" if header else "its media type is missing"
    )


def _parse_descriptor(descriptor: _RawDescriptor) -> Descriptor | None:
    digest = _parse_digest(descriptor.digest)
    if digest is None:
        return None
    media_type = descriptor.media_type
    is_foreign = bool(descriptor.urls) or "foreign" in media_type or "nondistrib" in media_type
    return Descriptor(digest, descriptor.size, media_type, descriptor.platform, is_foreign)


def _parse_digest(text: str) -> Digest | None:
    """Return the digest; None if its algorithm is unknown, and its content is thus never cached."""
    try:
        return Digest.parse(text)
    except InvalidDigestError:
        if _DIGEST_GRAMMAR.fullmatch(text) and not text.startswith(("sha256:", "sha512:")):
            return None
        raise InvalidManifestError(f"{text[:80]!r} is not a digest") from None
