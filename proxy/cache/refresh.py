"""Ask upstream now what tags mean, whatever their age."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Literal

import msgspec

from proxy.cache.manifests import ManifestCache
from proxy.concurrency import background
from proxy.errors import NotFoundError, ProxyError
from proxy.names import display_name
from proxy.oci.reference import Repository, Tag
from proxy.storage.index import Index
from proxy.traffic import purpose

# Tags that are asked about at a time.
MAX_REFRESHES = 8

RefreshOutcome = Literal["unchanged", "moved", "new", "gone", "not_found", "failed"]


class RefreshedTag(msgspec.Struct, frozen=True):
    """What upstream says of a tag: `previous` is the digest that the cache had, `digest` the one now.

    A tag that is `gone` was removed from the cache, one that was `not_found` never was there; one that
    `failed` is as before, for `reason`.
    """

    image: str
    outcome: RefreshOutcome
    previous: str
    digest: str
    reason: str = ""


class TagRefresher:
    """Refreshes tags, some at a time."""

    def __init__(self, manifests: ManifestCache, index: Index) -> None:
        self._manifests = manifests
        self._index = index

    async def refresh(
        self, tags: Sequence[tuple[Repository, Tag]]
    ) -> AsyncGenerator[RefreshedTag, None]:
        """Yield the outcome of each tag, as it becomes known."""
        waiting = iter(tags)
        results: asyncio.Queue[RefreshedTag] = asyncio.Queue()

        async def work() -> None:
            for repository, tag in waiting:
                results.put_nowait(await self._refresh(repository, tag))

        async def work_together() -> None:
            purpose.set("preload")
            async with asyncio.TaskGroup() as group:
                for _ in range(MAX_REFRESHES):
                    group.create_task(work())

        async with background(work_together()):
            for _ in tags:
                yield await results.get()

    async def _refresh(self, repository: Repository, tag: Tag) -> RefreshedTag:
        row = self._index.tag(repository, tag)
        previous = str(row.digest) if row else ""
        image = display_name(repository, tag)
        try:
            manifest = await self._manifests.get_current_manifest(repository, tag, is_forced=True)
        except NotFoundError as error:
            return RefreshedTag(image, "gone" if row else "not_found", previous, "", str(error))
        except ProxyError as error:
            return RefreshedTag(image, "failed", previous, previous, str(error))
        digest = str(manifest.digest)
        outcome: RefreshOutcome = "unchanged" if digest == previous else "moved"
        return RefreshedTag(image, outcome if previous else "new", previous, digest)
