"""The running downloads, at most one for each upstream and digest.

Upstreams share only committed blobs: clients of one upstream get no unverified bytes of another.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from proxy.concurrency import run_uncancelled, start_task
from proxy.config import FetchSettings
from proxy.config.values import Size
from proxy.download.buffers import BufferPool
from proxy.download.download import Download, DownloadDeps
from proxy.download.queue import Ticket, UpstreamQueue
from proxy.download.rate_limit import RateLimiter
from proxy.download.source import BlobSource
from proxy.download.writer import StorageDeps
from proxy.errors import (
    DigestMismatchError,
    TooManyRequestsError,
    UnknownBlobError,
)
from proxy.lru import TTLCache
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.tracing import span
from proxy.upstream.client import Upstream
from proxy.upstream.peers import PeerClient

# After two digest mismatches in a row, a blob is not requested again for this long, in seconds.
MISMATCH_BACKOFF = 10.0
# How long, in seconds, and for how many blobs the manager remembers that upstream does not have them.
ABSENT_TTL = 3.0
MAX_ABSENT_BLOBS = 10_000
# Downloads whose beginning is remembered, so that a pull knows what was fetched for it.
MAX_REMEMBERED_STARTS = 10_000
# A request for a blob that upstream does not have counts as waiting for this long after its response, in
# seconds: otherwise one client could have upstream asked as fast as it answers.
ABSENT_HOLD = 1.0

_Key = tuple[str, Digest]


class DownloadManager:
    """Starts downloads and finds running ones. They are tasks of `group`, not of a request.

    Limits apply to all downloads and change with a reload; a download keeps the other settings that it was
    started with.
    """

    def __init__(
        self,
        storage: StorageDeps,
        settings: FetchSettings,
        group: asyncio.TaskGroup,
        peers: PeerClient | None = None,
    ) -> None:
        self._pool = BufferPool(settings)
        self._deps = DownloadDeps(storage, self._pool)
        self._limiter = RateLimiter(settings.max_rate)
        self._limits = settings
        self._group = group
        self._peers = peers
        self._queues: dict[str, UpstreamQueue] = {}
        self._running: dict[_Key, Download] = {}
        self._tasks: dict[_Key, asyncio.Task[None]] = {}
        self._attached_counts: Counter[Download] = Counter()
        # Downloads by the client address that started them.
        self._started_by: dict[str, set[Download]] = {}
        # Requests for absent blobs in the last `ABSENT_HOLD` seconds, by client address.
        self._absent_counts: Counter[str] = Counter()
        now = asyncio.get_running_loop().time
        self._mismatch_counts: TTLCache[tuple[Repository, Digest], int] = TTLCache(1000, now)
        self._absent: TTLCache[tuple[Repository, Digest], str] = TTLCache(MAX_ABSENT_BLOBS, now)
        self._starts: TTLCache[_Key, None] = TTLCache(MAX_REMEMBERED_STARTS, time.perf_counter)

    def configure(self, settings: FetchSettings) -> None:
        """Apply the limits of a new configuration."""
        self._limits = settings
        self._pool.configure(settings)
        self._limiter.configure(settings.max_rate)
        for queue in self._queues.values():
            queue.downloads.resize(settings.max_downloads)

    def __len__(self) -> int:
        return len(self._running)

    def running(self) -> list[Download]:
        """Return the running downloads, the oldest first."""
        return list(self._running.values())

    def get(self, upstream_name: str, digest: Digest) -> Download | None:
        """Return the running download of `digest` from an upstream, or None."""
        return self._running.get((upstream_name, digest))

    def age(self, upstream_name: str, digest: Digest) -> float | None:
        """Return how many seconds ago the last download of a blob began; None if that is forgotten."""
        found = self._starts.get_with_age((upstream_name, digest))
        return found[0] if found else None

    def add_client(self, download: Download, client: str) -> None:
        """Make a download urgent, and let it use this client's turns too."""
        download.ticket.add_client(client)

    def start(
        self,
        upstream: Upstream,
        repository: Repository,
        digest: Digest,
        settings: FetchSettings,
        *,
        client: str | None = None,
    ) -> Download:
        """Start the download of a blob that has no running one; without a `client` it is not urgent.

        Raises `UnknownBlobError` if upstream has just answered that it does not have the blob,
        `DigestMismatchError` if it has just sent wrong bytes for it twice, `TooManyRequestsError` if
        too many downloads that only this client has requested are waiting, and
        `UpstreamUnavailableError` if the daemon is stopping.
        """
        if client is not None:
            self._check_waiting(client)
        try:
            self._check_remembered(repository, digest)
        except UnknownBlobError:
            self._count_absent(client)
            raise
        queue = self._queues.get(upstream.name)
        if queue is None:
            queue = self._queues[upstream.name] = UpstreamQueue(self._limits.max_downloads)
        metrics = self._deps.storage.metrics
        source = BlobSource(upstream, repository, digest, metrics, self._limiter, self._peers)
        if self._peers and self._peers.directory.members:
            # Peers are sent a blob from its beginning: bytes beyond would be lost with this node.
            settings = msgspec.structs.replace(settings, parallel_max_rate=Size(0))
        download = Download(self._deps, source, settings, Ticket(queue, client))
        key = (upstream.name, digest)
        # An abandoned download of the same blob may still be closing the files.
        predecessor = self._tasks.get(key)
        task = start_task(self._group, self._run(key, download, client, predecessor))
        self._tasks[key] = task
        self._running[key] = download
        self._starts.set(key, None)
        if client is not None:
            self._started_by.setdefault(client, set()).add(download)
        return download

    def _check_remembered(self, repository: Repository, digest: Digest) -> None:
        age, reason = self._absent.get_with_age((repository, digest)) or (ABSENT_TTL, "")
        if age < ABSENT_TTL:
            raise UnknownBlobError(reason)
        age, count = self._mismatch_counts.get_with_age((repository, digest)) or (0.0, 0)
        if count > 1 and age < MISMATCH_BACKOFF:
            raise DigestMismatchError(
                f"{repository.upstream} keeps sending wrong bytes for {digest}"
            )

    def _check_waiting(self, client: str) -> None:
        limit = self._limits.max_waiting_per_client
        started, absent = self._started_by.get(client, ()), self._absent_counts[client]
        if len(started) + absent < limit:
            return
        alone = sum(one.is_waiting and one.ticket.client_count == 1 for one in started)
        if alone + absent >= limit:
            raise TooManyRequestsError(
                f"{client or 'this client'} already has {limit} downloads waiting; try again in a "
                "moment, or raise fetch.max_waiting_per_client"
            )

    @asynccontextmanager
    async def attach(
        self,
        upstream: Upstream,
        repository: Repository,
        digest: Digest,
        settings: FetchSettings,
    ) -> AsyncIterator[Download]:
        """Yield the running download of a blob, or start one that is not urgent.

        A download started here is abandoned when its last context ends, unless a client has requested
        it; its bytes are kept and resumed later. Raises the errors of `start`.
        """
        download = self.get(upstream.name, digest)
        if download is None:
            download = self.start(upstream, repository, digest, settings)
            self._attached_counts[download] = 0
        is_counted = download in self._attached_counts
        if is_counted:
            self._attached_counts[download] += 1
        try:
            yield download
        finally:
            if is_counted:
                self._attached_counts[download] -= 1
                if not self._attached_counts[download]:
                    del self._attached_counts[download]
                    await self._abandon((upstream.name, digest), download)

    async def _abandon(self, key: _Key, download: Download) -> None:
        """End a download that no client has requested, and wait until its bytes are kept."""
        if self._running.get(key) is not download or download.is_requested:
            return
        # The next request starts another download, which waits for the end of this one.
        del self._running[key]
        task = self._tasks[key]
        task.cancel()
        await run_uncancelled(asyncio.wait((task,)))
        if self._tasks.get(key) is task:  # it was cancelled before its first step
            del self._tasks[key]

    async def _run(
        self,
        key: _Key,
        download: Download,
        client: str | None,
        predecessor: asyncio.Task[None] | None,
    ) -> None:
        try:
            with span("download") as attributes:
                attributes["pullcache.digest"] = str(download.digest)
                await download.run(predecessor)
                attributes["pullcache.bytes"] = download.bytes_present
                if download.error:
                    attributes["error.type"] = type(download.error).__qualname__
        finally:
            if self._running.get(key) is download:
                del self._running[key]
            if self._tasks.get(key) is asyncio.current_task():
                del self._tasks[key]
            if client is not None:
                self._forget_started(client, download)
            if isinstance(download.error, UnknownBlobError):
                self._count_absent(client)
        self._remember(download)

    def _forget_started(self, client: str, download: Download) -> None:
        started = self._started_by[client]
        started.discard(download)
        if not started:
            del self._started_by[client]

    def _count_absent(self, client: str | None) -> None:
        if client is not None:
            self._absent_counts[client] += 1
            asyncio.get_running_loop().call_later(ABSENT_HOLD, self._forget_absent, client)

    def _forget_absent(self, client: str) -> None:
        self._absent_counts[client] -= 1
        if not self._absent_counts[client]:
            del self._absent_counts[client]

    def _remember(self, download: Download) -> None:
        """Remember that upstream does not have a blob, or has sent wrong bytes for it."""
        key = (download.repository, download.digest)
        if isinstance(download.error, UnknownBlobError):
            self._absent.set(key, str(download.error))
        elif isinstance(download.error, DigestMismatchError):
            _, count = self._mismatch_counts.get_with_age(key) or (0.0, 0)
            self._mismatch_counts.set(key, count + 1)
        elif not download.error:
            self._mismatch_counts.discard(key)
