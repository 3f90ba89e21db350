"""Blobs: a hit from the store, a running download that is shared, or a new download."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import msgspec

from proxy.cache.access import RepositoryAccess
from proxy.concurrency import RESPONSE_TIMEOUT, enforce_deadline
from proxy.config import FetchSettings
from proxy.download.download import Download
from proxy.download.manager import DownloadManager
from proxy.download.reader import DownloadReader
from proxy.errors import StorageError
from proxy.metrics import CacheState
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.storage.blobs import BlobStore, OpenBlob
from proxy.storage.index import Index
from proxy.storage.space import SpaceManager
from proxy.upstream.client import Upstream


class BlobResult(msgspec.Struct, frozen=True):
    """Where to read a blob from: a stored file, or a download that may still be running."""

    source: OpenBlob | DownloadReader
    cache_state: CacheState


class BlobCache:
    """Serves blobs of all upstreams, from the store where possible."""

    def __init__(
        self,
        *,
        upstreams: Mapping[str, Upstream],
        store: BlobStore,
        index: Index,
        space: SpaceManager,
        downloads: DownloadManager,
        access: RepositoryAccess,
        settings: FetchSettings,
    ) -> None:
        self._upstreams = upstreams
        self._store = store
        self._index = index
        self._space = space
        self._downloads = downloads
        self._access = access
        self._settings = settings
        self._now = asyncio.get_running_loop().time

    def lookup_cached_blob(self, repository: Repository, digest: Digest) -> OpenBlob | None:
        """Open a stored blob if that needs neither waiting nor upstream; the caller closes it."""
        row = self._access.get_linked(repository, digest)
        try:
            opened = self._store.open(digest, row.size) if row else None
        except StorageError:
            # `open_blob` logs the error, and fetches the blob again.
            return None
        if opened:
            self._index.touch(digest)
        return opened

    @asynccontextmanager
    async def open_blob(
        self, repository: Repository, digest: Digest, *, client: str = ""
    ) -> AsyncIterator[BlobResult]:
        """Open a blob; one that is not stored is downloaded while it is read.

        `client` is the client's address: client addresses take turns in the download queue. Raises
        `UnknownBlobError`, `UpstreamError`, `DigestMismatchError` and `TooManyRequestsError`.
        """
        deadline = self._now() + RESPONSE_TIMEOUT
        upstream = self._upstreams[repository.upstream]
        opened = await self._open_stored(repository, digest, deadline)
        download = None if opened else self._downloads.get(upstream.name, digest)
        if download and download.repository != repository:
            download = await self._share_download(repository, digest, deadline, client)
            if download is None:
                # The download failed, or the blob has just been committed.
                opened = await self._open_stored(repository, digest, deadline)
        if opened:
            with opened:
                yield BlobResult(opened, "hit")
            return
        state: CacheState = "collapsed"
        if download is None:
            download = self._downloads.start(
                upstream, repository, digest, self._settings, client=client
            )
            state = "miss"
        else:
            self._downloads.add_client(download, client)
        async with download.attach() as reader:
            yield BlobResult(reader, state)

    async def get_blob_size(
        self, repository: Repository, digest: Digest
    ) -> tuple[int | None, CacheState]:
        """Return the size of a blob without downloading it; None if upstream does not state it.

        Raises `UnknownBlobError` and `UpstreamError`.
        """
        deadline = self._now() + RESPONSE_TIMEOUT
        if opened := await self._open_stored(repository, digest, deadline):
            with opened:
                return opened.size, "hit"
        size = self._index.declared_size(repository, digest)
        if size is not None and self._access.is_linked(repository, digest):
            return size, "miss"
        async with enforce_deadline(deadline, repository.upstream):
            upstream = self._upstreams[repository.upstream]
            return await upstream.fetch_blob_size(repository.name, digest), "miss"

    async def _open_stored(
        self, repository: Repository, digest: Digest, deadline: float
    ) -> OpenBlob | None:
        """Open a stored blob that the repository may be served; None if it is not stored."""
        row = await self._access.get_blob(repository, digest, deadline)
        opened = await self._space.open_blob(digest, row.size) if row else None
        if opened:
            self._index.touch(digest)
        return opened

    async def _share_download(
        self, repository: Repository, digest: Digest, deadline: float, client: str
    ) -> Download | None:
        """Return a download that another repository has started, once upstream has sent a byte.

        Whether it succeeds depends on the other repository. Returns None if it ends before the
        first byte.
        """
        await self._access.check_download(repository, digest, deadline)
        async with enforce_deadline(deadline, repository.upstream):
            return await self._downloads.join(repository.upstream, digest, client)
