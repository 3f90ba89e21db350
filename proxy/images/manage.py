"""The images of the store, for those who keep it: which there are, what they hold, what may go.

An image is written as people write it. What is asked about need not be configured any more; what is pinned, or
checked for being pulled, must be.
"""

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from itertools import islice

import msgspec

from proxy.concurrency import in_thread
from proxy.errors import DeniedError, UnknownManifestError
from proxy.images.tree import Contents, PlatformState, State
from proxy.names import spell
from proxy.oci.reference import parse_image
from proxy.storage.image_queries import Catalogue, Root, open_catalogue

# So many are weighed one by one; for more, all of the store together is quicker.
_FEW = 50
_BATCH = 50


class Image(msgspec.Struct, frozen=True):
    """An image of the store. Sizes are bytes as stored, `unique` those that `rm` would free; times are Unix time.

    `name` is repository and reference as people write them, and `digest` is None for a pinned tag that never came.
    """

    name: str
    repository: str
    reference: str
    digest: str | None
    state: State
    pinned: bool
    platforms: Sequence[PlatformState]
    size: int
    unique: int
    cached: float | None
    used: float | None


class Removed(msgspec.Struct, frozen=True):
    """What was removed, or would be: names, and the blobs that no other image holds."""

    images: Sequence[str]
    blobs: int
    bytes: int


class Images:
    """Lists, removes and pins the images of one store."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents

    async def find(self, pattern: str = "") -> AsyncGenerator[Image, None]:
        """Yield the images whose name holds `pattern`, or matches it as a glob, in order.

        Raises `StorageError`.
        """
        await self._contents.index.flush()
        with closing(self._look_up(pattern)) as found:
            threads = self._contents.threads
            while batch := await in_thread(threads, lambda: list(islice(found, _BATCH))):
                for image in batch:
                    yield image

    async def remove(
        self, images: Sequence[str], *, dry_run: bool = False, force: bool = False
    ) -> Removed:
        """Remove images, and the blobs that no other image holds; a digest is every name that it has.

        All or none: raises `UnknownManifestError` if one is not there, `DeniedError` if one is pinned and not
        `force`, `BusyError` if one is being preloaded or exported, `InvalidReferenceError`, `StorageError`.
        """
        roots = await self._contents.read(lambda catalogue: self._named(catalogue, images))
        pinned = [spell(root.repository, root.reference) for root in roots if root.is_pinned]
        if pinned and not force:
            raise DeniedError(f"{pinned[0][:100]} is pinned; unpin it first, or use --force")
        gone = [(root.repository, root.reference) for root in roots]
        if dry_run:
            blobs = await self._contents.read(lambda catalogue: catalogue.removal(gone).blobs)
        else:
            blobs = await self._contents.space.remove_images(gone)
        names = [spell(*image) for image in gone]
        return Removed(names, len(blobs), sum(size for _, size in blobs))

    async def pin(self, images: Sequence[str]) -> list[str]:
        """Keep images from being evicted, also those that come later; return their names.

        Raises `InvalidReferenceError`, `DeniedError` and `StorageError`.
        """
        pins = [self._contents.names.parse(text) for text in images]
        await self._contents.index.pin(pins)
        return [spell(*pin) for pin in pins]

    async def unpin(self, images: Sequence[str]) -> list[str]:
        """Let images be evicted again, and return the names of those that were pinned.

        Raises `InvalidReferenceError` and `StorageError`.
        """
        pins = [self._contents.names.locate(parse_image(text)) for text in images]
        return [spell(*pin) for pin in await self._contents.index.unpin(pins)]

    # In a thread.

    def _look_up(self, pattern: str) -> Generator[Image, None, None]:
        with open_catalogue(self._contents.index.path) as catalogue:
            # Read at once: a query that stays open would keep the index's log from being cut.
            roots = [root for root in catalogue.roots() if _matches(root, pattern)]
            weights = catalogue.sizes() if len(roots) > _FEW else {}
            for root in roots:
                key = str(root.digest)
                weight = weights[key] if key in weights else catalogue.weigh(root)
                yield self._describe(catalogue, root, *weight)

    def _describe(self, catalogue: Catalogue, root: Root, size: int, unique: int) -> Image:
        repository, digest = root.repository, root.digest
        top = catalogue.blob(repository, digest) if digest else None
        platforms: list[PlatformState] = []
        if top:
            node = self._contents.closure(catalogue, top, repository, thoroughly=False)
            platforms = [image.state() for image in node.images()]
        return Image(
            name=spell(repository, root.reference),
            repository=spell(repository),
            reference=str(root.reference),
            digest=str(digest) if digest else None,
            state=_overall(platforms) if top else "absent",
            pinned=root.is_pinned,
            platforms=platforms,
            size=size,
            unique=unique,
            cached=self._contents.store.committed_at(digest) if digest and top else None,
            used=top.used if top else None,
        )

    def _named(self, catalogue: Catalogue, images: Sequence[str]) -> list[Root]:
        """Return the images that are meant, each once."""
        found: dict[Root, None] = {}
        for text in images:
            roots = catalogue.find(*self._contents.names.locate(parse_image(text)))
            if not roots:
                raise UnknownManifestError(
                    f"{text[:100]} is not in the store; pullcache images lists what is"
                )
            found |= dict.fromkeys(roots)
        return list(found)


def _overall(platforms: Sequence[PlatformState]) -> State:
    """Return the state of a whole image: clients pull one platform, and others need not be here."""
    states = {platform.state for platform in platforms}
    return "complete" if "complete" in states and "partial" not in states else "partial"


def _matches(root: Root, pattern: str) -> bool:
    if not pattern:
        return True
    glob = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    names = (spell(root.repository), spell(root.repository, root.reference))
    return any(fnmatchcase(name, glob) for name in names)
