"""The documents of an OCI image layout (image-spec, image-layout.md) and docker's `manifest.json`.

A bundle is a tar with both, so that every tool can load it. Image names are annotations in
`index.json`, and different tools use different ones.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import msgspec

from proxy.errors import BundleError, InvalidDigestError
from proxy.oci.digest import Digest
from proxy.oci.referrers import ReferrerRecord

LAYOUT_FILE = "oci-layout"
INDEX_FILE = "index.json"
DOCKER_MANIFEST_FILE = "manifest.json"
# Our own: the manifests of each index that this bundle or an earlier one contains. They are not in
# an annotation, because containerd keeps annotations even when it exports fewer platforms than it
# loaded.
EXPECTED_FILE = "pullcache.json"
# Our own: what is known about the images, see proxy/bundle/facts.py.
FACTS_FILE = "pullcache.facts.json"
LAYOUT_FILES = frozenset({LAYOUT_FILE, INDEX_FILE, DOCKER_MANIFEST_FILE, EXPECTED_FILE, FACTS_FILE})

LAYOUT_FILE_CONTENT = b'{"imageLayoutVersion":"1.0.0"}'

# A descriptor takes about 500 bytes, so this is enough for ten thousand images.
MAX_DOCUMENT_SIZE = 8 << 20

IMAGE_CONFIG_TYPES = frozenset(
    {
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.docker.container.image.v1+json",
    }
)

# containerd and docker (25 and later) write the first, skopeo and umoci the second.
_IMAGE_NAME_ANNOTATION = "io.containerd.image.name"
_REF_NAME_ANNOTATION = "org.opencontainers.image.ref.name"

_BLOB_PATH = re.compile(r"blobs/(sha256|sha512)/([0-9a-f]+)")

T = TypeVar("T")


class _LayoutDescriptor(msgspec.Struct, rename="camel"):
    media_type: str
    digest: str
    size: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
    annotations: dict[str, str] | None = None


class _IndexDocument(msgspec.Struct):
    manifests: list[_LayoutDescriptor]


class _LayoutDocument(msgspec.Struct, rename="camel"):
    image_layout_version: str


class _ExpectedDocument(msgspec.Struct):
    manifests: dict[str, list[str]] = {}
    referrers: list[_LayoutDescriptor] = []
    records: dict[str, dict[str, ReferrerRecord]] = {}


@dataclass(frozen=True, slots=True)
class BundleDetails:
    """What `pullcache.json` states: `manifests` are those to expect in the store, by image index.

    `referrers` are signatures and the like of the images, with names as images have them; `records`
    are what the registry had of them, by repository and subject, also where it had none. They are
    not in `index.json`, because docker and containerd take what is listed there for images to
    unpack.
    """

    manifests: Mapping[Digest, Sequence[Digest]] = field(default_factory=dict)
    referrers: Sequence["LayoutImage"] = ()
    records: Mapping[str, Mapping[Digest, ReferrerRecord]] = field(default_factory=dict)


class _DockerImageEntry(msgspec.Struct, rename="pascal"):
    config: str
    repo_tags: list[str] | None
    layers: list[str]


@dataclass(frozen=True, slots=True)
class LayoutImage:
    """An image in a layout.

    `name` is `registry/repository:tag` or `…@digest`, "" if the layout has none; some tools write
    only a `tag`.
    """

    digest: Digest
    size: int
    media_type: str
    name: str = ""
    tag: str = ""


@dataclass(frozen=True, slots=True)
class DockerImage:
    """An image of one platform as `docker load` reads it, identified by its config's digest."""

    config: Digest
    layers: tuple[Digest, ...]
    names: tuple[str, ...]


def blob_path(digest: Digest) -> str:
    """Return the path of a blob in a layout."""
    return f"blobs/{digest.algorithm}/{digest.hex}"


def parse_blob_path(path: str) -> Digest | None:
    """Return the digest of the blob at `path`, None if that is not the path of a blob."""
    match = _BLOB_PATH.fullmatch(path)
    try:
        return Digest.parse(f"{match[1]}:{match[2]}") if match else None
    except InvalidDigestError:
        return None


def encode_index(images: Sequence[LayoutImage]) -> bytes:
    """Return `index.json`.

    If two images have the same tag, their ref.name is the full name instead of the ambiguous tag.
    """
    tags = [image.tag for image in images]
    return _encode(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [
                _encode_descriptor(image, tags.count(image.tag) == 1) for image in images
            ],
        }
    )


def _encode_descriptor(image: LayoutImage, has_unique_tag: bool) -> dict[str, Any]:
    annotations = {_IMAGE_NAME_ANNOTATION: image.name}
    if image.tag:
        annotations[_REF_NAME_ANNOTATION] = image.tag if has_unique_tag else image.name
    return {
        "mediaType": image.media_type,
        "digest": str(image.digest),
        "size": image.size,
        "annotations": annotations,
    }


def encode_docker_manifest(images: Iterable[DockerImage]) -> bytes:
    """Return docker's `manifest.json`. Layers stay compressed."""
    return _encode(
        [
            {
                "Config": blob_path(image.config),
                "RepoTags": list(image.names),
                "Layers": [blob_path(layer) for layer in image.layers],
            }
            for image in images
        ]
    )


def encode_details(details: BundleDetails) -> bytes:
    """Return `pullcache.json`; empty if there is nothing to state."""
    if not (details.manifests or details.referrers or details.records):
        return b""
    expected = details.manifests
    # Version 0.1.0 requires the first field.
    document: dict[str, Any] = {
        "manifests": {str(key): [*map(str, expected[key])] for key in expected}
    }
    if details.referrers:
        document["referrers"] = [_encode_descriptor(one, True) for one in details.referrers]
    if details.records:
        document["records"] = {
            name: {str(subject): record for subject, record in records.items()}
            for name, records in details.records.items()
        }
    return _encode(document)


def parse_details(content: bytes) -> BundleDetails:
    """Return what `pullcache.json` states. Raises `BundleError`."""
    document = _decode(content, _ExpectedDocument, EXPECTED_FILE)
    expected = document.manifests
    return BundleDetails(
        {_parse_digest(key): [*map(_parse_digest, expected[key])] for key in expected},
        [_parse_descriptor(one) for one in document.referrers],
        {
            name: {_parse_digest(subject): record for subject, record in records.items()}
            for name, records in document.records.items()
        },
    )


def check_layout(content: bytes) -> None:
    """Raise `BundleError` unless `oci-layout` has version 1.0.0."""
    version = _decode(content, _LayoutDocument, LAYOUT_FILE).image_layout_version
    if version != "1.0.0":
        raise BundleError(f"unsupported image layout version {version[:40]!r} (supported: 1.0.0)")


def parse_index(content: bytes) -> list[LayoutImage]:
    """Return the images in `index.json`. Raises `BundleError`."""
    return [
        _parse_descriptor(item) for item in _decode(content, _IndexDocument, INDEX_FILE).manifests
    ]


def _parse_descriptor(descriptor: _LayoutDescriptor) -> LayoutImage:
    annotations = descriptor.annotations or {}
    name, tag = (
        annotations.get(_IMAGE_NAME_ANNOTATION, ""),
        annotations.get(_REF_NAME_ANNOTATION, ""),
    )
    if "/" in tag or ":" in tag:
        name, tag = name or tag, ""
    return LayoutImage(
        _parse_digest(descriptor.digest),
        descriptor.size,
        descriptor.media_type,
        name,
        tag,
    )


def parse_docker_manifest(content: bytes) -> dict[Digest, list[str]]:
    """Return the names in `manifest.json` by the digest of the image's config.

    Leaves out images in docker's old format, whose config is not in `blobs/`. Raises `BundleError`.
    """
    names: dict[Digest, list[str]] = {}
    for image in _decode(content, list[_DockerImageEntry], DOCKER_MANIFEST_FILE):
        config = parse_blob_path(image.config)
        if config:
            names.setdefault(config, []).extend(image.repo_tags or ())
    return names


def _parse_digest(text: str) -> Digest:
    try:
        return Digest.parse(text)
    except InvalidDigestError as error:
        raise BundleError(f"the image layout has a malformed digest: {error}") from error


def _encode(document: object) -> bytes:
    return msgspec.json.encode(document)


def _decode(content: bytes, kind: type[T], name: str) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name} is invalid: {str(error)[:100]}") from error
