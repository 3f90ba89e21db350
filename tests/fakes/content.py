"""The content of a fake registry, and ways to push images to it."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER: Final = "application/vnd.docker.image.rootfs.diff.tar.gzip"

REPOSITORY: Final = "library/app"


def digest_of(content: bytes, algorithm: str = "sha256") -> str:
    """Return the digest of `content` as text, computed without the code under test."""
    return f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"


@dataclass(frozen=True, slots=True)
class FakeManifest:
    """A manifest as a registry stores it."""

    content: bytes
    media_type: str

    @property
    def document(self) -> dict[str, Any]:
        """The parsed body."""
        document: dict[str, Any] = json.loads(self.content)
        return document

    @property
    def subject(self) -> str | None:
        """The digest of the subject; None if there is none that can be read."""
        with suppress(ValueError, TypeError, KeyError):
            return str(self.document["subject"]["digest"])
        return None


@dataclass(slots=True)
class FakeRepository:
    """A repository and everything that was pushed to it."""

    private: bool = False
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, FakeManifest] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FakeImage:
    """An image made by `add_image`. `digest` is what the tag names: the index if there is one."""

    repository: str
    tag: str | None
    digest: str
    media_type: str
    manifest: str
    config: str
    layers: tuple[str, ...]
    manifests: dict[str, str]
    """The digest of each platform's manifest; of a plain image there is one."""

    @property
    def blobs(self) -> tuple[str, ...]:
        """The digests of the first platform's config and layers."""
        return (self.config, *self.layers)


class FakeContent:
    """Repositories by name, and methods to push to them."""

    def __init__(self) -> None:
        self.repositories: dict[str, FakeRepository] = {}

    def repository(self, name: str) -> FakeRepository:
        """Return the repository of that name, created if it does not exist."""
        return self.repositories.setdefault(name, FakeRepository())

    def add_blob(
        self, content: bytes, repository: str = REPOSITORY, *, algorithm: str = "sha256"
    ) -> str:
        """Push a blob and return its digest."""
        digest = digest_of(content, algorithm)
        self.repository(repository).blobs[digest] = content
        return digest

    def add_manifest(
        self, repository: str, tag: str | None, content: bytes, media_type: str
    ) -> str:
        """Push a manifest, point `tag` at it if given, and return its digest."""
        digest = digest_of(content)
        target = self.repository(repository)
        target.manifests[digest] = FakeManifest(content, media_type)
        if tag is not None:
            target.tags[tag] = digest
        return digest

    def move_tag(self, repository: str, tag: str, digest: str) -> None:
        """Point `tag` at another manifest."""
        self.repository(repository).tags[tag] = digest

    def delete_tag(self, repository: str, tag: str) -> None:
        """Delete `tag`; its manifest stays."""
        del self.repository(repository).tags[tag]

    def add_image(
        self,
        repository: str = REPOSITORY,
        tag: str | None = "latest",
        layers: Iterable[bytes] = (b"layer",),
        *,
        index: bool = False,
        docker: bool = False,
        platforms: Sequence[str] = ("linux/amd64", "linux/arm64"),
        details: Mapping[str, Any] | None = None,
    ) -> FakeImage:
        """Push an image: a manifest of the first platform, or an index of all `platforms`.

        The platforms have different configs and the same layers. `details` are fields of the configs.
        """
        layers = tuple(layers)
        wanted = platforms if index else platforms[:1]
        manifests = {
            platform: self._add_platform(
                repository, layers, platform, docker=docker, details=details or {}
            )
            for platform in wanted
        }
        digest = manifests[wanted[0]]
        media_type = DOCKER_MANIFEST if docker else OCI_MANIFEST
        target = self.repository(repository)
        if index:
            media_type = DOCKER_LIST if docker else OCI_INDEX
            document = {
                "schemaVersion": 2,
                "mediaType": media_type,
                "manifests": [self._index_entry(target, *pair) for pair in manifests.items()],
            }
            digest = self.add_manifest(repository, None, _encode(document), media_type)
        if tag is not None:
            target.tags[tag] = digest
        first = manifests[wanted[0]]
        return FakeImage(
            repository=repository,
            tag=tag,
            digest=digest,
            media_type=media_type,
            manifest=first,
            config=target.manifests[first].document["config"]["digest"],
            layers=tuple(digest_of(layer) for layer in layers),
            manifests=manifests,
        )

    def _add_platform(
        self,
        repository: str,
        layers: Sequence[bytes],
        platform: str,
        *,
        docker: bool,
        details: Mapping[str, Any],
    ) -> str:
        os, architecture = platform.split("/")[:2]
        config = _encode(
            {
                "architecture": architecture,
                "os": os,
                "config": {"Cmd": ["/bin/true"]},
                "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
                **details,
            }
        )
        for content in (config, *layers):
            self.add_blob(content, repository)
        media_type = DOCKER_MANIFEST if docker else OCI_MANIFEST
        document = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": descriptor(config, DOCKER_CONFIG if docker else OCI_CONFIG),
            "layers": [
                descriptor(layer, DOCKER_LAYER if docker else OCI_LAYER) for layer in layers
            ],
        }
        return self.add_manifest(repository, None, _encode(document), media_type)

    @staticmethod
    def _index_entry(repository: FakeRepository, platform: str, digest: str) -> dict[str, Any]:
        os, architecture = platform.split("/")[:2]
        manifest = repository.manifests[digest]
        return {
            **descriptor(manifest.content, manifest.media_type),
            "platform": {"os": os, "architecture": architecture},
        }


def descriptor(content: bytes, media_type: str) -> dict[str, Any]:
    """Return the descriptor of `content`."""
    return {"mediaType": media_type, "digest": digest_of(content), "size": len(content)}


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=3).encode()
