"""One image in every detail: platforms, layers and what made them, who shares them, what refers to it."""

from collections.abc import Sequence
from concurrent.futures import Executor

import msgspec

from proxy.cache.completeness import Looker, Offer, PlatformState
from proxy.cache.naming import Names, spell
from proxy.errors import UnknownManifestError
from proxy.flight import in_thread
from proxy.oci.config import ImageConfig
from proxy.oci.digest import Digest
from proxy.oci.manifest import Child
from proxy.oci.reference import Reference, parse_image
from proxy.storage.catalogue import Blob, Catalogue, Root, open_catalogue
from proxy.storage.index import Index
from proxy.storage.local import LocalStore
from proxy.storage.tables import Repository

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

    def __init__(self, store: LocalStore, index: Index, names: Names, threads: Executor) -> None:
        self._store = store
        self._looker = Looker(store)
        self._index = index
        self._names = names
        self._threads = threads

    async def inspect(self, image: str) -> Detail:
        """Return what there is to say of an image, or of a manifest by its digest.

        Raises `UnknownManifestError` if it is not in the store, `InvalidReferenceError`, `StorageError`.
        """
        repository, reference = self._names.locate(parse_image(image))
        await self._index.flush()
        return await in_thread(self._threads, self._inspect, repository, reference)

    def _inspect(self, repository: Repository, reference: Reference) -> Detail:
        with open_catalogue(self._index.path) as catalogue:
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
        offers = self._looker.offers(catalogue, repository, top)
        return Detail(
            name=spell(repository, reference),
            names=[spell(repository, root.reference) for root in alike],
            digest=str(top.digest),
            media_type=top.media_type or "",
            pinned=any(root.is_pinned and root.reference == reference for root in alike),
            size=size,
            unique=unique,
            cached=self._store.committed_at(top.digest),
            used=top.used,
            platforms=[self._platform(catalogue, repository, reference, offer) for offer in offers],
            referrers=[
                self._referrer(blob, subject)
                for subject in dict.fromkeys([top.digest, *(offer.digest for offer in offers)])
                for blob in catalogue.referrers(repository, subject)
            ],
        )

    def _platform(
        self, catalogue: Catalogue, repository: Repository, reference: Reference, offer: Offer
    ) -> PlatformDetail:
        state = self._looker.state(catalogue, repository, offer, thoroughly=True)
        blob = catalogue.blob(repository, offer.digest)
        manifest = self._looker.manifest(blob) if blob else None
        if manifest is None or manifest.is_index or not manifest.children:
            return PlatformDetail(state, None, ())
        named, *layers = manifest.children
        config = self._looker.config(named.digest, named.size)
        commands = config.commands_of(len(layers)) if config else [""] * len(layers)
        missing = {one.digest for one in state.missing}
        me = (repository, reference)
        return PlatformDetail(
            state,
            config,
            [
                Layer(
                    str(layer.digest),
                    layer.size,
                    layer.media_type,
                    str(layer.digest) not in missing
                    and not _is_elsewhere(catalogue, repository, layer),
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
        manifest = self._looker.manifest(blob)
        return Referrer(
            str(blob.digest),
            str(subject),
            manifest.artifact_type if manifest else "",
            blob.size,
            manifest.annotations if manifest else {},
        )


def _is_elsewhere(catalogue: Catalogue, repository: Repository, layer: Child) -> bool:
    """Tell whether a foreign layer is not here, which does not make the image incomplete."""
    return layer.is_foreign and catalogue.blob(repository, layer.digest) is None
