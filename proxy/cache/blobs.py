"""Blobs: a hit from the store, a running download that is shared, or a new download.

`proxy.download.manager` starts the downloads; each is a `proxy.download.download.Download`, whose workers
are the fetcher and the writer, and whose readers send to clients.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

import msgspec

from proxy.cache.access import RepositoryAccess
from proxy.concurrency import RESPONSE_TIMEOUT, enforce_deadline
from proxy.config import FetchSettings
from proxy.download.download import Download
from proxy.download.manager import DownloadManager
from proxy.download.reader import DownloadReader
from proxy.errors import (
    ProxyError,
    StorageError,
    TooManyRequestsError,
    UnknownBlobError,
    UnknownNameError,
)
from proxy.metrics import CacheState
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.storage.blobs import BlobStore, OpenBlob
from proxy.storage.index import Index
from proxy.storage.space import SpaceManager
from proxy.upstream.client import Upstream

# How long a refusal of a download is delayed on average, in seconds. A client that repeats its requests at once
# would otherwise occupy the event loop: with a thousand connections it delayed the blobs of others twentyfold.
REFUSAL_DELAY = 1.0


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

    def lookup_cached_size(self, repository: Repository, digest: Digest) -> int | None:
        """Return the size of a stored blob that another program will open, as `lookup_cached_blob` does."""
        row = self._access.get_linked(repository, digest)
        if row is None or not self._store.exists(digest, row.size):
            return None
        self._index.touch(digest)
        return row.size

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
        while True:
            if opened := await self._open_stored(repository, digest, deadline):
                with opened:
                    yield BlobResult(opened, "hit")
                return
            download = self._downloads.get(upstream.name, digest)
            if download is None or repository == download.repository:
                break
            if await self._may_join(repository, download, deadline, client):
                break
        state: CacheState = "collapsed"
        if download is None:
            try:
                download = self._downloads.start(
                    upstream, repository, digest, self._settings, client=client
                )
            except TooManyRequestsError:
                # At random, so that not all of them come back at the same moment.
                await asyncio.sleep(REFUSAL_DELAY * random.uniform(0.5, 1.5))  # noqa: S311 (no secret)
                raise
            state = "miss"
        else:
            self._downloads.add_client(download, client)
        async with download.attach() as reader:
            yield BlobResult(reader, state)

    async def open_for_peer(
        self, repository: Repository, digest: Digest, *, is_proven: bool
    ) -> OpenBlob | None:
        """Open a stored blob for another node of the fleet; None if it is not stored.

        The node gets what this one may serve under the repository, or, if the registry has proven to it that
        the repository has the blob (`is_proven`), what its upstream has sent. Raises `UnknownNameError`.
        """
        row = self._index.blob(repository, digest)
        if row is None:
            return None
        if not (row.is_linked or (is_proven and self._index.has_sent(repository.upstream, digest))):
            raise UnknownNameError("this node does not have it for this repository")
        opened = await self._space.open_blob(digest, row.size)
        if opened:
            self._index.touch(digest)
        return opened

    @asynccontextmanager
    async def join_for_peer(
        self, repository: Repository, digest: Digest, peer: str, *, is_proven: bool
    ) -> AsyncIterator[DownloadReader]:
        """Read from the running download of a blob for another node of the fleet.

        `peer` has turns in the download queue like a client. Raises `UnknownBlobError` without a download,
        and `UnknownNameError` as `open_for_peer` does.
        """
        download = self._downloads.get(repository.upstream, digest)
        if download is None or download.has_stopped_storing:
            raise UnknownBlobError("this node does not have it")
        shared = (download.repository, *download.shared_with)
        if not (is_proven or repository in shared):
            raise UnknownNameError("this node does not have it for this repository")
        self._downloads.add_client(download, peer)
        async with download.attach() as reader:
            yield reader

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
        # Not the size in a manifest, which may be wrong: GET would send what upstream has.
        async with enforce_deadline(deadline, repository.upstream):
            upstream = self._upstreams[repository.upstream]
            return await upstream.fetch_blob_size(repository.name, digest), "miss"

    async def is_servable(self, repository: Repository, digest: Digest) -> bool:
        """Tell whether the blob is stored and the repository may be served it. Raises `UpstreamError`."""
        opened = await self._open_stored(repository, digest, self._now() + RESPONSE_TIMEOUT)
        if opened:
            opened.close()
        return opened is not None

    async def _open_stored(
        self, repository: Repository, digest: Digest, deadline: float
    ) -> OpenBlob | None:
        """Open a stored blob that the repository may be served; None if it is not stored."""
        row = await self._access.get_blob(repository, digest, deadline)
        opened = await self._space.open_blob(digest, row.size) if row else None
        if opened:
            self._index.touch(digest)
        return opened

    async def _may_join(
        self, repository: Repository, download: Download, deadline: float, client: str
    ) -> bool:
        """Tell whether a repository may read from the download of another one of its upstream.

        Waits until upstream has sent a byte, as whether it has the blob there is not known before. If
        the registry gives no proof, waits for the end; the repository then needs a download of its own.
        """
        self._downloads.add_client(download, client)
        async with enforce_deadline(deadline, repository.upstream):
            await download.wait_started()
            if self._is_running(download):
                if await self._access.may_join(repository, download, deadline):
                    # A reader that attaches before the next await finds the file open.
                    return self._is_running(download)
                with suppress(ProxyError):
                    await download.wait_finished()
        return False

    def _is_running(self, download: Download) -> bool:
        return self._downloads.get(download.source.upstream_name, download.digest) is download
