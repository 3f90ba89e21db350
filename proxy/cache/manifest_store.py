"""Manifests in the store: verified when they are read, the recently used ones kept in memory."""

from concurrent.futures import Executor

from proxy.errors import InvalidManifestError, NoSpaceError, StorageError, UpstreamError
from proxy.log import get_logger
from proxy.lru import CachedManifest, ManifestLRUCache
from proxy.metrics import Metrics
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.parsing import DocumentParser
from proxy.storage.blobs import BlobStore
from proxy.storage.commit import Committer
from proxy.storage.index import Index
from proxy.storage.index_writes import MAX_CHILDREN
from proxy.storage.space import SpaceManager
from proxy.tracing import span
from proxy.upstream.client import FetchedManifest

# Bytes of manifests kept in memory.
MANIFEST_CACHE_SIZE = 32 << 20

log = get_logger(__name__)


class ManifestStore:
    """Stores the manifests that upstream sends, and loads stored ones."""

    def __init__(
        self,
        store: BlobStore,
        index: Index,
        space: SpaceManager,
        metrics: Metrics,
        executor: Executor,
        parser: DocumentParser,
    ) -> None:
        self._store = store
        self._index = index
        self._space = space
        self._metrics = metrics
        self._parser = parser
        self._committer = Committer(store, index, space, executor)
        self._lru = ManifestLRUCache(MANIFEST_CACHE_SIZE)

    def lookup_cached(self, digest: Digest, media_type: str | None) -> CachedManifest | None:
        """Return a manifest that is in memory, and count the use.

        `media_type` is its type in the repository; None if the index does not know it.
        """
        manifest = self._lru.get(digest)
        if manifest is None:
            return None
        self._index.touch(digest)
        return _with_type(manifest, media_type)

    async def load(self, digest: Digest, media_type: str | None) -> CachedManifest | None:
        """Return a stored manifest, verified, and count the use.

        None if it is missing, damaged or unreadable; the caller then fetches it from upstream.
        """
        manifest = self._lru.get(digest)
        if manifest is None:
            row = self._index.manifest(digest)
            if row is None:
                return None
            try:
                content = await self._store.read(digest)
            except StorageError as error:
                # The file may be intact, so it is not removed; a fetched copy will replace it.
                log.warning("blob_unreadable", digest=str(digest), reason=str(error))
                return None
            if content is None:
                await self._space.remove_corrupt(digest)
                return None
            manifest = CachedManifest(digest, row.media_type or "", content)
            self._lru.add(manifest)
        self._index.touch(digest)
        return _with_type(manifest, media_type)

    async def add(
        self, repository: Repository, fetched: FetchedManifest
    ) -> tuple[CachedManifest, bool]:
        """Commit a manifest that upstream has sent, linked to the repository.

        Return it, and whether it is stored. Content verified by its digest may be anything except
        ambiguous, because the client interprets it. Raises `UpstreamError` for other content that
        is not a manifest, such as a login page.
        """
        problem = f"{repository.upstream} did not send a manifest"
        try:
            manifest = await self.parse(repository, fetched.content, fetched.content_type)
        except InvalidManifestError as error:
            raise UpstreamError(f"{problem}: {error}") from error
        if manifest.doubt and not fetched.is_verified:
            raise UpstreamError(f"{problem}: {manifest.doubt}")
        if manifest.unread:
            log.info("manifest_partly_read", digest=str(fetched.digest), reason=manifest.unread)
        cached = CachedManifest(fetched.digest, manifest.media_type, fetched.content)
        self._lru.add(cached)
        with span("commit"):
            return cached, await self._commit(repository, fetched, manifest)

    async def parse(
        self, repository: Repository, content: bytes, content_type: str
    ) -> oci.Manifest:
        """Parse a manifest of the repository, in the parser's thread if it is large.

        Raises `InvalidManifestError` and `TooManyRequestsError`.
        """
        return await self._parser.run(
            repository.upstream, len(content), oci.parse_manifest, content, content_type
        )

    async def _commit(
        self, repository: Repository, fetched: FetchedManifest, manifest: oci.Manifest
    ) -> bool:
        if manifest.child_count > MAX_CHILDREN:
            self._metrics.count_uncached("too_large")
            return False
        size = len(fetched.content)
        reservation = None
        try:
            reservation = await self._space.reserve_manifests(size, manifest.child_count)
            if reservation is None:
                reason = self._space.uncached_reason(size, manifest.child_count)
                self._metrics.count_uncached(reason)
                return False
            await self._committer.commit_manifest(
                repository, fetched.digest, fetched.content, manifest, reservation
            )
        except StorageError as error:
            self._metrics.count_uncached(
                "no_space" if isinstance(error, NoSpaceError) else "disk_error"
            )
            log.warning("commit_failed", digest=str(fetched.digest), reason=str(error))
            return False
        finally:
            if reservation is not None:
                self._space.release(reservation)
        return True


def _with_type(manifest: CachedManifest, media_type: str | None) -> CachedManifest:
    """Return the manifest as a repository has it: upstreams may give one content different types."""
    if media_type in (None, manifest.media_type):
        return manifest
    return CachedManifest(manifest.digest, media_type, manifest.content)
