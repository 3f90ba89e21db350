"""Could an image be pulled with the network unplugged? Looked up to the last file.

What this repository was not seen to hold is not here for it: it is proven by asking upstream.
"""

from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial
from itertools import islice

import msgspec

from proxy.errors import DeniedError, InvalidReferenceError
from proxy.images.tree import ImageState, ImageStore, ManifestNode, MissingBlob
from proxy.names import display_name
from proxy.oci.platform import Platform, choose_platform, parse_platform
from proxy.storage.image_queries import ImageQueries

# Stands for every platform that the image has.
ALL_PLATFORMS = "all"

_BATCH_SIZE = 50


class ImageSelection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image, and the platforms of it; none is the daemon's own."""

    image: str
    platforms: tuple[str, ...] = ()


class ImageCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What there is of an image for one platform. `size` bytes are here; `reason` says what is wrong."""

    image: str
    platform: str
    state: ImageState
    digest: str | None = None
    size: int = 0
    missing: Sequence[MissingBlob] = ()
    reason: str = ""


class OfflineChecker:
    """Checks images against one store."""

    def __init__(self, image_store: ImageStore, native_platform: Platform) -> None:
        self._image_store = image_store
        self._native_platform = native_platform

    async def check(self, selections: Sequence[ImageSelection]) -> AsyncGenerator[ImageCheck, None]:
        """Yield what there is, image by image and platform by platform.

        What is written wrong, or not configured, is absent too, and `reason` says so. Raises `StorageError`.
        """
        left = iter(selections)
        while batch := list(islice(left, _BATCH_SIZE)):
            for check in await self._image_store.query(partial(self._check_all, batch)):
                yield check

    def _check_all(
        self, selections: Sequence[ImageSelection], queries: ImageQueries
    ) -> list[ImageCheck]:
        return [check for wanted in selections for check in self._check_image(queries, wanted)]

    def _check_image(
        self, queries: ImageQueries, selection: ImageSelection
    ) -> Iterator[ImageCheck]:
        platforms = selection.platforms or (str(self._native_platform),)
        try:
            repository, reference = self._image_store.names.parse_allowed(selection.image)
            parsed = (
                [] if ALL_PLATFORMS in platforms else [parse_platform(text) for text in platforms]
            )
        except (InvalidReferenceError, DeniedError) as error:
            yield _absent_check(selection.image, ", ".join(platforms), str(error))
            return
        name = display_name(repository, reference)
        found = self._image_store.find_manifest(queries, repository, reference)
        top = self._image_store.build_tree(queries, found, repository) if found else None
        # What is damaged is not there.
        if top is None or top.manifest is None:
            for text in platforms:
                yield _absent_check(name, text, "not in the store")
            return
        for platform, image in _select_platforms(
            top, parsed, is_explicit=bool(selection.platforms)
        ):
            if image is None:
                known = (
                    ", ".join(str(one.platform) for one in top.platform_manifests())
                    or "no platform"
                )
                yield _absent_check(name, platform, f"the image is for {known} only"[:200])
            else:
                yield _check_node(name, platform, image)


def _select_platforms(
    top: ManifestNode, platforms: Sequence[Platform], *, is_explicit: bool
) -> list[tuple[str, ManifestNode | None]]:
    """Return what clients of the wanted platforms take; of none, everything is wanted.

    A plain manifest is taken as it is, unless somebody asks for another platform than it says.
    """
    images = top.platform_manifests()
    if not platforms:
        return [(str(image.platform or ""), image) for image in images]
    if images == [top] and (not is_explicit or top.platform is None):
        return [(str(top.platform or platform), top) for platform in platforms]
    pairs = [(image.platform, image) for image in images]
    return [(str(platform), choose_platform(pairs, platform)) for platform in platforms]


def _check_node(name: str, platform: str, node: ManifestNode) -> ImageCheck:
    state = node.platform_state()
    incomplete = node.problem or "not all of it is in the store"
    return ImageCheck(
        image=name,
        platform=platform,
        state=state.state,
        digest=state.digest,
        size=state.size,
        missing=state.missing,
        reason="" if state.state == "complete" else incomplete,
    )


def _absent_check(image: str, platform: str, reason: str) -> ImageCheck:
    return ImageCheck(image=image, platform=platform, state="absent", reason=reason)
