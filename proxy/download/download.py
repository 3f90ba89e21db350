"""The state of one running download: one transfer from upstream, many readers.

A download belongs to the cache, not to the request that started it: it continues when that client
disconnects. It has two workers: the `Fetcher` receives the bytes from upstream, the `BlobWriter` writes
and hashes them. Each reader has its own pace: it gets recent bytes from memory, older ones from the file.

If the store has no space or the disk fails, the download stops storing. Each reader then fetches the
bytes that it has not sent yet from upstream itself, under the same rules.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import dataclass

from proxy.concurrency import run_all, run_uncancelled
from proxy.config import FetchSettings
from proxy.download.buffers import BufferPool, Chunk
from proxy.download.condition import BatchedCondition
from proxy.download.fetcher import Fetcher
from proxy.download.pieces import Piece, PieceMap, RangeSet
from proxy.download.queue import Ticket
from proxy.download.reader import DownloadReader
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
from proxy.oci.digest import Digest, Hasher
from proxy.oci.reference import Repository
from proxy.storage.blobs import FileRange
from proxy.tracing import span

# A range ahead of the frontier that is no larger than this may include the blob's last byte before the
# digest is verified: lazy pullers read the footer and table of contents first.
MAX_READ_AHEAD = 1 << 20
# Several readers get at least this many bytes from the file, once they are written, and not from memory: the
# kernel then copies nothing.
MIN_FILE_PART = 64 << 10

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DownloadDeps:
    """The dependencies that all downloads share."""

    storage: StorageDeps
    pool: BufferPool


class Download:
    """The download of one blob from one repository. `run` is its task; readers `attach`.

    These hold at any time, seen from the event loop:

    - The first `hashed` bytes are hashed. `written` holds the ranges in the file. All these bytes have
      been received (`pieces.received`).
    - Each received byte is in the file or in one of `chunks`. A chunk's buffer goes back to the pool when
      no connection appends to it, all of it is written, and the hash is past it or far behind it.
    - No byte is received twice, and none beyond `size`. `is_verified` means that all bytes are written and
      match the digest; only then may the last byte be sent.
    - `generation` counts the attempts. Bytes discarded after a digest mismatch belong to an earlier
      generation, and a reader that has sent any of them gets no more bytes.
    - `error` is the error of a failed download; `has_stopped_storing` means that the first `hashed` bytes
      are in the file, and readers fetch the others themselves.
    """

    def __init__(
        self, deps: DownloadDeps, source: BlobSource, settings: FetchSettings, ticket: Ticket
    ) -> None:
        self.source = source
        self.settings = settings
        self.ticket = ticket
        # The bytes.
        self.size: int | None = None
        self.pieces = PieceMap()
        self.chunks: list[Chunk] = []
        self.written = RangeSet()
        self.hashed = 0
        self.bytes_resumed = 0
        self.transfer_count = 0
        # Seconds that connections have waited for buffers that only the disk held up.
        self.seconds_held_up = 0.0
        self.generation = 0
        # By the clock of the loop.
        self.created_at = asyncio.get_running_loop().time()
        # The outcome.
        self.is_verified = False
        self.has_stopped_storing = False
        self.error: ProxyError | None = None
        self._is_running = True
        # Readers wait for `readable`, the workers for `progress` of each other.
        self.readable = BatchedCondition()
        self.progress = BatchedCondition()
        self.reader_count = 0
        # Whether readers may wait for bytes that have arrived to be written.
        self._is_withholding = False
        # Other repositories that were proven to have the blob; the commit links them too.
        self.shared_with: set[Repository] = set()
        self._deps = deps
        self._writer = BlobWriter(self, deps.storage)
        self._expected_size = deps.storage.index.declared_size(self.repository, self.digest)
        self._fetcher = Fetcher(self, self._expected_size)

    @property
    def digest(self) -> Digest:
        """The digest of the blob."""
        return self.source.digest

    @property
    def repository(self) -> Repository:
        """The repository that the blob is fetched from."""
        return self.source.repository

    @property
    def bytes_present(self) -> int:
        """How many bytes have arrived, in any order."""
        return self.pieces.received.total

    @property
    def is_requested(self) -> bool:
        """Whether a client has requested the blob."""
        return self.ticket.is_urgent

    @property
    def is_waiting(self) -> bool:
        """Whether the download waits for upstream's first response, or for a slot."""
        return self._is_running and not self.ticket.is_running

    # For readers.

    @asynccontextmanager
    async def attach(self) -> AsyncIterator[DownloadReader]:
        """Yield a reader; the file stays open for it until the context ends."""
        self.reader_count += 1
        reader = DownloadReader(self)
        try:
            yield reader
        finally:
            self.reader_count -= 1
            self._close_if_unused()
            await reader.close()

    async def wait_started(self) -> None:
        """Wait until the first bytes may be sent, or the download has ended or stopped storing."""
        while not (
            self.has_stopped_storing
            or self.is_verified
            or self.error
            or self.readable_part(0, sys.maxsize, may_include_last=False)
        ):
            await self.readable.wait()

    async def wait_finished(self) -> None:
        """Wait until the download has ended, stored or not. Raises the error that ended it."""
        while self._is_running:
            await self.readable.wait()
        if self.error:
            raise copy(self.error)

    def is_read_ahead(self, start: int, stop: int) -> bool:
        """Tell whether a small range lies ahead of the frontier, so that its reader reads ahead."""
        is_ahead = self._fetcher.is_parallel and start > self.hashed
        return is_ahead and stop - start <= MAX_READ_AHEAD

    def readable_part(
        self, offset: int, stop: int, *, may_include_last: bool
    ) -> memoryview | FileRange | None:
        """Return bytes that may be sent, from `offset` up to `stop` at most; None if there are none yet.

        The blob's last byte is left out until the digest is verified, unless `may_include_last`.
        """
        end = min(stop, self.pieces.received.contiguous_end(offset))
        if self.has_stopped_storing:
            end = min(end, self.hashed)
        if not (self.is_verified or may_include_last):
            # If the size is unknown, any byte may be the last one.
            last = self.size if self.size is not None else self.pieces.received.contiguous_end(0)
            end = min(end, last - 1)
        if end <= offset:
            return None
        for chunk in self.chunks:
            is_cheaper_from_file = offset < chunk.written and chunk.is_in_page_cache
            if chunk.start <= offset < chunk.stop and not is_cheaper_from_file:
                part = chunk.view(offset, min(end, chunk.stop))
                if offset >= chunk.written and self._must_be_written(len(part)):
                    return None
                return part
        in_file = self.written.contiguous_end(offset)
        if in_file > offset:
            return FileRange(self._writer.fd, offset, min(end, in_file))
        return None  # a failed download has dropped the chunk

    def _must_be_written(self, count: int) -> bool:
        """Tell whether readers get `count` bytes that have arrived only once they are in the file."""
        is_withheld = self.reader_count > 1 and count >= MIN_FILE_PART
        self._is_withholding |= is_withheld
        return is_withheld

    def prioritize(self, offset: int, stop: int) -> None:
        """Fetch a range out of turn, because a reader waits for it, if the connections allow it."""
        if stop != sys.maxsize and self.size is not None:
            self._fetcher.prioritize(offset, min(stop, self.size))

    def copy_hasher(self) -> Hasher:
        """Return a copy of the hasher of the first `hashed` bytes, once storing has stopped."""
        return self._writer.copy_hasher()

    # For the workers.

    @property
    def is_received(self) -> bool:
        """Whether all bytes have arrived."""
        return self.pieces.is_complete

    def set_size(self, size: int) -> None:
        """Record the blob's size as upstream states it.

        Raises `DigestMismatchError` if it contradicts what upstream has sent before, `NoSpaceError` if
        the store cannot hold the blob.
        """
        if self.size is not None:
            if size != self.size:
                raise self.source.record_mismatch()
            return
        if any(stop > size for _, stop in self.pieces.received):
            raise self.source.record_mismatch()
        self.size = size
        self.pieces.set_size(size)
        # A manifest may state a smaller size than upstream claims.
        expected = self._expected_size if self._expected_size is not None else size
        if not self._deps.storage.space.could_make_room(min(size, expected)):
            raise NoSpaceError("the blob is larger than the store can hold")
        self._notify()

    async def open_chunk(self, piece: Piece) -> Chunk:
        """Return a chunk for the next bytes of a piece. Waits for a buffer if the disk is too slow."""
        pool, size = self._deps.pool, piece.stop - piece.start
        began = asyncio.get_running_loop().time()
        while (buffer := pool.take(size, self._bytes_held)) is None:
            if all(chunk.is_open for chunk in self.chunks):
                # No buffer can be freed by a write, and a reader may wait for this connection.
                buffer = pool.take_small(size)
                break
            await pool.changed.wait()
        if not self._is_hash_behind:
            self.seconds_held_up += asyncio.get_running_loop().time() - began
        chunk = Chunk(piece.start, buffer)
        self.chunks.append(chunk)
        return chunk

    @property
    def _is_hash_behind(self) -> bool:
        return any(c.start <= self.hashed < c.stop and not c.is_open for c in self.chunks)

    @property
    def _bytes_held(self) -> int:
        return sum(len(chunk.buffer) for chunk in self.chunks)

    def append(self, piece: Piece, chunk: Chunk, count: int) -> None:
        """Record that the next `count` bytes of a piece have arrived, at the end of a chunk."""
        self.pieces.advance(piece, count)
        chunk.stop += count
        if not self._must_be_written(count):
            self.readable.notify_all()
        self._notify_workers()

    def close_chunk(self, chunk: Chunk) -> None:
        """Record that no connection appends to a chunk any more."""
        chunk.is_open = False
        self._release_chunks()
        self._notify_workers()

    def mark_written(self, chunk: Chunk, stop: int) -> None:
        """Record that a chunk is in the file up to `stop`."""
        self.written.add(chunk.written, stop)
        chunk.written = stop
        if self._is_withholding:
            self._is_withholding = False
            self.readable.notify_all()
        self._release_chunks()
        self._notify_workers()

    def mark_hashed(self, end: int, *, is_verified: bool = False) -> None:
        """Record that the bytes before `end` are hashed; `is_verified` if they are the blob, and written."""
        self.hashed = end
        self.is_verified = is_verified
        self._release_chunks()
        self._notify_workers()
        if is_verified:
            self.readable.notify_all()

    def mark_resumed(
        self, ranges: list[tuple[int, int]], hashed: int, size: int | None, *, is_whole: bool
    ) -> None:
        """Record the ranges that an earlier download left in the file, and the size it knew.

        `is_whole` means that the first `hashed` bytes match the digest.
        """
        for start, stop in ranges:
            self.pieces.received.add(start, stop)
            self.written.add(start, stop)
        self.bytes_resumed = self.bytes_present
        self.transfer_count += 1
        if is_whole:
            size = hashed
        if size is not None and size >= max(stop for _, stop in ranges):
            self.size = size
            self.pieces.set_size(size)
        self.mark_hashed(hashed, is_verified=is_whole)
        self.readable.notify_all()

    def _release_chunks(self) -> None:
        near = self.pieces.received.contiguous_end(0)
        kept = []
        for chunk in self.chunks:
            is_done = chunk.written == chunk.stop and not chunk.is_open
            if is_done and not self.hashed < chunk.stop <= near:
                self._deps.pool.give_back(chunk.buffer)
            else:
                kept.append(chunk)
        self.chunks = kept

    def _notify(self) -> None:
        self.readable.notify_all()
        self._notify_workers()

    def _notify_workers(self) -> None:
        self.progress.notify_all()

    # The task.

    async def run(self, predecessor: "asyncio.Task[None] | None" = None) -> None:
        """Fetch, verify and commit. Errors are set as `error`, not raised.

        Waits first for `predecessor`, an abandoned download of the same blob that is still closing files.
        """
        result: DownloadResult = "failed"
        ended: ProxyError | None = UpstreamUnavailableError("the cache is shutting down; try again")
        metrics = self._deps.storage.metrics
        try:
            if predecessor:
                await asyncio.wait((predecessor,))
            await self._fetch_and_write()
            is_stored = not self.has_stopped_storing and await self._commit()
            result, ended = "stored" if is_stored else "bypass", None
        except ProxyError as error:
            result = "mismatch" if isinstance(error, DigestMismatchError) else "failed"
            ended = error
        except Exception:
            ended = StorageError("internal error; see the daemon's log")
            metrics.count_internal_error()
            log.exception("download_crashed", digest=str(self.digest))
        finally:
            metrics.count_download(result, self.source.origin)
            try:
                await self._release(is_worth_keeping=result == "failed")
            finally:
                await self.source.close(is_stored=result == "stored")
                # Readers are notified last: they may start a download that uses the same files.
                self.error = ended
                self.readable.notify_all()

    async def _release(self, *, is_worth_keeping: bool) -> None:
        self.ticket.release()
        await self._writer.release(keep_partial=is_worth_keeping and not self.has_stopped_storing)
        self._drop_chunks()
        self._is_running = False
        self._close_if_unused()

    async def _fetch_and_write(self) -> None:
        """Write all bytes to the file and verify them, or stop storing."""
        try:
            await self._writer.resume()
            while not self.is_verified:
                try:
                    await run_all(self._fetcher.run(), self._writer.run())
                except DigestMismatchError:
                    has_peers = await self.source.bar_peers()
                    if self.generation or not (has_peers or self.transfer_count > 1):
                        raise
                    # The transfers may have delivered parts of different blobs.
                    await self._start_over()
        except StorageError as error:
            self._stop_storing(error)

    async def _start_over(self) -> None:
        """Discard all bytes and fetch the blob once more, in one transfer, bypassing the mirrors."""
        log.info("download_restarted", digest=str(self.digest), upstream=self.source.upstream_name)
        self._drop_chunks()
        self.size = None
        self.pieces = PieceMap()
        self.written = RangeSet()
        self.hashed = self.bytes_resumed = 0
        self.generation += 1
        self._fetcher = Fetcher(self, expected_size=0)
        self._notify()
        await self._writer.reset()

    async def _commit(self) -> bool:
        with span("commit"):
            return await run_uncancelled(self._writer.commit())

    def _stop_storing(self, error: StorageError) -> None:
        reason: UncachedReason = "disk_error"
        if isinstance(error, NoSpaceError):
            reason = self._deps.storage.space.uncached_reason(self.size or 0)
        self._deps.storage.metrics.count_uncached(reason)
        log.warning("store_bypassed", digest=str(self.digest), reason=str(error))
        self.hashed = self._writer.rewind_to_written()
        self.has_stopped_storing = True
        self._drop_chunks()

    def _drop_chunks(self) -> None:
        chunks, self.chunks = self.chunks, []
        for chunk in chunks:
            self._deps.pool.give_back(chunk.buffer)

    def _close_if_unused(self) -> None:
        if not self._is_running and not self.reader_count:
            self._writer.close()
