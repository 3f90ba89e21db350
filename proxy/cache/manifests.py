"""The manifests of the store: verified when they are read, the hot ones kept in memory."""

from concurrent.futures import Executor

from proxy.concurrency import run_in_thread
from proxy.errors import InvalidManifestError, NoSpaceError, StorageError, UpstreamError
from proxy.log import get_logger
from proxy.lru import CachedManifest, ManifestLRUCache
from proxy.metrics import Metrics
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.storage.blobs import BlobStore
from proxy.storage.commit import Committer
from proxy.storage.index import Index
from proxy.storage.space import SpaceManager
from proxy.tracing import span
from proxy.upstream.client import FetchedManifest

MANIFEST_CACHE_SIZE = 32 << 20
# Longer ones are read in a thread: 4 MiB that were made for it take a second.
INLINE_PARSE_LIMIT = 64 << 10

log = get_logger(__name__)


class ManifestStore:
    """Keeps manifests and gives them back."""

    def __init__(
        self,
        store: BlobStore,
        index: Index,
        space: SpaceManager,
        metrics: Metrics,
        executor: Executor,
    ) -> None:
        self._store = store
        self._index = index
        self._space = space
        self._metrics = metrics
        self._executor = executor
        self._committer = Committer(store, index, space, executor)
        self._lru = ManifestLRUCache(MANIFEST_CACHE_SIZE)

    def lookup_cached(self, digest: Digest) -> CachedManifest | None:
        """Return a manifest of the store that is in memory too."""
        held = self._lru.get(digest)
        if held is not None:
            self._index.touch(digest)
        return held

    async def load(self, digest: Digest) -> CachedManifest | None:
        """Return a manifest of the store, verified; None if it is gone, damaged, or cannot be read."""
        held = self._lru.get(digest)
        if held is None:
            row = self._index.manifest(digest)
            if row is None:
                return None
            try:
                content = await self._store.read(digest)
            except StorageError as error:
                # It may be right, so it stays; what is fetched anew takes its place.
                log.warning("blob_unreadable", digest=str(digest), reason=str(error))
                return None
            if content is None:
                await self._space.remove_corrupt(digest)
                return None
            held = CachedManifest(digest, row.media_type or "", content)
            self._lru.add(held)
        self._index.touch(digest)
        return held

    async def add(self, repository: Repository, fetched: FetchedManifest) -> CachedManifest:
        """Look at what upstream sent and commit it; where that fails it is served all the same.

        Raises `UpstreamError` if it is no manifest.
        """
        try:
            manifest = await self.parse(fetched.content, fetched.content_type)
        except InvalidManifestError as error:
            raise UpstreamError(
                f"{repository.upstream} did not send a manifest: {error}"
            ) from error
        held = CachedManifest(fetched.digest, manifest.media_type, fetched.content)
        self._lru.add(held)
        with span("commit"):
            await self._commit(repository, fetched, manifest)
        return held

    async def parse(self, content: bytes, content_type: str) -> oci.Manifest:
        """Return what the manifest names, or raise `InvalidManifestError`; hold up nobody meanwhile."""
        if len(content) <= INLINE_PARSE_LIMIT:
            return oci.parse_manifest(content, content_type)
        return await run_in_thread(self._executor, oci.parse_manifest, content, content_type)

    async def _commit(
        self, repository: Repository, fetched: FetchedManifest, manifest: oci.Manifest
    ) -> None:
        size = len(fetched.content)
        reservation = await self._space.reserve(size)
        if reservation is None:
            self._metrics.count_uncached(self._space.uncached_reason(size))
            return
        try:
            await self._committer.commit_manifest(
                repository, fetched.digest, fetched.content, manifest, reservation
            )
        except StorageError as error:
            self._metrics.count_uncached(
                "no_space" if isinstance(error, NoSpaceError) else "disk_error"
            )
            log.warning("commit_failed", digest=str(fetched.digest), reason=str(error))
        finally:
            self._space.release(reservation)
