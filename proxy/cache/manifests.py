"""The manifests of the store: verified when they are read, the hot ones kept in memory."""

from concurrent.futures import Executor

from proxy.concurrency import in_thread
from proxy.errors import InvalidManifestError, NoSpaceError, StorageError, UpstreamError
from proxy.log import get_logger
from proxy.lru import Held, ManifestMemory
from proxy.metrics import Metrics
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.storage.blobs import LocalStore
from proxy.storage.index import Index
from proxy.storage.space import Space
from proxy.tracing import span
from proxy.upstream.client import Fetched

HOT_MANIFESTS = 32 << 20
# Longer ones are read in a thread: 4 MiB that were made for it take a second.
LONG_MANIFEST = 64 << 10

log = get_logger(__name__)


class Manifests:
    """Keeps manifests and gives them back."""

    def __init__(
        self, store: LocalStore, index: Index, space: Space, metrics: Metrics, threads: Executor
    ) -> None:
        self._store = store
        self._index = index
        self._space = space
        self._metrics = metrics
        self._threads = threads
        self._memory = ManifestMemory(HOT_MANIFESTS)

    def at_hand(self, digest: Digest) -> Held | None:
        """Return a manifest of the store that is in memory too."""
        held = self._memory.get(digest)
        if held is not None:
            self._index.touch(digest)
        return held

    async def held(self, digest: Digest) -> Held | None:
        """Return a manifest of the store, verified; None if it is gone, damaged, or cannot be read."""
        held = self._memory.get(digest)
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
                await self._space.forget(digest, row.size)
                return None
            held = Held(digest, row.media_type or "", content)
            self._memory.put(held)
        self._index.touch(digest)
        return held

    async def keep(self, repository: Repository, fetched: Fetched) -> Held:
        """Look at what upstream sent and commit it; where that fails it is served all the same.

        Raises `UpstreamError` if it is no manifest.
        """
        try:
            manifest = await self.parsed(fetched.content, fetched.content_type)
        except InvalidManifestError as error:
            raise UpstreamError(
                f"{repository.upstream} did not send a manifest: {error}"
            ) from error
        held = Held(fetched.digest, manifest.media_type, fetched.content)
        self._memory.put(held)
        with span("commit"):
            await self._commit(repository, fetched, manifest)
        return held

    async def parsed(self, content: bytes, content_type: str) -> oci.Manifest:
        """Return what the manifest names, or raise `InvalidManifestError`; hold up nobody meanwhile."""
        if len(content) <= LONG_MANIFEST:
            return oci.parse(content, content_type)
        return await in_thread(self._threads, oci.parse, content, content_type)

    async def _commit(
        self, repository: Repository, fetched: Fetched, manifest: oci.Manifest
    ) -> None:
        size = len(fetched.content)
        reservation = await self._space.reserve(size)
        if reservation is None:
            self._metrics.uncached(self._space.refusal(size))
            return
        try:
            await in_thread(self._threads, self._store.put, fetched.digest, fetched.content)
            is_new = await self._index.add_manifest(repository, fetched.digest, size, manifest)
        except StorageError as error:
            self._space.release(reservation)
            self._metrics.uncached("no_space" if isinstance(error, NoSpaceError) else "disk_error")
            log.warning("not_stored", digest=str(fetched.digest), reason=str(error))
        else:
            self._space.commit(reservation, fetched.digest, size, is_new=is_new)
