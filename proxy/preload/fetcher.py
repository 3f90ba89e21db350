"""Blobs brought into the store by the ordinary downloads, behind what clients wait for."""

import asyncio
from collections.abc import Callable, Mapping

from proxy.cache.blobs import BlobCache
from proxy.config import FetchSettings
from proxy.download.download import Download
from proxy.download.manager import DownloadManager
from proxy.errors import InvalidManifestError, NoSpaceError, ProxyError
from proxy.images.tree import ImageStore
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.preload.backoff import UpstreamRetrier
from proxy.preload.events import LayerProgress, LayerState
from proxy.upstream.client import Upstream

# A download that was somebody else's may fail for reasons of theirs, or its blob be evicted: so often.
MAX_ATTEMPTS = 3


class PreloadFetcher:
    """Brings blobs, `at_once` of them, and tells how far they are. `fetched` bytes had to come."""

    def __init__(
        self,
        blobs: BlobCache,
        downloads: DownloadManager,
        upstreams: Mapping[str, Upstream],
        settings: FetchSettings,
        image_store: ImageStore,
        retrier: UpstreamRetrier,
        on_event: Callable[[LayerProgress], None],
        *,
        concurrency: int,
    ) -> None:
        self.fetched_bytes = 0
        self._blobs = blobs
        self._downloads = downloads
        self._upstreams = upstreams
        self._settings = settings
        self._image_store = image_store
        self._retrier = retrier
        self._on_event = on_event
        self._semaphore = asyncio.Semaphore(concurrency)
        self._active: dict[Digest, tuple[Download, int]] = {}
        self._reported_offsets: dict[Digest, int] = {}

    async def fetch_blob(self, repository: Repository, digest: Digest, size: int) -> int:
        """Have the blob in the store and the repository linked to it; return how many bytes came.

        Raises `UnknownBlobError`, `UpstreamError`, `DigestMismatchError`, `NoSpaceError`, and
        `InvalidManifestError` if it is not of the size that is stated.
        """

        async def attempt() -> int:
            # Not held while upstream is waited for: there are others.
            async with self._semaphore:
                return await self._ensure_stored(repository, digest, size)

        try:
            fetched = await self._retrier.retry_while_unavailable(repository.upstream, attempt)
        except ProxyError:
            self._report_layer(digest, "failed", self._reported_offsets.get(digest, 0), size)
            raise
        self._report_layer(digest, "complete" if fetched else "exists", size, size)
        return fetched

    def report_active(self) -> None:
        """Tell how far those are that have moved since the last time."""
        for digest, (download, size) in self._active.items():
            offset = download.bytes_present
            if offset and offset != self._reported_offsets.get(digest):
                self._reported_offsets[digest] = offset
                state: LayerState = "verifying" if offset == size else "downloading"
                self._report_layer(digest, state, offset, size, download.bytes_resumed)

    async def _ensure_stored(self, repository: Repository, digest: Digest, size: int) -> int:
        fetched = 0
        for attempt in range(MAX_ATTEMPTS):
            known = self._image_store.index.blob_size(digest)
            if known not in (None, size):
                raise InvalidManifestError(
                    f"{digest} has {known} bytes, and not {size} as is stated"
                )
            if known is not None and self._image_store.has_blob(digest, size):
                # That its repository holds it, too, is proven if need be.
                async with self._blobs.open_blob(repository, digest):
                    return fetched
            upstream = self._upstreams[repository.upstream]
            async with self._downloads.attach(
                upstream, repository, digest, self._settings
            ) as download:
                try:
                    fetched = await self._await_download(download, size)
                except ProxyError:
                    if download.repository == repository or attempt == MAX_ATTEMPTS - 1:
                        raise
        raise NoSpaceError(f"{digest} was evicted as soon as it was here; raise store.max_size")

    async def _await_download(self, download: Download, size: int) -> int:
        digest = download.digest
        is_first = digest not in self._active
        self._active[digest] = download, size
        try:
            await download.wait_finished()
        finally:
            self._active.pop(digest, None)
        if download.has_stopped_storing:
            raise NoSpaceError(f"the store has no room for {digest}, or its disk fails")
        fetched = download.bytes_present - download.bytes_resumed
        self.fetched_bytes += fetched if is_first else 0
        return fetched

    def _report_layer(
        self, digest: Digest, state: LayerState, offset: int, size: int, resumed: int = 0
    ) -> None:
        self._on_event(
            LayerProgress(
                digest=str(digest), state=state, offset=offset, size=size, resumed=resumed
            )
        )
