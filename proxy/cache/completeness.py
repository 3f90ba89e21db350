"""How much of an image the store has, platform by platform. Everything blocks: it is for threads."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import msgspec

from proxy.errors import InvalidManifestError
from proxy.oci import manifest as oci
from proxy.oci.config import ImageConfig, parse_config
from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest, Platform
from proxy.oci.platform import is_image
from proxy.storage.catalogue import Blob, Catalogue, Part
from proxy.storage.local import LocalStore
from proxy.storage.tables import Repository

State = Literal["complete", "partial", "absent"]

# An index of indexes is legal, and nobody makes one; deeper than this is not looked.
MAX_DEPTH = 3

_REMEMBERED = 4096


class Missing(msgspec.Struct, frozen=True):
    """What the store lacks."""

    digest: str
    size: int


class PlatformState(msgspec.Struct, frozen=True):
    """What the store has of one platform: `size` bytes. `platform` is "" where nothing says it."""

    platform: str
    digest: str
    state: State
    size: int
    missing: Sequence[Missing] = ()


class Offer(msgspec.Struct, frozen=True):
    """A manifest that an image offers for a platform."""

    platform: Platform | None
    digest: Digest
    size: int


class Looker:
    """Looks at images of one store."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        # What a digest names never changes.
        self._parsed = lru_cache(_REMEMBERED)(self._parse)
        self._platforms = lru_cache(_REMEMBERED)(self._read_platform)

    def has(self, digest: Digest, size: int) -> bool:
        """Ask the disk whether there is a file of that size."""
        opened = self._store.open(digest, size)
        if opened is None:
            return False
        with opened:
            return True

    def manifest(self, blob: Blob) -> Manifest | None:
        """Return a manifest of the store; None if its file is gone or damaged."""
        try:
            return self._parsed(blob.digest, blob.size, blob.media_type or "")
        except InvalidManifestError:
            return None

    def config(self, digest: Digest, size: int) -> ImageConfig | None:
        """Return a configuration of the store; None if it is gone, or no image's."""
        content = self._store.load(digest, size) if size <= oci.MAX_MANIFEST_SIZE else None
        try:
            return parse_config(content) if content else None
        except InvalidManifestError:
            return None

    def offers(self, catalogue: Catalogue, repository: Repository, top: Blob) -> list[Offer]:
        """Return the platforms of an image in their order: a plain manifest offers itself."""
        return list(self._offers(catalogue, repository, top, None, MAX_DEPTH))

    def state(
        self,
        catalogue: Catalogue,
        repository: Repository,
        offer: Offer,
        *,
        thoroughly: bool = False,
    ) -> PlatformState:
        """Return what the store has of an offer; `thoroughly` asks the disk for every file."""
        platform, digest = str(offer.platform or ""), str(offer.digest)
        blob = catalogue.blob(repository, offer.digest)
        if blob is None or (thoroughly and not self.has(blob.digest, blob.size)):
            return PlatformState(platform, digest, "absent", 0, [Missing(digest, offer.size)])
        parts = catalogue.parts(repository, offer.digest)
        here = [
            part
            for part in parts
            if part.is_here and (not thoroughly or self.has(part.digest, part.size))
        ]
        missing = [part for part in parts if part not in here]
        missing = self._without_foreign(blob, missing)
        return PlatformState(
            platform,
            digest,
            "partial" if missing else "complete",
            blob.size + sum(part.size for part in here),
            [Missing(str(part.digest), part.size) for part in missing],
        )

    def _offers(
        self,
        catalogue: Catalogue,
        repository: Repository,
        blob: Blob,
        platform: Platform | None,
        depth: int,
    ) -> Iterator[Offer]:
        manifest = self.manifest(blob)
        if manifest is None or not manifest.is_index or not depth:
            if platform is None and manifest:
                platform = self._platform_of(manifest)
            yield Offer(platform, blob.digest, blob.size)
            return
        for child in manifest.children:
            if not is_image(child.platform):
                continue
            below = catalogue.blob(repository, child.digest)
            if below and (child.platform is None or child.media_type in oci.INDEX_TYPES):
                yield from self._offers(catalogue, repository, below, child.platform, depth - 1)
            else:
                yield Offer(child.platform, child.digest, child.size)

    def _platform_of(self, manifest: Manifest) -> Platform | None:
        """Return the platform that an image's configuration names, if it is here."""
        config = next(iter(manifest.children), None)
        try:
            return self._platforms(config.digest, config.size) if config else None
        except InvalidManifestError:
            return None

    def _read_platform(self, digest: Digest, size: int) -> Platform | None:
        config = self.config(digest, size)
        if config is None:
            raise InvalidManifestError("not here")  # which is not remembered: it may come
        return config.platform

    def _parse(self, digest: Digest, size: int, media_type: str) -> Manifest:
        content = self._store.load(digest, size)
        if content is None:
            raise InvalidManifestError("not here")
        return oci.parse(content, media_type)

    def _without_foreign(self, blob: Blob, missing: list[Part]) -> list[Part]:
        """Return what a registry should have: foreign layers come from elsewhere."""
        manifest = self.manifest(blob) if missing else None
        if manifest is None:
            return missing
        foreign = {child.digest for child in manifest.children if child.is_foreign}
        order = {child.digest: place for place, child in enumerate(manifest.children)}
        left = [part for part in missing if part.digest not in foreign]
        return sorted(left, key=lambda part: order.get(part.digest, 0))
