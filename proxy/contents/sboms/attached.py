"""Which stored documents are SBOMs of an image: BuildKit's attestations, and what refers to it.

BuildKit: docs.docker.com, "Image attestation storage". cosign 2 and 3: BUNDLE_SPEC.md.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from proxy.contents.sboms.reader import CYCLONEDX_PREDICATE, SPDX_PREDICATE
from proxy.errors import InvalidDigestError, InvalidManifestError
from proxy.oci.digest import Digest
from proxy.oci.manifest import parse_manifest

# Documents of one image that are tried.
MAX_ATTACHED_SBOMS = 16

_SBOM_TYPES = frozenset(
    {
        "application/spdx+json",
        "text/spdx+json",
        "application/vnd.cyclonedx+json",
        "application/vnd.syft+json+spdx",
    }
)
_STATEMENT_TYPES = ("application/vnd.in-toto+json", "application/vnd.dsse.envelope.v1+json")
_BUNDLE = "application/vnd.dev.sigstore.bundle"
# The annotations that name the predicate: BuildKit's, cosign 2's, cosign 3's.
_PREDICATE_KEYS = (
    "in-toto.io/predicate-type",
    "predicateType",
    "dev.sigstore.bundle.predicateType",
)
_PREDICATES = (SPDX_PREDICATE, CYCLONEDX_PREDICATE)


class AttachedDocument(NamedTuple):
    """A blob that is an SBOM by its media type, or by the annotation of its manifest."""

    manifest: Digest
    digest: Digest
    size: int


def may_have_sbom(descriptor: Mapping[str, Any]) -> bool:
    """Tell whether what a descriptor of a referrer names may be an SBOM, or have one."""
    kind = str(descriptor.get("artifactType") or "").partition(";")[0]
    if not kind or kind in _SBOM_TYPES or "sbom" in kind:
        return True
    if not (kind in _STATEMENT_TYPES or kind.startswith(_BUNDLE) or "attestation" in kind):
        return False
    stated = _predicates(descriptor)
    return not stated or _names_sbom(stated)


def list_documents(manifest: Digest, content: bytes) -> list[AttachedDocument]:
    """Return the blobs of a manifest that say they are SBOMs."""
    return list(find_documents(manifest, content))


def find_documents(manifest: Digest, content: bytes) -> Iterator[AttachedDocument]:
    """Yield the blobs of a manifest that say they are SBOMs."""
    try:
        document = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    if not isinstance(document, dict):
        return
    layers = document.get("layers")
    for layer in layers if isinstance(layers, list) else ():
        if not isinstance(layer, dict) or not _is_sbom(layer, document):
            continue
        digest, size = layer.get("digest"), layer.get("size")
        try:
            parsed = Digest.parse(digest) if isinstance(digest, str) else None
        except InvalidDigestError:
            continue
        if parsed and isinstance(size, int):
            yield AttachedDocument(manifest, parsed, size)


def list_blobs(content: bytes) -> list[tuple[Digest, int]]:
    """Return the digests of the config and the layers of a manifest, with the sizes that it states."""
    try:
        children = parse_manifest(content, "").children
    except InvalidManifestError:
        return []
    return [(child.digest, child.size) for child in children if child.size is not None]


def _is_sbom(layer: dict[str, Any], manifest: dict[str, Any]) -> bool:
    media_type = str(layer.get("mediaType")).partition(";")[0]
    if media_type in _SBOM_TYPES:
        return True
    if not (media_type in _STATEMENT_TYPES or media_type.startswith(_BUNDLE)):
        return False
    return _names_sbom(_predicates(layer, manifest))


def _predicates(*documents: Mapping[str, Any]) -> list[str]:
    """Return what the annotations of documents state as types of predicates."""
    return [
        str(annotations[key])
        for annotations in (one.get("annotations") for one in documents)
        if isinstance(annotations, dict)
        for key in _PREDICATE_KEYS
        if key in annotations
    ]


def _names_sbom(predicates: list[str]) -> bool:
    # CycloneDX adds its version: https://cyclonedx.org/bom/v1.4
    return any(one.startswith(_PREDICATES) for one in predicates)
