"""One fetch, many readers.

A download belongs to the cache, not to the request that caused it: it goes on when that client
leaves. Readers follow the *frontier*, the length of what is written and hashed, each at its own
pace. The last byte is withheld until the digest is right, so nobody ever holds a complete blob that
was not verified. Who reads a range far ahead gets it as soon as it is in.

Where there is no room, or the disk fails, the download *detaches*: its readers keep what they
have and fetch the rest from upstream, each for itself, under the same rule.
"""

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator
from copy import copy
from dataclasses import dataclass

from proxy.concurrency import run_uncancelled
from proxy.config import FetchSettings
from proxy.download.fetcher import Fetcher
from proxy.download.queue import DownloadQueue, Ticket
from proxy.download.source import BlobSource
from proxy.download.writer import BlobWriter, StorageDeps
from proxy.errors import (
    DigestMismatchError,
    NoSpaceError,
    ProxyError,
    StorageError,
    UpstreamUnavailableError,
)
from proxy.log import get_logger
from proxy.metrics import DownloadResult, UncachedReason
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.tracing import span
from proxy.upstream.body import SMALL_BUFFER_SIZE
from proxy.upstream.client import Upstream

# A range of at most so many bytes that lies ahead may end with the blob's last byte before the digest
# is known: the footers and tables of contents that lazy pullers read.
MAX_READ_AHEAD = 1 << 20

log = get_logger(__name__)


# So many at a time: each then sends some hundred KiB, and a thousand of them would take a tenth of a second.
WAKE_BATCH = 32


class BatchedCondition:
    """Who waits is woken when it rings, in the order they came, some in each turn of the loop.

    Between two turns the loop looks after its other connections.
    """

    def __init__(self) -> None:
        self._waiters: dict[asyncio.Future[None], None] = {}
        self._notified: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Return when it has rung once more."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            await waiter
        finally:
            self._waiters.pop(waiter, None)

    def notify_all(self) -> None:
        """Call all who wait just now; who comes later waits for the next time."""
        is_idle = not self._notified
        self._notified += self._waiters
        self._waiters.clear()
        if is_idle:
            self._wake_batch()

    def _wake_batch(self) -> None:
        for _ in range(min(WAKE_BATCH, len(self._notified))):
            waiter = self._notified.popleft()
            if not waiter.done():
                waiter.set_result(None)
        if self._notified:
            asyncio.get_running_loop().call_soon(self._wake_batch)


@dataclass(frozen=True, slots=True)
class DownloadDeps:
    """What every download works with."""

    storage: StorageDeps
    queue: DownloadQueue
    settings: FetchSettings


class NotStoring(Exception):  # noqa: N818 (it is no error: the reader goes on by itself)
    """The rest is not to be had from the file: go on with `Download.pass_through`."""


class Download:
    """The fetch of one blob under one repository. `run` is its task; everything else reads.

    `error` is what ended a download that failed; `is_detached` says that the blob is not being stored.
    """

    def __init__(
        self,
        deps: DownloadDeps,
        upstream: Upstream,
        repository: Repository,
        digest: Digest,
        *,
        is_urgent: bool,
    ) -> None:
        self.repository = repository
        self.digest = digest
        self.error: ProxyError | None = None
        self.has_stopped_storing = False
        metrics = deps.storage.metrics
        self._deps = deps
        self._source = BlobSource(upstream, repository.name, digest, metrics)
        self._changed = BatchedCondition()
        self._writer = BlobWriter(deps.storage, self._source, self._changed.notify_all)
        expected = deps.storage.index.declared_size(repository, digest)
        self._fetcher = Fetcher(self._source, self._writer, deps.settings, expected)
        self._ticket = Ticket(is_urgent=is_urgent)
        self._is_running = True
        self._reader_count = 0

    # For readers.

    @property
    def size(self) -> int | None:
        """The size of the blob; None until upstream says it."""
        return self._writer.size

    @property
    def bytes_present(self) -> int:
        """How many bytes are in, in whatever order; `resumed` of them since an earlier download."""
        return self._writer.pieces.bytes_present

    @property
    def bytes_resumed(self) -> int:
        """How many bytes an interrupted download had left."""
        return self._writer.bytes_resumed

    @property
    def is_requested(self) -> bool:
        """Whether a client has asked for it."""
        return self._ticket.is_urgent

    @property
    def fd(self) -> int:
        """The file that grows, once `available` has returned, for a reader that was counted."""
        return self._writer.fd

    def add_reader(self) -> None:
        """Count a reader: the file stays open until it calls `release`. It is now urgent."""
        self._reader_count += 1
        if not self._ticket.is_urgent:
            self._ticket.is_urgent = True
            self._deps.queue.dispatch()

    def remove_reader(self) -> None:
        """Count a reader less."""
        self._reader_count -= 1
        self._close_if_unused()

    async def wait_finished(self) -> None:
        """Wait until it is over, and in the store unless `is_detached`. Raises what ended it."""
        while self._is_running:
            await self._changed.wait()
        if self.error:
            raise copy(self.error)

    def is_read_ahead(self, start: int, stop: int) -> bool:
        """Tell whether reading this range now is reading ahead, not completing what was read."""
        is_ahead = self._fetcher.is_parallel and start > self._writer.frontier
        return is_ahead and stop - start <= MAX_READ_AHEAD

    async def wait_readable(
        self, offset: int, stop: int = sys.maxsize, *, is_read_ahead: bool = False
    ) -> int:
        """Return how far the file may be read, more than `offset`; `offset` itself at the end.

        Who wants no more than up to `stop` is served before its turn. Raises what ended the
        download, and `Detached`.
        """
        while True:
            limit = self._readable_end(offset, is_read_ahead=is_read_ahead)
            if limit > offset or self._writer.is_verified:
                return max(limit, offset)
            if self.error:
                # Each reader raises its own: tracebacks and contexts are not for sharing.
                raise copy(self.error)
            if self.has_stopped_storing:
                raise NotStoring
            if stop != sys.maxsize and self.size is not None:
                self._fetcher.prioritize(offset, min(stop, self.size))
            await self._changed.wait()

    def _readable_end(self, offset: int, *, is_read_ahead: bool) -> int:
        filling = self._writer
        if filling.is_verified or self.has_stopped_storing:
            return filling.frontier
        limit = max(filling.frontier, filling.pieces.contiguous_end(offset))
        if is_read_ahead:
            return limit
        return min(limit, (limit if self.size is None else self.size) - 1)

    async def stream_from_upstream(self, start: int, stop: int | None) -> AsyncIterator[bytes]:
        """Yield the bytes from `start` up to `stop` (None: the end), fetched for this reader alone.

        The blob's last byte comes only when the digest is right. `size` is known after the first
        chunk, if ever. Raises `DigestMismatchError` and `UpstreamError`.
        """
        filling = self._writer
        hasher, position, held = filling.copy_hasher(), filling.frontier, b""
        async with self._source.open(position) as transfer:
            transfer.buffer_size = SMALL_BUFFER_SIZE
            filling.size = transfer.size if self.size is None else self.size
            is_tail = stop is None or stop == self.size
            end = sys.maxsize if stop is None else stop
            async for chunk in self._source.iter_chunks(transfer, position):
                # At most half a MiB: hashing it holds up nobody for long.
                hasher.update(chunk)
                piece = chunk[max(0, start - position) :]
                position += len(chunk)
                if not is_tail and position >= end:
                    yield bytes(piece[: len(piece) - (position - end)])
                    return
                if piece:
                    yield held + bytes(piece[: -1 if is_tail else None])
                    held = bytes(piece[-1:]) if is_tail else b""
        if not self.digest.matches(hasher):
            raise self._source.record_mismatch()
        yield held

    # The fetch.

    async def run(self, predecessor: "asyncio.Task[None] | None" = None) -> None:
        """Fetch, verify and commit. What goes wrong is `error` afterwards; nothing is raised.

        `before` is waited for first: an abandoned download of the same blob that closes its files.
        """
        result: DownloadResult = "failed"
        ended: ProxyError | None = UpstreamUnavailableError("the cache is shutting down; try again")
        metrics = self._deps.storage.metrics
        try:
            if predecessor:
                await asyncio.wait((predecessor,))
            async with self._deps.queue.acquire(self._ticket):
                await self._fetch_and_write()
                is_stored = not self.has_stopped_storing and await self._commit()
            result, ended = "stored" if is_stored else "bypass", None
        except ProxyError as error:
            result = "mismatch" if isinstance(error, DigestMismatchError) else "failed"
            ended = error
        except Exception:
            ended = StorageError("the cache failed inside; its log says how")
            metrics.count_internal_error()
            log.exception("download_crashed", digest=str(self.digest))
        finally:
            metrics.count_download(result)
            try:
                is_worth_keeping = result == "failed" and not self.has_stopped_storing
                await self._writer.release(keep_partial=is_worth_keeping)
                self._is_running = False
                self._close_if_unused()
            finally:
                # Told last: whoever hears of it may begin anew at once, with the same files.
                self.error = ended
                self._changed.notify_all()

    async def _fetch_and_write(self) -> None:
        """Get all bytes into the file, or detach."""
        try:
            async with self._writer.open():
                if not self._writer.is_verified:
                    await self._fetcher.run()
        except StorageError as error:
            self._stop_storing(error)

    async def _commit(self) -> bool:
        with span("commit"):
            return await run_uncancelled(self._writer.commit(self.repository))

    def _stop_storing(self, error: StorageError) -> None:
        reason: UncachedReason = "disk_error"
        if isinstance(error, NoSpaceError):
            reason = self._deps.storage.space.uncached_reason(self.size or 0)
        self._deps.storage.metrics.count_uncached(reason)
        log.warning("store_bypassed", digest=str(self.digest), reason=str(error))
        # A write that failed may have got some way: what is hashed is in, and may be read.
        self._writer.sync_frontier()
        self.has_stopped_storing = True

    def _close_if_unused(self) -> None:
        if not self._is_running and not self._reader_count:
            self._writer.close()
