"""`inspect`: everything that the store knows about one image.

Platforms, layers with the commands that made them, other images that share them, and referrers.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from proxy.errors import InvalidManifestError, StorageError, UnknownManifestError
from proxy.images.store import ImageStore
from proxy.images.tree import ManifestNode, PlatformState, build_tree
from proxy.images.trust import (
    MeaningSummary,
    PolicySummary,
    TrustSummary,
    describe_history,
    describe_policy,
    describe_trust,
)
from proxy.names import display_name
from proxy.oci.config import ImageConfig
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository, parse_image
from proxy.policy.rules import RuleSet
from proxy.storage.image_queries import ImageQueries, ImageRow, StoredBlob
from proxy.timestamps import to_seconds

# Thousands of images may share a base layer; name at most this many.
MAX_SHARED_WITH = 10


class LayerDetail(msgspec.Struct, frozen=True):
    """A layer of one platform.

    `command` is the build step that made it, if the history tells; `shared` are up to
    `MAX_SHARED_WITH` other images that have it.
    """

    digest: str
    size: int
    media_type: str
    cached: bool
    command: str
    shared: Sequence[str]


class PlatformDetail(msgspec.Struct, frozen=True):
    """An image for one platform; `config` and `layers` are empty if not stored."""

    state: PlatformState
    config: ImageConfig | None
    layers: Sequence[LayerDetail]


class Referrer(msgspec.Struct, frozen=True):
    """A manifest that refers to the image or one of its platforms: a signature or an SBOM."""

    digest: str
    subject: str
    artifact_type: str
    size: int
    annotations: dict[str, str]


class ImageDetail(msgspec.Struct, frozen=True, kw_only=True):
    """A stored image. `names` are all names of its digest in its repository.

    Sizes are stored bytes, `unique` those that removing the image would free; times are Unix time.
    `used` counts for eviction, `pulled` is when a client last pulled it, None if never.
    `history` is what the tag meant, the most recent first.
    """

    name: str
    names: Sequence[str]
    digest: str
    media_type: str
    pinned: bool
    size: int
    unique: int
    cached: int | None
    used: int
    pulled: int | None
    trust: TrustSummary
    policy: PolicySummary | None
    history: Sequence[MeaningSummary]
    platforms: Sequence[PlatformDetail]
    referrers: Sequence[Referrer]


class ImageInspector:
    """Describes images of one store."""

    def __init__(self, image_store: ImageStore, rules: RuleSet, clock: Callable[[], float]) -> None:
        self._image_store = image_store
        self._rules = rules
        self._clock = clock

    async def inspect(self, image: str) -> ImageDetail:
        """Describe an image, or a manifest by its digest.

        Raises `UnknownManifestError` if it is not stored, `InvalidReferenceError` and
        `StorageError`.
        """
        repository, reference = self._image_store.names.to_repository(parse_image(image))
        with suppress(StorageError):  # then the times of use are older
            await self._image_store.index.flush()
        return await self._image_store.query(
            lambda queries: self._describe_image(queries, repository, reference)
        )

    def _describe_image(
        self, queries: ImageQueries, repository: Repository, reference: Reference
    ) -> ImageDetail:
        rows = queries.find_images(repository, reference)
        digest = rows[0].digest if rows else reference
        top = queries.blob(repository, digest) if isinstance(digest, Digest) else None
        name = display_name(repository, reference)
        if top is None:
            raise UnknownManifestError(
                f"{name[:100]} is not in the store; pullcache images lists stored images"
            )
        same_digest = queries.find_images(repository, top.digest)
        size, unique = queries.image_sizes(
            ImageRow(repository, reference, top.digest, is_pinned=False)
        )
        tree = build_tree(self._image_store, queries, top, repository)
        manifests = tree.platform_manifests()
        return ImageDetail(
            name=name,
            names=[display_name(repository, row.reference) for row in same_digest],
            digest=str(top.digest),
            media_type=top.media_type or "",
            pinned=any(row.is_pinned and row.reference == reference for row in same_digest),
            size=size,
            unique=unique,
            cached=to_seconds(self._image_store.blob_store.committed_at(top.digest)),
            used=to_seconds(top.used_at),
            pulled=to_seconds(queries.pulled_at(repository, reference, top.digest)),
            trust=describe_trust(queries, repository),
            policy=describe_policy(
                queries, self._rules, repository, reference, top.digest, self._clock()
            ),
            history=describe_history(queries, repository, reference),
            platforms=[
                self._describe_platform(queries, repository, reference, node) for node in manifests
            ],
            referrers=[
                self._describe_referrer(blob, subject)
                for subject in dict.fromkeys([top.digest, *(node.digest for node in manifests)])
                for blob in queries.referrers(repository, subject)
            ],
        )

    def _describe_platform(
        self,
        queries: ImageQueries,
        repository: Repository,
        reference: Reference,
        node: ManifestNode,
    ) -> PlatformDetail:
        if node.manifest is None:
            return PlatformDetail(node.platform_state(), None, ())
        config = self._image_store.load_config(node.manifest, node.stored)
        layers = node.manifest.layers
        commands = config.commands_for_layers(len(layers)) if config else [""] * len(layers)
        return PlatformDetail(
            node.platform_state(),
            config,
            [
                LayerDetail(
                    str(layer.digest),
                    node.stored.get(layer.digest, layer.size or 0),
                    layer.media_type,
                    layer.digest in node.stored,
                    command,
                    _images_sharing(queries, layer.digest, (repository, reference)),
                )
                for layer, command in zip(layers, commands, strict=True)
            ],
        )

    def _describe_referrer(self, blob: StoredBlob, subject: Digest) -> Referrer:
        manifest = None
        with suppress(InvalidManifestError):
            manifest = self._image_store.load_manifest(blob.digest, blob.size)
        return Referrer(
            str(blob.digest),
            str(subject),
            manifest.artifact_type if manifest else "",
            blob.size,
            manifest.annotations if manifest else {},
        )


def _images_sharing(
    queries: ImageQueries, layer: Digest, image: tuple[Repository, Reference]
) -> list[str]:
    """Return up to `MAX_SHARED_WITH` images other than `image` that contain the layer."""
    containing = queries.images_containing(layer, MAX_SHARED_WITH + 1)
    return [display_name(*other) for other in containing if other != image][:MAX_SHARED_WITH]
