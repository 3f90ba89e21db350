"""The images of the store, for those who keep it: which there are, what they hold, what may go.

An image is written as people write it. What is asked about need not be configured any more; what is pinned, or
checked for being pulled, must be.
"""

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from itertools import islice

import msgspec

from proxy.concurrency import run_in_thread
from proxy.errors import DeniedError, UnknownManifestError
from proxy.images.tree import ImageState, ImageStore, PlatformState
from proxy.names import display_name
from proxy.oci.reference import parse_image
from proxy.storage.image_queries import ImageQueries, ImageRow, open_image_queries

# So many are weighed one by one; for more, all of the store together is quicker.
_BULK_SIZES_THRESHOLD = 50
_BATCH_SIZE = 50


class ImageSummary(msgspec.Struct, frozen=True):
    """An image of the store. Sizes are bytes as stored, `unique` those that `rm` would free; times are Unix time.

    `name` is repository and reference as people write them, and `digest` is None for a pinned tag that never came.
    """

    name: str
    repository: str
    reference: str
    digest: str | None
    state: ImageState
    pinned: bool
    platforms: Sequence[PlatformState]
    size: int
    unique: int
    cached: float | None
    used: float | None


class RemovedImages(msgspec.Struct, frozen=True):
    """What was removed, or would be: names, and the blobs that no other image holds."""

    images: Sequence[str]
    blobs: int
    bytes: int


class ImageManager:
    """Lists, removes and pins the images of one store."""

    def __init__(self, image_store: ImageStore) -> None:
        self._image_store = image_store

    async def list_images(self, pattern: str = "") -> AsyncGenerator[ImageSummary, None]:
        """Yield the images whose name holds `pattern`, or matches it as a glob, in order.

        Raises `StorageError`.
        """
        await self._image_store.index.flush()
        with closing(self._iterate_summaries(pattern)) as found:
            threads = self._image_store.executor
            while batch := await run_in_thread(threads, lambda: list(islice(found, _BATCH_SIZE))):
                for image in batch:
                    yield image

    async def remove(
        self, images: Sequence[str], *, dry_run: bool = False, force: bool = False
    ) -> RemovedImages:
        """Remove images, and the blobs that no other image holds; a digest is every name that it has.

        All or none: raises `UnknownManifestError` if one is not there, `DeniedError` if one is pinned and not
        `force`, `BusyError` if one is being preloaded or exported, `InvalidReferenceError`, `StorageError`.
        """
        roots = await self._image_store.query(lambda catalogue: self._find_rows(catalogue, images))
        pinned = [display_name(root.repository, root.reference) for root in roots if root.is_pinned]
        if pinned and not force:
            raise DeniedError(f"{pinned[0][:100]} is pinned; unpin it first, or use --force")
        gone = [(root.repository, root.reference) for root in roots]
        if dry_run:
            blobs = await self._image_store.query(
                lambda catalogue: catalogue.plan_removal(gone).blobs
            )
        else:
            blobs = await self._image_store.space.remove_images(gone)
        names = [display_name(*image) for image in gone]
        return RemovedImages(names, len(blobs), sum(size for _, size in blobs))

    async def pin(self, images: Sequence[str]) -> list[str]:
        """Keep images from being evicted, also those that come later; return their names.

        Raises `InvalidReferenceError`, `DeniedError` and `StorageError`.
        """
        pins = [self._image_store.names.parse_allowed(text) for text in images]
        await self._image_store.index.pin(pins)
        return [display_name(*pin) for pin in pins]

    async def unpin(self, images: Sequence[str]) -> list[str]:
        """Let images be evicted again, and return the names of those that were pinned.

        Raises `InvalidReferenceError` and `StorageError`.
        """
        pins = [self._image_store.names.to_repository(parse_image(text)) for text in images]
        return [display_name(*pin) for pin in await self._image_store.index.unpin(pins)]

    # In a thread.

    def _iterate_summaries(self, pattern: str) -> Generator[ImageSummary, None, None]:
        with open_image_queries(self._image_store.index.path) as catalogue:
            # Read at once: a query that stays open would keep the index's log from being cut.
            roots = [root for root in catalogue.images() if _matches(root, pattern)]
            weights = catalogue.sizes_by_digest() if len(roots) > _BULK_SIZES_THRESHOLD else {}
            for root in roots:
                key = str(root.digest)
                weight = weights[key] if key in weights else catalogue.image_sizes(root)
                yield self._summarize(catalogue, root, *weight)

    def _summarize(
        self, queries: ImageQueries, row: ImageRow, size: int, unique: int
    ) -> ImageSummary:
        repository, digest = row.repository, row.digest
        top = queries.blob(repository, digest) if digest else None
        platforms: list[PlatformState] = []
        if top:
            node = self._image_store.build_tree(queries, top, repository, check_files=False)
            platforms = [image.platform_state() for image in node.platform_manifests()]
        return ImageSummary(
            name=display_name(repository, row.reference),
            repository=display_name(repository),
            reference=str(row.reference),
            digest=str(digest) if digest else None,
            state=_combine_states(platforms) if top else "absent",
            pinned=row.is_pinned,
            platforms=platforms,
            size=size,
            unique=unique,
            cached=self._image_store.blob_store.committed_at(digest) if digest and top else None,
            used=top.used_at if top else None,
        )

    def _find_rows(self, queries: ImageQueries, images: Sequence[str]) -> list[ImageRow]:
        """Return the images that are meant, each once."""
        found: dict[ImageRow, None] = {}
        for text in images:
            roots = queries.find_images(*self._image_store.names.to_repository(parse_image(text)))
            if not roots:
                raise UnknownManifestError(
                    f"{text[:100]} is not in the store; pullcache images lists what is"
                )
            found |= dict.fromkeys(roots)
        return list(found)


def _combine_states(platforms: Sequence[PlatformState]) -> ImageState:
    """Return the state of a whole image: clients pull one platform, and others need not be here."""
    states = {platform.state for platform in platforms}
    return "complete" if "complete" in states and "partial" not in states else "partial"


def _matches(row: ImageRow, pattern: str) -> bool:
    if not pattern:
        return True
    glob = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    names = (display_name(row.repository), display_name(row.repository, row.reference))
    return any(fnmatchcase(name, glob) for name in names)
