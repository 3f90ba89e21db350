"""The tags by which clients find what refers to a manifest (distribution-spec, "Referrers Tag Schema").

Registries without the referrers API have an index of the referrers under the fallback tag
`sha256-<hex>`. cosign before 3.0 uses tags of its own, which extend that one.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

import msgspec

from proxy.errors import InvalidDigestError
from proxy.oci.digest import Digest
from proxy.oci.json_object import decode_object
from proxy.oci.manifest import OCI_INDEX
from proxy.oci.reference import Tag

# A descriptor as upstream sent it; fields unknown to us are passed on.
RawDescriptor = dict[str, Any]

COSIGN_SUFFIXES = (".sig", ".att", ".sbom")

_REFERRERS_TAG = re.compile(r"sha256-([a-f0-9]{64})(?:\.[a-z]+)?")


class _TypedDescriptor(msgspec.Struct):
    artifact_type: Any = msgspec.field(name="artifactType", default=None)


# One item at a time: other threads run between two calls, not during one.
_DESCRIPTOR = msgspec.json.Decoder(RawDescriptor)
_TYPED = msgspec.json.Decoder(_TypedDescriptor)


class EncodedReferrers(msgspec.Struct, frozen=True):
    """A list of descriptors, kept as the items of a JSON array, which take a tenth of the memory."""

    content: bytes = b""

    @classmethod
    def from_items(cls, items: Iterable[bytes]) -> Self:
        """Return the list of these JSON objects. Raises `msgspec.MsgspecError`."""
        # Encoded again, so that no name occurs twice in an object.
        return cls(b",".join(map(msgspec.json.encode, map(_DESCRIPTOR.decode, items))))

    @classmethod
    def from_descriptors(cls, descriptors: Iterable[RawDescriptor]) -> Self:
        """Return the list of these descriptors."""
        return cls(b",".join(map(msgspec.json.encode, descriptors)))

    def __add__(self, more: "EncodedReferrers") -> "EncodedReferrers":
        return EncodedReferrers(b",".join(filter(None, (self.content, more.content))))

    def decode(self) -> list[RawDescriptor]:
        """Return the descriptors."""
        return [_DESCRIPTOR.decode(item) for item in self._items()]

    def with_type(self, artifact_type: str) -> "EncodedReferrers":
        """Return the descriptors of this artifact type."""
        types = ((item, _TYPED.decode(item).artifact_type) for item in self._items())
        return EncodedReferrers(b",".join(item for item, kind in types if kind == artifact_type))

    def document(self) -> bytes:
        """Return the image index of these descriptors."""
        return b'{"schemaVersion":2,"mediaType":"%s","manifests":[%s]}' % (
            OCI_INDEX.encode(),
            self.content,
        )

    def _items(self) -> list[msgspec.Raw]:
        return msgspec.json.decode(b"[%s]" % self.content, type=list[msgspec.Raw])


class ReferrerRecord(msgspec.Struct, frozen=True):
    """All that upstream had of referrers of one manifest: the descriptors in its list, and the tags."""

    descriptors: list[RawDescriptor]
    tags: list[str]

    def encode(self) -> str:
        """Return the record as JSON."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def decode(cls, content: str) -> Self:
        """Return the record from JSON. Raises `ValueError`."""
        try:
            return msgspec.json.decode(content, type=cls)
        except msgspec.MsgspecError as error:
            raise ValueError("not a record of referrers") from error


def fallback_tag(subject: Digest) -> Tag:
    """Return the tag of the index of referrers; a longer digest is cut as the specification says."""
    return Tag(f"{subject.algorithm}-{subject.hex[:64]}")


def cosign_tags(subject: Digest) -> list[Tag]:
    """Return the tags that cosign may have used for signatures, attestations and SBOMs."""
    return [Tag(f"{fallback_tag(subject)}{suffix}") for suffix in COSIGN_SUFFIXES]


def parse_fallback_index(content: bytes) -> list[RawDescriptor]:
    """Return the descriptors in an index of referrers; none if it is not an index."""
    try:
        manifests = decode_object(content).get("manifests")
    except ValueError:
        return []
    items = manifests if isinstance(manifests, list) else []
    return [item for item in items if isinstance(item, dict)]


def subject_of_tag(tag: str) -> Digest | None:
    """Return the manifest that the content of a tag refers to; None for any other tag.

    Only the tags of SHA-256 digests tell.
    """
    match = _REFERRERS_TAG.fullmatch(tag)
    return Digest.parse(f"sha256:{match[1]}") if match else None


def parse_descriptor_digest(descriptor: Mapping[str, object]) -> Digest | None:
    """Return the digest in a descriptor as upstream sent it; None if it cannot be read."""
    try:
        return Digest.parse(str(descriptor.get("digest", "")))
    except InvalidDigestError:
        return None
