"""Fetch manifests and blobs for a preload, through the cache and behind the requests of clients."""

import asyncio
from collections.abc import Callable, Mapping

from proxy.cache.blobs import BlobCache
from proxy.cache.manifests import ManifestCache
from proxy.config import FetchSettings
from proxy.download.download import Download
from proxy.download.manager import DownloadManager
from proxy.errors import InvalidManifestError, NoSpaceError, ProxyError, RateLimitedError
from proxy.images.store import ImageStore
from proxy.lru import CachedManifest
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest
from proxy.oci.reference import Reference, Repository, Tag
from proxy.oci.referrers import RawDescriptor, parse_fallback_index
from proxy.parsing import DocumentParser
from proxy.preload.backoff import UpstreamRetrier
from proxy.preload.events import LayerProgress, LayerState
from proxy.storage.index_writes import MAX_CHILDREN
from proxy.storage.space import Lease
from proxy.upstream.client import FetchedManifest, Upstream

# A download that a client started may fail because of its repository, or its blob may be evicted.
MAX_ATTEMPTS = 3
# Registries do not say when a quota resets; retry after this many seconds (the value regsync uses).
QUOTA_RETRY_AFTER = 900.0


class PreloadFetcher:
    """Fetches manifests, and blobs up to `concurrency` at once, and reports the layers' progress.

    `fetched_bytes` counts the bytes of blobs that came from upstream.
    """

    def __init__(
        self,
        manifests: ManifestCache,
        blobs: BlobCache,
        downloads: DownloadManager,
        image_store: ImageStore,
        parser: DocumentParser,
        upstreams: Mapping[str, Upstream],
        settings: FetchSettings,
        lease: Lease,
        retrier: UpstreamRetrier,
        on_event: Callable[[LayerProgress], None],
        *,
        concurrency: int,
    ) -> None:
        self.fetched_bytes = 0
        self._manifests = manifests
        self._blobs = blobs
        self._downloads = downloads
        self._image_store = image_store
        self._parser = parser
        self._upstreams = upstreams
        self._settings = settings
        self._lease = lease
        self._retrier = retrier
        self._on_event = on_event
        self._semaphore = asyncio.Semaphore(concurrency)
        self._active: dict[Digest, tuple[Download, int]] = {}
        self._reported_offsets: dict[Digest, int] = {}

    # Manifests.

    async def fetch_manifest(self, repository: Repository, reference: Reference) -> CachedManifest:
        """Return the current manifest, stored and leased.

        Raises `RateLimitedError` instead of using the last pulls of a quota, which are reserved for
        clients, and the errors of `ManifestCache.get_current_manifest`.
        """
        await self._check_quota(repository, reference)
        manifest = await self._manifests.get_current_manifest(repository, reference)
        self._lease.digests.add(manifest.digest)
        return manifest

    async def fetch_unjudged_manifest(
        self, repository: Repository, reference: Reference
    ) -> CachedManifest:
        """Return what `fetch_manifest` does, whatever the policies say: it will be allowed later."""
        await self._check_quota(repository, reference)
        manifest = await self._manifests.get_unjudged_manifest(repository, reference)
        self._lease.digests.add(manifest.digest)
        return manifest

    async def _check_quota(self, repository: Repository, reference: Reference) -> None:
        upstream = self._upstreams[repository.upstream]
        if upstream.scarce_quota_reason and not self.stored_digest(repository, reference):
            # A HEAD costs no pull, and its response has the current quota.
            await upstream.resolve(repository.name, reference)
            _raise_if_scarce(upstream)

    def find_ripening(
        self, repository: Repository, reference: Reference
    ) -> tuple[Digest, str] | None:
        """Return what `ManifestCache.find_ripening` does."""
        return self._manifests.find_ripening(repository, reference)

    async def peek_manifest(self, repository: Repository, reference: Reference) -> FetchedManifest:
        """Return a manifest from upstream without storing it. Raises as `fetch_manifest` does."""
        upstream = self._upstreams[repository.upstream]
        _raise_if_scarce(upstream)
        return await upstream.fetch_manifest(repository.name, reference)

    async def store_manifest(
        self, repository: Repository, tag: Tag, fetched: FetchedManifest
    ) -> CachedManifest:
        """Store and lease a manifest that upstream has just sent. Raises `UpstreamError`."""
        manifest = await self._manifests.add_manifest(repository, tag, fetched)
        self._lease.digests.add(manifest.digest)
        return manifest

    async def parse(self, content: bytes, media_type: str) -> Manifest:
        """Parse a manifest. Raises `InvalidManifestError`, also if it is too large to be stored."""
        return await parse_manifest(self._parser, content, media_type)

    async def parse_fallback_index(self, content: bytes) -> list[RawDescriptor]:
        """Return the descriptors in an index of referrers; none if it is not an index."""
        return await self._parser.run_for_preload(len(content), parse_fallback_index, content)

    async def fetch_manifest_when_available(
        self, repository: Repository, reference: Reference
    ) -> CachedManifest:
        """Return what `fetch_manifest` returns, after waiting for a rate limit or an outage."""
        return await self._retrier.retry_while_unavailable(
            repository.upstream, lambda: self.fetch_manifest(repository, reference)
        )

    def stored_digest(self, repository: Repository, reference: Reference) -> Digest | None:
        """Return the digest of the manifest that the store has under this name."""
        index = self._image_store.index
        tag = index.tag(repository, reference) if isinstance(reference, Tag) else None
        digest = tag.digest if tag else reference
        return digest if isinstance(digest, Digest) and index.manifest(digest) else None

    # Blobs.

    async def fetch_blob(
        self, repository: Repository, digest: Digest, size: int, *, is_patient: bool = True
    ) -> int:
        """Store a blob and link the repository to it; return how many bytes came from upstream.

        Waits for a rate limit or an outage if `is_patient`. Raises `UnknownBlobError`, `UpstreamError`,
        `DigestMismatchError`, `NoSpaceError`, and `InvalidManifestError` if it has another size.
        """

        async def fetch_once() -> int:
            # Released while waiting for an upstream, so that blobs of other upstreams are fetched.
            async with self._semaphore:
                return await self._ensure_stored(repository, digest, size)

        try:
            if is_patient:
                retrier, upstream = self._retrier, repository.upstream
                fetched = await retrier.retry_while_unavailable(upstream, fetch_once)
            else:
                fetched = await fetch_once()
        except ProxyError:
            self._report_layer(digest, "failed", self._reported_offsets.get(digest, 0), size)
            raise
        self._report_layer(digest, "complete" if fetched else "exists", size, size)
        return fetched

    def report_progress(self) -> None:
        """Report the offset of each running download that has moved since the last call."""
        for digest, (download, size) in self._active.items():
            offset = download.bytes_present
            if offset and offset != self._reported_offsets.get(digest):
                self._reported_offsets[digest] = offset
                state: LayerState = "verifying" if offset == size else "downloading"
                self._report_layer(digest, state, offset, size, download.bytes_resumed)

    async def _ensure_stored(self, repository: Repository, digest: Digest, size: int) -> int:
        fetched = 0
        for attempt in range(MAX_ATTEMPTS):
            stored_size = self._image_store.index.blob_size(digest)
            if stored_size not in (None, size):
                raise InvalidManifestError(
                    f"{digest} has {stored_size} bytes, not {size} as its descriptor states"
                )
            # Upstream may have to prove that it has the blob here, or to send it once more.
            if await self._blobs.is_servable(repository, digest):
                return fetched
            upstream = self._upstreams[repository.upstream]
            async with self._downloads.attach(
                upstream, repository, digest, self._settings
            ) as download:
                try:
                    fetched = await self._wait_for_download(download, size)
                except ProxyError:
                    if download.repository == repository or attempt == MAX_ATTEMPTS - 1:
                        raise
        raise NoSpaceError(f"{digest} was evicted right after its download; raise store.max_size")

    async def _wait_for_download(self, download: Download, size: int) -> int:
        digest = download.digest
        is_first = digest not in self._active
        self._active[digest] = download, size
        try:
            await download.wait_finished()
        finally:
            self._active.pop(digest, None)
        if download.has_stopped_storing:
            raise NoSpaceError(f"the store has no space for {digest}, or its disk has errors")
        fetched = download.bytes_present - download.bytes_resumed
        # Two images may wait for the same download.
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


def _raise_if_scarce(upstream: Upstream) -> None:
    if upstream.scarce_quota_reason:
        raise RateLimitedError(
            f"{upstream.scarce_quota_reason}, reserved for clients", retry_after=QUOTA_RETRY_AFTER
        )


async def parse_manifest(parser: DocumentParser, content: bytes, media_type: str) -> Manifest:
    """Parse a manifest. Raises `InvalidManifestError`, also if it cannot be stored."""
    manifest = await parser.run_for_preload(len(content), oci.parse_manifest, content, media_type)
    if manifest.child_count > MAX_CHILDREN:
        raise InvalidManifestError(
            f"a manifest names {manifest.child_count} blobs; the cache passes such a manifest "
            f"through, and stores those with up to {MAX_CHILDREN}"
        )
    return manifest
