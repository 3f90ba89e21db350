"""One image in every detail: platforms, layers and what made them, who shares them, what refers to it."""

from collections.abc import Sequence
from contextlib import suppress

import msgspec

from proxy.errors import InvalidManifestError, UnknownManifestError
from proxy.images.tree import ImageStore, ManifestNode, PlatformState
from proxy.names import display_name
from proxy.oci.config import ImageConfig
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository, parse_image
from proxy.storage.image_queries import ImageQueries, ImageRow, StoredBlob

# A base layer may belong to thousands: so many are named.
MAX_SHARED_WITH = 10


class LayerDetail(msgspec.Struct, frozen=True):
    """A layer. `command` made it, if that is known; `shared` are other images that have it, up to `SHARERS`."""

    digest: str
    size: int
    media_type: str
    cached: bool
    command: str
    shared: Sequence[str]


class PlatformDetail(msgspec.Struct, frozen=True):
    """An image for one platform; `config` and `layers` are empty as long as they are not in the store."""

    state: PlatformState
    config: ImageConfig | None
    layers: Sequence[LayerDetail]


class Referrer(msgspec.Struct, frozen=True):
    """A manifest that refers to the image or one of its platforms: a signature, a bill of materials."""

    digest: str
    subject: str
    artifact_type: str
    size: int
    annotations: dict[str, str]


class ImageDetail(msgspec.Struct, frozen=True, kw_only=True):
    """An image of the store. `names` are all that its repository has for its digest; sizes are as stored."""

    name: str
    names: Sequence[str]
    digest: str
    media_type: str
    pinned: bool
    size: int
    unique: int
    cached: float | None
    used: float
    platforms: Sequence[PlatformDetail]
    referrers: Sequence[Referrer]


class ImageInspector:
    """Looks closely at one image of a store at a time."""

    def __init__(self, image_store: ImageStore) -> None:
        self._image_store = image_store

    async def inspect(self, image: str) -> ImageDetail:
        """Return what there is to say of an image, or of a manifest by its digest.

        Raises `UnknownManifestError` if it is not in the store, `InvalidReferenceError`, `StorageError`.
        """
        named = self._image_store.names.to_repository(parse_image(image))
        await self._image_store.index.flush()
        return await self._image_store.query(lambda catalogue: self._inspect(catalogue, *named))

    def _inspect(
        self, queries: ImageQueries, repository: Repository, reference: Reference
    ) -> ImageDetail:
        roots = queries.find_images(repository, reference)
        digest = roots[0].digest if roots else reference
        top = queries.blob(repository, digest) if isinstance(digest, Digest) else None
        if top is None:
            raise UnknownManifestError(
                f"{display_name(repository, reference)[:100]} is not in the store; "
                "pullcache images lists what is"
            )
        return self._describe_image(queries, repository, reference, top)

    def _describe_image(
        self, queries: ImageQueries, repository: Repository, reference: Reference, top: StoredBlob
    ) -> ImageDetail:
        alike = queries.find_images(repository, top.digest)
        named = ImageRow(repository, reference, top.digest, is_pinned=False)
        size, unique = queries.image_sizes(named)
        images = self._image_store.build_tree(queries, top, repository).platform_manifests()
        return ImageDetail(
            name=display_name(repository, reference),
            names=[display_name(repository, root.reference) for root in alike],
            digest=str(top.digest),
            media_type=top.media_type or "",
            pinned=any(root.is_pinned and root.reference == reference for root in alike),
            size=size,
            unique=unique,
            cached=self._image_store.blob_store.committed_at(top.digest),
            used=top.used_at,
            platforms=[
                self._describe_platform(queries, repository, reference, one) for one in images
            ],
            referrers=[
                self._describe_referrer(blob, subject)
                for subject in dict.fromkeys([top.digest, *(image.digest for image in images)])
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
        if node.manifest is None or not node.manifest.children:
            return PlatformDetail(node.platform_state(), None, ())
        config = self._image_store.load_config(node.manifest)
        layers = node.manifest.children[1:]
        commands = config.commands_for_layers(len(layers)) if config else [""] * len(layers)
        me = (repository, reference)
        return PlatformDetail(
            node.platform_state(),
            config,
            [
                LayerDetail(
                    str(layer.digest),
                    layer.size,
                    layer.media_type,
                    layer.digest in node.stored,
                    command,
                    [
                        display_name(*other)
                        for other in queries.images_containing(layer.digest, MAX_SHARED_WITH + 1)
                        if other != me
                    ][:MAX_SHARED_WITH],
                )
                for layer, command in zip(layers, commands, strict=True)
            ],
        )

    def _describe_referrer(self, blob: StoredBlob, subject: Digest) -> Referrer:
        manifest = None
        with suppress(InvalidManifestError):
            manifest = self._image_store.load_manifest(
                blob.digest, blob.size, blob.media_type or ""
            )
        return Referrer(
            str(blob.digest),
            str(subject),
            manifest.artifact_type if manifest else "",
            blob.size,
            manifest.annotations if manifest else {},
        )
