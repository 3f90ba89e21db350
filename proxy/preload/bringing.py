"""Blobs brought into the store by the ordinary downloads, behind what clients wait for."""

import asyncio
from collections.abc import Callable

from proxy.cache.pull_through import PullThrough
from proxy.download.download import Download
from proxy.download.manager import Downloads
from proxy.errors import InvalidManifestError, NoSpaceError, ProxyError
from proxy.images.tree import Contents
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.preload.backoff import Waits
from proxy.preload.events import LayerProgress, LayerState

# A download that was somebody else's may fail for reasons of theirs, or its blob be evicted: so often.
ATTEMPTS = 3


class Bringer:
    """Brings blobs, `at_once` of them, and tells how far they are. `fetched` bytes had to come."""

    def __init__(
        self,
        cache: PullThrough,
        downloads: Downloads,
        contents: Contents,
        waits: Waits,
        tell: Callable[[LayerProgress], None],
        *,
        at_once: int,
    ) -> None:
        self.fetched = 0
        self._cache = cache
        self._downloads = downloads
        self._contents = contents
        self._waits = waits
        self._tell = tell
        self._slots = asyncio.Semaphore(at_once)
        self._active: dict[Digest, tuple[Download, int]] = {}
        self._offsets: dict[Digest, int] = {}

    async def bring(self, repository: Repository, digest: Digest, size: int) -> int:
        """Have the blob in the store and the repository linked to it; return how many bytes came.

        Raises `UnknownBlobError`, `UpstreamError`, `DigestMismatchError`, `NoSpaceError`, and
        `InvalidManifestError` if it is not of the size that is stated.
        """

        async def attempt() -> int:
            # Not held while upstream is waited for: there are others.
            async with self._slots:
                return await self._fetch(repository, digest, size)

        try:
            fetched = await self._waits.patiently(repository.upstream, attempt)
        except ProxyError:
            self._say(digest, "failed", self._offsets.get(digest, 0), size)
            raise
        self._say(digest, "complete" if fetched else "exists", size, size)
        return fetched

    def show(self) -> None:
        """Tell how far those are that have moved since the last time."""
        for digest, (download, size) in self._active.items():
            offset = download.received
            if offset and offset != self._offsets.get(digest):
                self._offsets[digest] = offset
                state: LayerState = "verifying" if offset == size else "downloading"
                self._say(digest, state, offset, size, download.resumed)

    async def _fetch(self, repository: Repository, digest: Digest, size: int) -> int:
        fetched = 0
        for attempt in range(ATTEMPTS):
            known = self._contents.index.size(digest)
            if known not in (None, size):
                raise InvalidManifestError(
                    f"{digest} has {known} bytes, and not {size} as is stated"
                )
            if known is not None and self._contents.has(digest, size):
                # That its repository holds it, too, is proven if need be.
                async with self._cache.blob(repository, digest):
                    return fetched
            async with self._downloads.followed(repository, digest) as download:
                try:
                    fetched = await self._follow(download, size)
                except ProxyError:
                    if download.repository == repository or attempt == ATTEMPTS - 1:
                        raise
        raise NoSpaceError(f"{digest} was evicted as soon as it was here; raise store.max_size")

    async def _follow(self, download: Download, size: int) -> int:
        digest = download.digest
        is_first = digest not in self._active
        self._active[digest] = download, size
        try:
            await download.finished()
        finally:
            self._active.pop(digest, None)
        if download.is_detached:
            raise NoSpaceError(f"the store has no room for {digest}, or its disk fails")
        fetched = download.received - download.resumed
        self.fetched += fetched if is_first else 0
        return fetched

    def _say(
        self, digest: Digest, state: LayerState, offset: int, size: int, resumed: int = 0
    ) -> None:
        self._tell(
            LayerProgress(
                digest=str(digest), state=state, offset=offset, size=size, resumed=resumed
            )
        )
