"""Could an image be pulled with the network unplugged? Looked up to the last file.

What this repository was not seen to hold is not here for it: it is proven by asking upstream.
"""

from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import Executor
from itertools import islice

import msgspec

from proxy.cache.completeness import Looker, Missing, Offer, State
from proxy.cache.naming import Names, spell
from proxy.errors import DeniedError, InvalidReferenceError
from proxy.flight import in_thread
from proxy.oci.manifest import Platform
from proxy.oci.platform import choose, parse_platform
from proxy.oci.reference import Reference, Tag
from proxy.storage.catalogue import Blob, Catalogue, open_catalogue
from proxy.storage.index import Index
from proxy.storage.local import LocalStore
from proxy.storage.tables import Repository

# Stands for every platform that the image has.
ALL = "all"

_BATCH = 50


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image, and the platforms of it; none is the daemon's own."""

    image: str
    platforms: tuple[str, ...] = ()


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """What there is of an image for one platform. `size` bytes are here; `reason` says what is wrong."""

    image: str
    platform: str
    state: State
    digest: str | None = None
    size: int = 0
    missing: Sequence[Missing] = ()
    reason: str = ""


class Checker:
    """Checks images against one store."""

    def __init__(
        self, store: LocalStore, index: Index, names: Names, threads: Executor, native: Platform
    ) -> None:
        self._looker = Looker(store)
        self._index = index
        self._names = names
        self._threads = threads
        self._native = native

    async def check(self, images: Sequence[Wanted]) -> AsyncGenerator[Check, None]:
        """Yield what there is, image by image and platform by platform.

        What is written wrong, or not configured, is absent too, and `reason` says so. Raises `StorageError`.
        """
        left = iter(images)
        while batch := list(islice(left, _BATCH)):
            for check in await in_thread(self._threads, self._check_all, batch):
                yield check

    def _check_all(self, images: Sequence[Wanted]) -> list[Check]:
        with open_catalogue(self._index.path) as catalogue:
            return [check for wanted in images for check in self._check(catalogue, wanted)]

    def _check(self, catalogue: Catalogue, wanted: Wanted) -> Iterator[Check]:
        platforms = wanted.platforms or (str(self._native),)
        try:
            repository, reference = self._names.parse(wanted.image)
            parsed = [] if ALL in platforms else [parse_platform(text) for text in platforms]
        except (InvalidReferenceError, DeniedError) as error:
            yield _absent(wanted.image, ", ".join(platforms), str(error))
            return
        name = spell(repository, reference)
        top = self._top(catalogue, repository, reference)
        if top is None:
            for text in platforms:
                yield _absent(name, text, "not in the store")
            return
        offers = self._looker.offers(catalogue, repository, top)
        for platform, offer in _choices(offers, parsed, top, is_asked=bool(wanted.platforms)):
            if offer is None:
                known = ", ".join(str(offer.platform) for offer in offers) or "no platform"
                yield _absent(name, platform, f"the image is for {known} only"[:200])
            else:
                yield self._judge(catalogue, name, repository, offer, platform)

    def _top(
        self, catalogue: Catalogue, repository: Repository, reference: Reference
    ) -> Blob | None:
        digest = catalogue.tag(repository, reference) if isinstance(reference, Tag) else reference
        top = catalogue.blob(repository, digest) if digest else None
        # What is damaged is not there.
        is_there = top and self._looker.has(top.digest, top.size) and self._looker.manifest(top)
        return top if is_there else None

    def _judge(
        self, catalogue: Catalogue, name: str, repository: Repository, offer: Offer, platform: str
    ) -> Check:
        state = self._looker.state(catalogue, repository, offer, thoroughly=True)
        return Check(
            image=name,
            platform=platform,
            state=state.state,
            digest=state.digest,
            size=state.size,
            missing=state.missing,
            reason="" if state.state == "complete" else "not all of it is in the store",
        )


def _choices(
    offers: Sequence[Offer], wanted: Sequence[Platform], top: Blob, *, is_asked: bool
) -> list[tuple[str, Offer | None]]:
    """Return what clients of the wanted platforms take; of none, everything is wanted.

    A plain manifest is taken as it is, unless somebody asks for another platform than it says.
    """
    if not wanted:
        return [(str(offer.platform or ""), offer) for offer in offers]
    is_plain = [offer.digest for offer in offers] == [top.digest]
    if is_plain and (not is_asked or offers[0].platform is None):
        return [(str(offers[0].platform or platform), offers[0]) for platform in wanted]
    pairs = [(offer.platform, offer) for offer in offers]
    return [(str(platform), choose(pairs, platform)) for platform in wanted]


def _absent(image: str, platform: str, reason: str) -> Check:
    return Check(image=image, platform=platform, state="absent", reason=reason)
