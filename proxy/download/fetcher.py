"""The worker that receives a download's bytes from upstream, over one or more connections.

Each connection claims the next unclaimed bytes until all have arrived. The first one learns the blob's size
and whether upstream supports ranges; more are added if the blob is large and one connection is not fast.
If a connection fails, the others take over its piece; if the last one fails, its error ends the download.
"""

import asyncio
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from proxy.download.pieces import MAX_PIECE, OPEN_END, Piece
from proxy.errors import (
    DigestMismatchError,
    OfflineError,
    ProxyError,
    RateLimitedError,
    StorageError,
    UnknownBlobError,
    UnsatisfiableRangeError,
    UpstreamDownError,
    UpstreamError,
    UpstreamUnavailableError,
)
from proxy.upstream.body import BlobBody
from proxy.upstream.network import retry
from proxy.upstream.peers import PeerBody

if TYPE_CHECKING:
    from proxy.download.download import Download

# Fewer bytes than this are not progress: a few bytes per attempt must not keep a download alive forever.
MIN_PROGRESS = 16 << 10
# Upper bound on a wait before a retry, in seconds, whatever Retry-After upstream sends.
MAX_RETRY_AFTER = 60.0
# A smaller range that a reader waits for is extended to this size.
MIN_PRIORITY_PIECE = 256 << 10
# A connection that is fast on its own claims this many times the bytes that have arrived.
PIECE_GROWTH = 3
# How often the speed of a single connection is measured, in seconds.
SPEED_INTERVAL = 0.1


class _RangeNotSupportedError(UpstreamError):
    """Upstream sends the whole blob in response to a range while other connections fetch the rest."""


class Fetcher:
    """Receives the bytes of a download. `expected_size` is the size that a manifest states, or None."""

    def __init__(self, download: "Download", expected_size: int | None) -> None:
        self._download = download
        self._source = download.source
        self._settings = settings = download.settings
        is_small = expected_size is not None and expected_size <= settings.parallel_above
        # There is one connection until upstream has responded. The response to its request, for the blob or
        # for the first piece, shows whether upstream supports ranges.
        self._max_connections = 1 if is_small else settings.connections_per_blob
        self.is_parallel = False
        self._has_extra_connections = False
        self._active_connections = 0
        self._priority_count = 0
        self._start_connection: Callable[[Piece | None], None] | None = None
        self._bytes_received = 0
        self._speed_timer: asyncio.TimerHandle | None = None
        self._finished = asyncio.Event()
        self._piece_released = asyncio.Event()
        self._failure: ProxyError | None = None

    async def run(self) -> None:
        """Return when all bytes have arrived. Raises the `ProxyError` that ends the download."""
        tasks = []
        async with asyncio.TaskGroup() as group:

            def start(priority_piece: Piece | None) -> None:
                self._active_connections += 1
                tasks.append(group.create_task(self._fetch_pieces(priority_piece)))

            self._start_connection = start
            start(None)
            try:
                await self._finished.wait()
            finally:
                self._start_connection = None
                if self._speed_timer:
                    self._speed_timer.cancel()
            for task in tasks:
                task.cancel()
        if self._failure:
            raise self._failure

    def prioritize(self, offset: int, stop: int) -> None:
        """Fetch the bytes from `offset` up to `stop` before their turn, on a connection added for them.

        This does nothing before the blob is fetched in parallel, or if all such connections are in use.
        """
        if not self.is_parallel or not self._start_connection:
            return
        if self._priority_count < self._settings.connections_per_blob:
            stop = max(stop, offset + MIN_PRIORITY_PIECE)
            if piece := self._download.pieces.claim_at(offset, stop):
                self._priority_count += 1
                self._start_connection(piece)

    async def _fetch_pieces(self, priority_piece: Piece | None) -> None:
        """Fetch unclaimed pieces, or only `priority_piece`, until all bytes have arrived."""
        try:
            if priority_piece:
                await self._fetch_piece(priority_piece)
                self._priority_count -= 1
            # After a priority piece, continue only if no other connection is left.
            while not self._download.is_received and (
                not priority_piece or self._active_connections == 1
            ):
                if piece := self._claim_piece():
                    await self._fetch_piece(piece)
                else:
                    await self._piece_released.wait()
        except (StorageError, DigestMismatchError) as error:
            self._fail(error)
        except (UpstreamError, UnknownBlobError) as error:
            if self._active_connections == 1:
                self._fail(error)
        finally:
            self._active_connections -= 1
            if self._download.is_received:
                self._finished.set()

    def _claim_piece(self) -> Piece | None:
        pieces = self._download.pieces
        if self.is_parallel and not self._has_extra_connections:
            # Few requests, because the connection idles between them; yet others can join if it slows down.
            return pieces.claim_up_to(max(MAX_PIECE, PIECE_GROWTH * self._bytes_received))
        return pieces.claim_next(self._max_connections)

    def _fail(self, error: ProxyError) -> None:
        self._failure = self._failure or error
        self._finished.set()

    async def _fetch_piece(self, piece: Piece) -> None:
        """Fetch a piece; bytes of it that do not arrive may be claimed again."""
        try:
            await self._fetch_with_retries(piece)
        finally:
            self._download.pieces.release(piece)
            self._piece_released.set()
            self._piece_released.clear()

    async def _fetch_with_retries(self, piece: Piece) -> None:
        """Repeat transfers, with pauses, until a piece is complete. Gives up if there is no progress."""
        pauses: Iterator[float] = iter(())
        reached = -MIN_PROGRESS
        while piece.start < piece.stop and not self._download.is_received:
            try:
                await self._fetch_once(piece)
            except UnsatisfiableRangeError as error:
                self._handle_unsatisfiable_range(piece, error)
            except (UpstreamError, UnknownBlobError) as error:
                if await self._source.leave_peer(error):
                    continue
                if piece.start >= reached + MIN_PROGRESS:
                    # After progress, a transfer gets as many attempts as a new one.
                    pauses = retry.backoff_delays(
                        self._settings.attempts, iter(random.random, None)
                    )
                    reached = piece.start
                pause = next(pauses, None)
                if pause is None or self._is_permanent(error):
                    raise
                if isinstance(error, (UpstreamDownError, RateLimitedError)):
                    pause = max(pause, min(error.retry_after, MAX_RETRY_AFTER))
                self._source.record_retry(piece.start, error)
                await asyncio.sleep(pause)

    def _is_permanent(self, error: ProxyError) -> bool:
        """Tell whether a retry is pointless.

        Before the first byte, a refusal by upstream is final. Later the cause may be temporary, such as an
        expired signed URL, or a limit on connections, in which case the other connections continue.
        """
        is_refusal = not isinstance(error, UpstreamUnavailableError) or isinstance(
            error, UpstreamDownError
        )
        is_first = not self._download.pieces.received
        return isinstance(error, OfflineError) or (
            is_refusal and (is_first or self._active_connections > 1)
        )

    async def _fetch_once(self, piece: Piece) -> None:
        """Make one transfer of the missing bytes of a piece."""
        download = self._download
        stop = None if piece.stop >= download.pieces.size else piece.stop
        await download.ticket.admit_request()
        try:
            is_only = self._active_connections == 1
            async with self._source.open(piece.start, stop, is_only_connection=is_only) as body:
                await download.ticket.admit_download()
                download.transfer_count += 1
                self._handle_response_head(body, piece)
                await self._receive(body, piece)
        finally:
            download.ticket.end_request()
        if piece.stop == OPEN_END:
            self._end_at_frontier()
        elif piece.start < piece.stop and not download.is_received:
            raise UpstreamUnavailableError(
                f"{self._source.upstream_name} ended a response before its last byte"
            )

    def _handle_response_head(self, body: BlobBody, piece: Piece) -> None:
        """Learn the blob's size from a response head, and whether upstream supports ranges."""
        if body.size is not None:
            self._download.set_size(body.size)
        if isinstance(body, PeerBody):
            self._max_connections = 1
            self._download.pieces.extend(piece)
        elif body.is_partial and body.size is not None:
            self._add_connections(body.size)
        elif self._active_connections > 1:
            raise _RangeNotSupportedError(f"{self._source.upstream_name} does not support ranges")
        else:
            self._max_connections = 1
            if not body.is_partial:
                self._download.pieces.extend_to_end(piece)

    async def _receive(self, body: BlobBody, piece: Piece) -> None:
        """Read the bytes of a piece, into one buffer after another."""
        download = self._download
        await self._source.skip_to(body, piece.start)
        while piece.start < piece.stop:
            chunk = await download.open_chunk(piece)
            try:
                while piece.start < piece.stop and not chunk.is_full:
                    room = chunk.buffer[chunk.stop - chunk.start :]
                    count = await self._source.read_into(body, room[: piece.stop - piece.start])
                    if not count:
                        return
                    # The piece may have become shorter during the read: see `PieceMap.claim_at`.
                    count = min(count, piece.stop - piece.start)
                    self._bytes_received += count
                    download.append(piece, chunk, count)
            finally:
                download.close_chunk(chunk)

    def _add_connections(self, size: int) -> None:
        """Add connections if the blob is large enough, now that upstream has sent a range."""
        if size <= self._settings.parallel_above:
            self._max_connections = 1
        elif self._max_connections > 1 and not self.is_parallel:
            self.is_parallel = True
            if size < self._settings.parallel_max_rate * SPEED_INTERVAL:
                self._start_remaining_connections()
            else:
                self._schedule_measurement()

    def _schedule_measurement(self) -> None:
        loop = asyncio.get_running_loop()
        self._speed_timer = loop.call_later(
            SPEED_INTERVAL, self._measure_speed, loop.time(), self._bytes_received
        )

    def _measure_speed(self, started: float, bytes_before: int) -> None:
        """Start the other connections, unless one is so fast that more would not help."""
        seconds = asyncio.get_running_loop().time() - started
        if self._bytes_received - bytes_before < self._settings.parallel_max_rate * seconds:
            self._start_remaining_connections()
        else:
            self._schedule_measurement()

    def _start_remaining_connections(self) -> None:
        self._has_extra_connections = True
        for _ in range(self._max_connections - self._active_connections):
            if self._start_connection:
                self._start_connection(None)

    def _handle_unsatisfiable_range(self, piece: Piece, error: ProxyError) -> None:
        """Handle a 416: the blob is empty, ends at this offset, or upstream sends another blob."""
        if self._download.size is not None:
            raise self._source.record_mismatch() from error
        if piece.start == 0 and self._max_connections > 1:
            # An empty blob has no satisfiable range.
            self._max_connections = 1
            self._download.pieces.extend_to_end(piece)
        else:
            self._end_at_frontier()

    def _end_at_frontier(self) -> None:
        """Treat the received bytes as the whole blob: without a size, only the digest can tell."""
        self._download.set_size(self._download.pieces.received.contiguous_end(0))
