"""List, remove, pin and unpin the images of the store.

Listing, removing and unpinning work for upstreams that are no longer configured; pinning does not.
"""

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import closing, suppress
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from typing import Self

import msgspec

from proxy.concurrency import run_in_thread
from proxy.errors import DeniedError, StorageError, UnknownManifestError
from proxy.images.store import ImageStore
from proxy.images.table import ImageTableKeeper
from proxy.images.tree import ImageState, PlatformState, build_tree
from proxy.images.trust import PolicySummary, TrustSummary, describe_policy, describe_trust
from proxy.names import display_name
from proxy.oci.reference import Reference, Repository, parse_image
from proxy.policy.rules import RuleSet
from proxy.storage.image_queries import ImageQueries, ImageRow, open_image_queries
from proxy.storage.image_table import ImageFilter, ImageOrder, TableRow
from proxy.timestamps import to_seconds

# After this many images, the sizes of all are computed at once: 12 s for 80,000 images, where one by one
# takes 50 s.
_BULK_SIZES_THRESHOLD = 1000
# Images read in one call of a thread, so that the first ones are sent early.
_BATCH_SIZE = 10


class ImageSummary(msgspec.Struct, frozen=True):
    """An image in the store.

    `digest` is None for a pinned tag that was never pulled. Sizes are stored bytes, `unique` those
    that removing the image would free; times are Unix time. `used` counts for eviction, and preloads and
    exports are uses too; `pulled` is when a client last pulled it, None if never, and `pulls` how often in
    the last month.
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
    cached: int | None
    used: int | None
    pulled: int | None
    pulls: int
    trust: TrustSummary
    policy: PolicySummary | None


class ImageBrief(msgspec.Struct, frozen=True):
    """What a list shows of an image; the fields are those of `ImageSummary`, `platforms` those stored."""

    name: str
    digest: str | None
    state: ImageState
    pinned: bool
    platforms: Sequence[str]
    size: int
    unique: int
    cached: int | None
    pulled: int | None
    pulls: int
    trust: TrustSummary
    policy: PolicySummary | None

    @classmethod
    def of(cls, image: ImageSummary) -> Self:
        """Return the same of a summary."""
        values = {name: getattr(image, name) for name in cls.__struct_fields__}
        here = [one.platform for one in image.platforms if one.state != "absent"]
        return cls(**{**values, "platforms": here})


class RemovedImages(msgspec.Struct, frozen=True):
    """The names of removed images, and the numbers of blobs and bytes that were freed."""

    images: Sequence[str]
    blobs: int
    bytes: int


class PinnedImages(msgspec.Struct, frozen=True):
    """The names of pinned images; those that are `absent` are pinned once they are pulled."""

    images: Sequence[str]
    absent: Sequence[str]


class ImageManager:
    """Lists, removes and pins the images of one store."""

    def __init__(
        self,
        image_store: ImageStore,
        rules: RuleSet,
        clock: Callable[[], float],
        tables: ImageTableKeeper,
    ) -> None:
        self._image_store = image_store
        self._rules = rules
        self._clock = clock
        self._tables = tables

    async def list_selected(
        self, wanted: ImageFilter, order: ImageOrder, *, after: str = "", limit: int = 0
    ) -> AsyncGenerator[ImageSummary, None]:
        """Yield the images that a filter selects, in an order: at most `limit` that follow `after`.

        In a large store, the order and the filter are those of some minutes ago. Raises `BusyError`
        until they are known, `InvalidRequestError` if `after` is not there, and `StorageError`.
        """
        rows = await self._tables.rows(self._image_store, wanted, order, after, limit or -1)
        for start in range(0, len(rows), _BATCH_SIZE):
            batch = rows[start : start + _BATCH_SIZE]
            for image in await self._image_store.query(partial(self._summarize_found, batch)):
                yield image

    async def list_rows(
        self, wanted: ImageFilter, order: ImageOrder, *, after: str = "", limit: int
    ) -> list[ImageBrief]:
        """Return what a list shows of images: at most `limit` that follow `after`.

        As `list_selected`, but sizes and states are those of the table too, so that it is quick however
        many blobs an image has.
        """
        store = self._image_store
        table, rows = await self._tables.find(store, wanted, order, after, limit)

        def describe() -> list[ImageBrief]:
            with table.queries() as queries:
                return [self._describe_row(queries, row) for row in rows]

        return await run_in_thread(store.index.list_threads, describe)

    def _describe_row(self, queries: ImageQueries, row: TableRow) -> ImageBrief:
        repository, reference, digest = row.repository, row.reference, row.digest
        cached = self._image_store.blob_store.committed_at(digest) if digest else None
        return ImageBrief(
            name=display_name(repository, reference),
            digest=str(digest) if digest else None,
            state=row.state,
            pinned=row.pinned,
            platforms=row.platforms,
            size=row.size,
            unique=row.unique,
            cached=to_seconds(cached),
            pulled=to_seconds(row.pulled),
            pulls=row.pulls,
            trust=describe_trust(queries, repository),
            policy=describe_policy(
                queries, self._rules, repository, reference, digest, self._clock()
            )
            if digest
            else None,
        )

    async def platforms(self) -> Sequence[str]:
        """Return the platforms that stored images are for, as far as they are known."""
        return await self._tables.platforms(self._image_store)

    async def list_images(
        self, pattern: str = "", *, after: str = "", limit: int = 0
    ) -> AsyncGenerator[ImageSummary, None]:
        """Yield the images whose name contains `pattern` or matches it as a glob, in order.

        These are at most `limit` (0: all) that follow the image named `after`. Raises
        `InvalidReferenceError` and `StorageError`.
        """
        start = self._image_store.names.to_repository(parse_image(after)) if after else None
        with suppress(StorageError):  # then the times of use are older
            await self._image_store.index.flush()
        with closing(self._iterate_summaries(pattern, start, limit)) as summaries:
            executor = self._image_store.index.list_threads
            while batch := await run_in_thread(
                executor, lambda: list(islice(summaries, _BATCH_SIZE))
            ):
                for image in batch:
                    yield image

    async def remove(
        self, images: Sequence[str], *, dry_run: bool = False, force: bool = False
    ) -> RemovedImages:
        """Remove images and the blobs that no other image uses; a digest stands for all its names.

        A glob stands for all images whose names match it. Removes all of them or none. Raises `UnknownManifestError` if one is not stored,
        `DeniedError` if one is pinned and `force` is not set, `BusyError` if one is being preloaded
        or exported, `InvalidReferenceError` and `StorageError`.
        """
        rows = await self._image_store.query(lambda queries: self._find_rows(queries, images))
        pinned = [display_name(row.repository, row.reference) for row in rows if row.is_pinned]
        if pinned and not force:
            raise DeniedError(f"{pinned[0][:100]} is pinned; unpin it first, or use --force")
        targets = [(row.repository, row.reference) for row in rows]
        if dry_run:
            blobs = await self._image_store.query(
                lambda queries: queries.plan_removal(targets).blobs
            )
        else:
            blobs = await self._image_store.space.remove_images(targets)
        names = [display_name(*target) for target in targets]
        return RemovedImages(names, len(blobs), sum(size for _, size in blobs))

    async def find(self, text: str) -> list[tuple[Repository, Reference]]:
        """Return the stored images with a name, or with names that match a glob.

        Raises `UnknownManifestError` if there is none, `InvalidReferenceError` and `StorageError`.
        """
        rows = await self._image_store.query(lambda queries: self._find_rows(queries, [text]))
        return [(row.repository, row.reference) for row in rows]

    async def pin(self, images: Sequence[str]) -> PinnedImages:
        """Protect images from eviction, stored or not.

        Raises `InvalidReferenceError`, `DeniedError` and `StorageError`.
        """
        pins = [self._image_store.names.parse_allowed(text) for text in images]
        await self._image_store.index.pin(pins)
        absent = await self._image_store.query(
            lambda queries: [
                display_name(*pin)
                for pin in pins
                if not any(row.digest for row in queries.find_images(*pin))
            ]
        )
        return PinnedImages([display_name(*pin) for pin in pins], absent)

    async def unpin(self, images: Sequence[str]) -> list[str]:
        """Remove the pins of images; return the names of those that had one.

        Raises `InvalidReferenceError` and `StorageError`.
        """
        pins = [self._image_store.names.to_repository(parse_image(text)) for text in images]
        return [display_name(*pin) for pin in await self._image_store.index.unpin(pins)]

    # The methods below run in a thread.

    def _iterate_summaries(
        self, pattern: str, after: tuple[Repository, Reference] | None, limit: int
    ) -> Generator[ImageSummary, None, None]:
        with open_image_queries(self._image_store.index.path) as queries:
            rows = (row for row in queries.images(pattern, after) if name_matches(row, pattern))
            for number, row in enumerate(islice(rows, limit or None)):
                if number == _BULK_SIZES_THRESHOLD:
                    queries.compute_sizes()
                yield self._summarize(queries, row, *queries.image_sizes(row))

    def _summarize_found(
        self, batch: Sequence[TableRow], queries: ImageQueries
    ) -> list[ImageSummary]:
        """Return the images of rows as they are now, without those that are gone."""
        found = []
        for repository, reference, *_ in batch:
            rows = [
                row
                for row in queries.find_images(repository, reference)
                if row.reference == reference
            ]
            if not rows and queries.pinned_absent(repository, reference):
                rows = [ImageRow(repository, reference, None, is_pinned=True)]
            found += [self._summarize(queries, row, *queries.image_sizes(row)) for row in rows[:1]]
        return found

    def _summarize(
        self, queries: ImageQueries, row: ImageRow, size: int, unique: int
    ) -> ImageSummary:
        repository, digest = row.repository, row.digest
        top = queries.blob(repository, digest) if digest else None
        platforms: list[PlatformState] = []
        if top:
            tree = build_tree(self._image_store, queries, top, repository, check_files=False)
            platforms = [node.platform_state() for node in tree.platform_manifests()]
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
            cached=to_seconds(self._image_store.blob_store.committed_at(digest))
            if digest and top
            else None,
            used=to_seconds(top.used_at) if top else None,
            pulled=to_seconds(queries.pulled_at(repository, row.reference, digest)),
            pulls=queries.pull_count(repository, row.reference),
            trust=describe_trust(queries, repository),
            policy=describe_policy(
                queries, self._rules, repository, row.reference, digest, self._clock()
            )
            if digest
            else None,
        )

    def _find_rows(self, queries: ImageQueries, images: Sequence[str]) -> list[ImageRow]:
        """Return the rows of images, without duplicates. Raises `UnknownManifestError`."""
        found: dict[ImageRow, None] = {}
        for text in images:
            rows = (
                [row for row in queries.images(text) if row.digest and name_matches(row, text)]
                if is_glob(text)
                else queries.find_images(*self._image_store.names.to_repository(parse_image(text)))
            )
            if not rows:
                raise UnknownManifestError(
                    f"{text[:100]} is not in the store; pullcache images lists stored images"
                )
            found |= dict.fromkeys(rows)
        return list(found)


def _combine_states(platforms: Sequence[PlatformState]) -> ImageState:
    """Return the state of a whole image.

    A client pulls one platform, so absent platforms do not make an image partial.
    """
    states = {platform.state for platform in platforms}
    return "complete" if "complete" in states and "partial" not in states else "partial"


def is_glob(text: str) -> bool:
    """Tell whether a name of an image has wildcards."""
    return bool(set(text) & set("*?["))


def name_matches(row: ImageRow, pattern: str) -> bool:
    """Tell whether the name of an image has `pattern` as a part, or matches it as a glob."""
    if not pattern:
        return True
    glob = pattern if is_glob(pattern) else f"*{pattern}*"
    names = (display_name(row.repository), display_name(row.repository, row.reference))
    return any(fnmatchcase(name, glob) for name in names)
