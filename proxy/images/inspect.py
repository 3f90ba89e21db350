"""One image in every detail: platforms, layers and what made them, who shares them, what refers to it."""

from collections.abc import Sequence
from contextlib import suppress

import msgspec

from proxy.errors import InvalidManifestError, UnknownManifestError
from proxy.images.tree import Contents, Node, PlatformState
from proxy.names import spell
from proxy.oci.config import ImageConfig
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository, parse_image
from proxy.storage.image_queries import Blob, Catalogue, Root

# A base layer may belong to thousands: so many are named.
SHARERS = 10


class Layer(msgspec.Struct, frozen=True):
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
    layers: Sequence[Layer]


class Referrer(msgspec.Struct, frozen=True):
    """A manifest that refers to the image or one of its platforms: a signature, a bill of materials."""

    digest: str
    subject: str
    artifact_type: str
    size: int
    annotations: dict[str, str]


class Detail(msgspec.Struct, frozen=True, kw_only=True):
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


class Inspector:
    """Looks closely at one image of a store at a time."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents

    async def inspect(self, image: str) -> Detail:
        """Return what there is to say of an image, or of a manifest by its digest.

        Raises `UnknownManifestError` if it is not in the store, `InvalidReferenceError`, `StorageError`.
        """
        named = self._contents.names.locate(parse_image(image))
        await self._contents.index.flush()
        return await self._contents.read(lambda catalogue: self._inspect(catalogue, *named))

    def _inspect(
        self, catalogue: Catalogue, repository: Repository, reference: Reference
    ) -> Detail:
        roots = catalogue.find(repository, reference)
        digest = roots[0].digest if roots else reference
        top = catalogue.blob(repository, digest) if isinstance(digest, Digest) else None
        if top is None:
            raise UnknownManifestError(
                f"{spell(repository, reference)[:100]} is not in the store; "
                "pullcache images lists what is"
            )
        return self._detail(catalogue, repository, reference, top)

    def _detail(
        self, catalogue: Catalogue, repository: Repository, reference: Reference, top: Blob
    ) -> Detail:
        alike = catalogue.find(repository, top.digest)
        named = Root(repository, reference, top.digest, is_pinned=False)
        size, unique = catalogue.weigh(named)
        images = self._contents.closure(catalogue, top, repository).images()
        return Detail(
            name=spell(repository, reference),
            names=[spell(repository, root.reference) for root in alike],
            digest=str(top.digest),
            media_type=top.media_type or "",
            pinned=any(root.is_pinned and root.reference == reference for root in alike),
            size=size,
            unique=unique,
            cached=self._contents.store.committed_at(top.digest),
            used=top.used,
            platforms=[self._platform(catalogue, repository, reference, one) for one in images],
            referrers=[
                self._referrer(blob, subject)
                for subject in dict.fromkeys([top.digest, *(image.digest for image in images)])
                for blob in catalogue.referrers(repository, subject)
            ],
        )

    def _platform(
        self, catalogue: Catalogue, repository: Repository, reference: Reference, image: Node
    ) -> PlatformDetail:
        if image.manifest is None or not image.manifest.children:
            return PlatformDetail(image.state(), None, ())
        config = self._contents.config(image.manifest)
        layers = image.manifest.children[1:]
        commands = config.commands_of(len(layers)) if config else [""] * len(layers)
        me = (repository, reference)
        return PlatformDetail(
            image.state(),
            config,
            [
                Layer(
                    str(layer.digest),
                    layer.size,
                    layer.media_type,
                    layer.digest in image.here,
                    command,
                    [
                        spell(*other)
                        for other in catalogue.holders(layer.digest, SHARERS + 1)
                        if other != me
                    ][:SHARERS],
                )
                for layer, command in zip(layers, commands, strict=True)
            ],
        )

    def _referrer(self, blob: Blob, subject: Digest) -> Referrer:
        manifest = None
        with suppress(InvalidManifestError):
            manifest = self._contents.manifest(blob.digest, blob.size, blob.media_type or "")
        return Referrer(
            str(blob.digest),
            str(subject),
            manifest.artifact_type if manifest else "",
            blob.size,
            manifest.annotations if manifest else {},
        )
