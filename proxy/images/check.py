"""Could an image be pulled with the network unplugged? Looked up to the last file.

What this repository was not seen to hold is not here for it: it is proven by asking upstream.
"""

from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial
from itertools import islice

import msgspec

from proxy.errors import DeniedError, InvalidReferenceError
from proxy.images.tree import Contents, Missing, Node, State
from proxy.names import spell
from proxy.oci.manifest import Platform
from proxy.oci.platform import choose, parse_platform
from proxy.storage.image_queries import Catalogue

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

    def __init__(self, contents: Contents, native: Platform) -> None:
        self._contents = contents
        self._native = native

    async def check(self, images: Sequence[Wanted]) -> AsyncGenerator[Check, None]:
        """Yield what there is, image by image and platform by platform.

        What is written wrong, or not configured, is absent too, and `reason` says so. Raises `StorageError`.
        """
        left = iter(images)
        while batch := list(islice(left, _BATCH)):
            for check in await self._contents.read(partial(self._check_all, batch)):
                yield check

    def _check_all(self, images: Sequence[Wanted], catalogue: Catalogue) -> list[Check]:
        return [check for wanted in images for check in self._check(catalogue, wanted)]

    def _check(self, catalogue: Catalogue, wanted: Wanted) -> Iterator[Check]:
        platforms = wanted.platforms or (str(self._native),)
        try:
            repository, reference = self._contents.names.parse(wanted.image)
            parsed = [] if ALL in platforms else [parse_platform(text) for text in platforms]
        except (InvalidReferenceError, DeniedError) as error:
            yield _absent(wanted.image, ", ".join(platforms), str(error))
            return
        name = spell(repository, reference)
        found = self._contents.find(catalogue, repository, reference)
        top = self._contents.closure(catalogue, found, repository) if found else None
        # What is damaged is not there.
        if top is None or top.manifest is None:
            for text in platforms:
                yield _absent(name, text, "not in the store")
            return
        for platform, image in _choices(top, parsed, is_asked=bool(wanted.platforms)):
            if image is None:
                known = ", ".join(str(one.platform) for one in top.images()) or "no platform"
                yield _absent(name, platform, f"the image is for {known} only"[:200])
            else:
                yield _judge(name, platform, image)


def _choices(
    top: Node, wanted: Sequence[Platform], *, is_asked: bool
) -> list[tuple[str, Node | None]]:
    """Return what clients of the wanted platforms take; of none, everything is wanted.

    A plain manifest is taken as it is, unless somebody asks for another platform than it says.
    """
    images = top.images()
    if not wanted:
        return [(str(image.platform or ""), image) for image in images]
    if images == [top] and (not is_asked or top.platform is None):
        return [(str(top.platform or platform), top) for platform in wanted]
    pairs = [(image.platform, image) for image in images]
    return [(str(platform), choose(pairs, platform)) for platform in wanted]


def _judge(name: str, platform: str, image: Node) -> Check:
    state = image.state()
    incomplete = image.problem or "not all of it is in the store"
    return Check(
        image=name,
        platform=platform,
        state=state.state,
        digest=state.digest,
        size=state.size,
        missing=state.missing,
        reason="" if state.state == "complete" else incomplete,
    )


def _absent(image: str, platform: str, reason: str) -> Check:
    return Check(image=image, platform=platform, state="absent", reason=reason)
