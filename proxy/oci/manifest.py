"""Manifests and image indexes (image-spec, manifest.md and image-index.md).

Documents are stored and served exactly as received. Parsing is no stricter than in clients: fields
that are absent, null or of another type are left out of the result, and field names match in any
case, as in Go. Only a document that is both an index and a manifest is rejected, because two
clients could take it for different images (CVE-2021-41190).
"""

import json
import re
from collections.abc import Mapping, Sequence, Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from proxy.errors import InvalidDigestError, InvalidManifestError
from proxy.oci.digest import Digest
from proxy.oci.platform import Platform

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_MANIFEST_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
# Formats of artifacts from before manifests had an `artifactType`.
OCI_ARTIFACT = "application/vnd.oci.artifact.manifest.v1+json"
ORAS_ARTIFACT = "application/vnd.cncf.oras.artifact.manifest.v1+json"

INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_MANIFEST_LIST})
ARTIFACT_TYPES = frozenset({OCI_ARTIFACT, ORAS_ARTIFACT})
IMAGE_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST}) | INDEX_TYPES
MANIFEST_TYPES = IMAGE_TYPES | ARTIFACT_TYPES

# Registries match exact types, and some respond 404 unless all of them are listed.
ACCEPT = (
    f"{OCI_INDEX}, {OCI_MANIFEST}, {DOCKER_MANIFEST_LIST}, {DOCKER_MANIFEST}, "
    f"{OCI_ARTIFACT}, {ORAS_ARTIFACT}, */*;q=0.1"
)

# The least that a registry must accept (distribution-spec, "Pushing manifests"), and the most that
# clients read.
MAX_MANIFEST_SIZE = 4 << 20

_UNKNOWN_TYPE = "application/octet-stream"
_ATTESTED_ANNOTATION = "vnd.docker.reference.digest"
# Servers send these for content of unknown type.
_GENERIC_TYPES = frozenset({_UNKNOWN_TYPE, "application/json", "text/plain", "text/html"})
_DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
# RFC 6838 section 4.2.
_MEDIA_TYPE = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,126}/[a-z0-9][a-z0-9!#$&^_.+-]{0,126}")
_SURROGATE = re.compile("[\ud800-\udfff]")

_MAX_SIZE = 1 << 53
# Python takes long to parse numbers with thousands of digits; Go rejects numbers above 64 bits.
_MAX_DIGITS = 20

# The fields that are read, folded.
_FIELDS = frozenset(
    {"manifests", "config", "layers", "blobs", "fslayers", "mediatype", "artifacttype"}
    | {"annotations", "subject", "digest", "size", "urls"}
    | {"platform", "os", "architecture", "variant"}
)

# The values of each field that is read, without nulls: if a name occurs several times with different
# values, the first and the last, which are those that parsers take.
_Fields = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A child of a manifest or index: the config, a layer, or the manifest of one platform."""

    digest: Digest
    # None unless the document states a valid one.
    size: int | None
    media_type: str
    platform: Platform | None
    # A foreign layer is downloaded from its own URLs; registries need not have it.
    is_foreign: bool
    # The manifest of the same index that this one attests, as BuildKit says it.
    attested: Digest | None = None

    @property
    def is_manifest(self) -> bool:
        """Whether this child of an index is a manifest, also if only the type's name says so."""
        return not self.media_type or "manifest" in self.media_type or "index" in self.media_type


@dataclass(frozen=True, slots=True)
class Manifest:
    """A parsed manifest or index. `children` are in the order of the document; a config is the first.

    `is_stated` means that the document itself states its type. `unread` says which children could not be
    parsed, `doubt` why the document may not be a manifest; both are empty for a valid manifest.
    """

    media_type: str
    children: tuple[Descriptor, ...]
    subject: Digest | None
    artifact_type: str
    annotations: dict[str, str]
    has_config: bool = False
    is_stated: bool = False
    unread: str = ""
    doubt: str = ""

    @property
    def is_index(self) -> bool:
        """Whether this is an index of manifests.

        A BuildKit cache is an index of blobs, which belong together like those of a manifest.
        """
        return self.media_type in INDEX_TYPES and bool(self.manifests or not self.children)

    @property
    def manifests(self) -> tuple[Descriptor, ...]:
        """The children that are manifests."""
        if self.media_type not in INDEX_TYPES:
            return ()
        return tuple(child for child in self.children if child.is_manifest)

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """The children that are blobs."""
        if self.media_type not in INDEX_TYPES:
            return self.children
        return tuple(child for child in self.children if not child.is_manifest)

    @property
    def config(self) -> Descriptor | None:
        """The config, which a manifest of an image has."""
        return self.children[0] if self.has_config else None

    @property
    def layers(self) -> tuple[Descriptor, ...]:
        """The blobs except the config."""
        return self.blobs[self.has_config :]

    @property
    def child_count(self) -> int:
        """The number of different blobs that it names."""
        return len({child.digest for child in self.children})

    def select_platform(self, os: str, architecture: str) -> Digest | None:
        """Return the first manifest of an index for a platform; Docker Hub selects the same."""
        for child in self.manifests:
            platform = child.platform
            if platform and (platform.os, platform.architecture) == (os, architecture):
                return child.digest
        return None


def parse_manifest(content: bytes, content_type: str) -> Manifest:
    """Parse a manifest or index that was received with the header `content_type`.

    Raises `InvalidManifestError` if it is too large, or both an index and a manifest.
    """
    if len(content) > MAX_MANIFEST_SIZE:
        raise InvalidManifestError(f"larger than {MAX_MANIFEST_SIZE} bytes")
    header = content_type.partition(";")[0].strip().lower()
    try:
        # Go replaces what is not UTF-8, and ignores what follows the document.
        document, _ = _DECODER.raw_decode(content.decode(errors="replace").lstrip(" \t\r\n"))
        if isinstance(document, tuple):
            return _Reader(_fold_fields(document)).read(header)
        reason = "not a manifest: not a JSON object"
    except (ValueError, RecursionError) as error:
        reason = f"not a manifest: {str(error)[:80]}"
    return Manifest(_valid_type(header), (), None, "", {}, unread=reason, doubt=reason)


def _parse_int(digits: str) -> int | None:
    return int(digits) if len(digits) <= _MAX_DIGITS else None


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


# Objects become tuples of pairs, which show repeated names.
_DECODER = json.JSONDecoder(
    object_pairs_hook=tuple, parse_int=_parse_int, parse_constant=_reject_constant
)


class _Reader:
    """Parses one document; `unread` becomes the first part that cannot be parsed."""

    def __init__(self, fields: _Fields) -> None:
        self._fields = fields
        self._has_image_fields = "config" in fields or "layers" in fields
        self._unread = ""

    def read(self, header: str) -> Manifest:
        """Return the manifest. Raises `InvalidManifestError` if the document is of both kinds."""
        stated = [_text(value).lower() for value in self._fields.get("mediatype", ())]
        self._check_kind({header, *stated})
        config = self._read_config()
        is_artifact = ARTIFACT_TYPES.intersection((header, *stated))
        children = [
            *((config,) if config else ()),
            *self._read_list("manifests"),
            *self._read_list("layers"),
            *(self._read_list("blobs") if is_artifact else ()),
        ]
        stated_type = self._find_stated_type(header, stated)
        media_type = stated_type or self._derive_type(config) or _valid_type(header)
        is_known = stated_type or header in MANIFEST_TYPES or children
        return Manifest(
            media_type,
            tuple(children),
            self._read_subject(),
            # image-spec, manifest.md: without an artifactType, the config's media type is used.
            _last_text(self._fields, "artifacttype") or (config.media_type if config else ""),
            _read_annotations(self._fields),
            config is not None,
            bool(stated_type),
            self._unread,
            "" if is_known else f"not a manifest: sent as {header[:80] or 'no type'}",
        )

    # The kind of the document.

    def _check_kind(self, types: AbstractSet[str]) -> None:
        """Raise `InvalidManifestError` if one parser could take it for an index, another not."""
        is_index = "manifests" in self._fields or types & INDEX_TYPES
        is_image = self._has_image_fields or "fslayers" in self._fields
        if is_index and (is_image or types & MANIFEST_TYPES - INDEX_TYPES):
            raise InvalidManifestError("it is both an image index and a manifest")

    def _find_stated_type(self, header: str, stated: Sequence[str]) -> str:
        """Return the media type that the document states; "" if it is not a manifest type."""
        if known := [one for one in stated if one in MANIFEST_TYPES]:
            return known[-1]
        is_agreed = header in stated and header not in _GENERIC_TYPES
        return header if is_agreed and "manifests" not in self._fields else ""

    def _derive_type(self, config: Descriptor | None) -> str:
        """Return the media type of a document that states none, by its fields.

        The header is no evidence: it is not covered by the digest, by which all repositories share
        the document.
        """
        if "manifests" in self._fields:
            return OCI_INDEX
        if not self._has_image_fields:
            return ""
        is_docker = config is not None and config.media_type == _DOCKER_CONFIG
        return DOCKER_MANIFEST if is_docker else OCI_MANIFEST

    # The children.

    def _read_list(self, name: str) -> list[Descriptor]:
        found = self._fields.get(name, [[]])
        if len(found) > 1 or not isinstance(found[0], list):
            self._unread = self._unread or f"its {name} are not one list"
            return []
        return [child for item in found[0] if (child := self._read_descriptor(item))]

    def _read_config(self) -> Descriptor | None:
        found = self._fields.get("config", [])
        if len(found) > 1:
            self._unread = self._unread or "it has several configs"
        return self._read_descriptor(found[0]) if len(found) == 1 else None

    def _read_descriptor(self, value: object) -> Descriptor | None:
        fields = _fold_fields(value)
        digest = _read_digest(fields)
        if digest is None:
            text = _last_text(fields, "digest")
            self._unread = self._unread or f"{text[:40]!r} is not a digest that can be verified"
            return None
        media_type = _last_text(fields, "mediatype")
        is_foreign = "foreign" in media_type or "nondistrib" in media_type
        return Descriptor(
            digest,
            _read_size(fields),
            media_type,
            _read_platform(fields),
            is_foreign or any(fields.get("urls", ())),
            _read_attested(fields),
        )

    def _read_subject(self) -> Digest | None:
        found = self._fields.get("subject", ())
        return _read_digest(_fold_fields(found[0])) if len(found) == 1 else None


def _fold_fields(value: object) -> _Fields:
    """Return the fields of an object that are read; none if it is not an object."""
    fields: dict[str, list[Any]] = {}
    for name, item in value if isinstance(value, tuple) else ():
        folded = name.casefold()
        if folded in _FIELDS and item is not None:
            fields[folded] = [fields[folded][0], item] if folded in fields else [item]
    return {name: found[:1] if found[0] == found[-1] else found for name, found in fields.items()}


def _read_digest(fields: _Fields) -> Digest | None:
    """Return the digest of a descriptor; None if it has none that can be verified."""
    found = fields.get("digest", ())
    try:
        return Digest.parse(_text(found[0])) if len(found) == 1 else None
    except InvalidDigestError:
        return None


def _read_annotations(fields: _Fields) -> dict[str, str]:
    return {
        _text(name): _text(value)
        for found in fields.get("annotations", ())
        if isinstance(found, tuple)
        for name, value in found
        if isinstance(value, str | None)
    }


def _read_attested(fields: _Fields) -> Digest | None:
    text = (
        _read_annotations(fields).get(_ATTESTED_ANNOTATION, "") if "annotations" in fields else ""
    )
    with suppress(InvalidDigestError):
        return Digest.parse(text) if text else None
    return None


def _read_size(fields: _Fields) -> int | None:
    found = fields.get("size", ())
    size = found[0] if len(found) == 1 else None
    return size if type(size) is int and 0 <= size <= _MAX_SIZE else None


def _read_platform(fields: _Fields) -> Platform | None:
    found = _fold_fields(next(iter(fields.get("platform", ())), None))
    architecture = _last_text(found, "architecture")
    # Without an operating system, docker and containerd take that of their host.
    os = _last_text(found, "os") or "linux"
    return Platform(os, architecture, _last_text(found, "variant")) if architecture else None


def _valid_type(header: str) -> str:
    return header if _MEDIA_TYPE.fullmatch(header) else _UNKNOWN_TYPE


def _last_text(fields: _Fields, name: str) -> str:
    return _text(["", *fields.get(name, ())][-1])


def _text(value: object) -> str:
    """Return a text that can be encoded; "" for any other value."""
    return _SURROGATE.sub("\ufffd", value) if isinstance(value, str) else ""
