"""Getting the bytes of a blob from upstream, over one connection or several.

Each *fetcher* takes the next bytes that nobody has taken, until all are in. The first learns how large
the blob is and whether upstream does ranges; if it is large, and the link not fast, others join. What a
fetcher cannot get, those that are left take over; the last one's error ends the fetch.
"""

import asyncio
import random
from collections.abc import Callable, Iterator

from proxy.config import FetchSettings
from proxy.download.pieces import MAX_PIECE, OPEN_END, Piece
from proxy.download.source import BlobSource
from proxy.download.writer import BlobWriter
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
from proxy.log import get_logger
from proxy.upstream import retry
from proxy.upstream.body import SHARED_BUFFER_SIZE, BlobBody

# Less than this is no progress: a drip must not make a download last for ever.
MIN_PROGRESS = 16 << 10
# Upstream is waited for no longer than this at a time, whatever it asks for, in seconds.
MAX_RETRY_AFTER = 60.0
# A range that somebody waits for is fetched with what follows it, if it is smaller than this.
MIN_PRIORITY_PIECE = 256 << 10
# How often it is looked how fast a single connection is, in seconds.
SPEED_INTERVAL = 0.1

log = get_logger(__name__)


class _RangeNotSupportedError(UpstreamError):
    """Upstream sends all of the blob where it was asked for a part, and another fetches the rest."""


class Fetcher:
    """Fills `filling` from `source`. `expected` is the size that a manifest states, if one does.

    `is_shared` says that several connections may be at it.
    """

    def __init__(
        self,
        source: BlobSource,
        writer: BlobWriter,
        settings: FetchSettings,
        expected_size: int | None,
    ) -> None:
        self._source = source
        self._writer = writer
        self._pieces = writer.pieces
        self._settings = settings
        is_small = expected_size is not None and expected_size <= settings.parallel_above
        # Until upstream has answered one asks, for all or for a piece, which shows what it can do.
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
        """Return when the blob is verified. Raises what `Filling` raises, and `UpstreamError`."""
        tasks = []
        async with asyncio.TaskGroup() as group:

            def start(wanted: Piece | None) -> None:
                self._active_connections += 1
                tasks.append(group.create_task(self._fetch_pieces(wanted)))

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
        """Fetch the bytes from `offset` on before their turn, if there are others to go on."""
        if not self.is_parallel or not self._start_connection:
            return
        if self._priority_count < self._settings.connections_per_blob:
            span = self._pieces.claim_at(offset, max(stop, offset + MIN_PRIORITY_PIECE))
            if span:
                self._priority_count += 1
                self._start_connection(span)

    async def _fetch_pieces(self, priority_piece: Piece | None) -> None:
        """Fetch what nobody has taken, or only what is `wanted`, until all is in."""
        try:
            if priority_piece:
                await self._fetch_piece(priority_piece)
                self._priority_count -= 1
            # Who has hurried goes on only if nobody else is left to.
            while not self._writer.is_verified and (
                not priority_piece or self._active_connections == 1
            ):
                if span := self._claim_piece():
                    await self._fetch_piece(span)
                else:
                    await self._piece_released.wait()
        except (StorageError, DigestMismatchError) as error:
            self._fail(error)
        except (UpstreamError, UnknownBlobError) as error:
            if self._active_connections == 1:
                self._fail(error)
        finally:
            self._active_connections -= 1
            if self._writer.is_verified:
                self._finished.set()

    def _claim_piece(self) -> Piece | None:
        """Take what is to be fetched next."""
        if self.is_parallel and not self._has_extra_connections:
            # As much again as it has brought: few requests, and if it becomes slow, others have the rest.
            return self._pieces.claim_up_to(max(MAX_PIECE, self._bytes_received))
        return self._pieces.claim_next(self._max_connections)

    def _fail(self, error: ProxyError) -> None:
        self._failure = self._failure or error
        self._finished.set()

    async def _fetch_piece(self, piece: Piece) -> None:
        """Fetch a span; what of it does not come is given back."""
        try:
            await self._fetch_with_retries(piece)
        finally:
            self._pieces.release(piece)
            self._piece_released.set()
            self._piece_released.clear()

    async def _fetch_with_retries(self, piece: Piece) -> None:
        """Make transfers until all of a span is in; wait between them; give up without progress."""
        pauses: Iterator[float] = iter(())
        reached = -MIN_PROGRESS
        while piece.start < piece.stop and not self._writer.is_verified:
            try:
                await self._fetch_once(piece)
            except UnsatisfiableRangeError as error:
                await self._handle_unsatisfiable_range(piece, error)
            except (UpstreamError, UnknownBlobError) as error:
                if piece.start >= reached + MIN_PROGRESS:
                    # Progress makes a fetch worth as many attempts as a new one.
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
        """Tell whether asking again is of no use.

        Before the first byte upstream's no is an answer. Later it is a broken transfer, for instance a
        signed URL that has expired; or a limit on connections, where others go on.
        """
        is_no = not isinstance(error, UpstreamUnavailableError) or isinstance(
            error, UpstreamDownError
        )
        is_first = not self._pieces.has_bytes
        return isinstance(error, OfflineError) or (
            is_no and (is_first or self._active_connections > 1)
        )

    async def _fetch_once(self, piece: Piece) -> None:
        """Make one transfer of what is missing of a span."""
        filling = self._writer
        stop = None if piece.stop >= self._pieces.size else piece.stop
        async with self._source.open(piece.start, stop) as transfer:
            if self._has_extra_connections:
                transfer.buffer_size = SHARED_BUFFER_SIZE
            if transfer.size is not None:
                await filling.set_size(transfer.size)
            if transfer.is_partial and transfer.size is not None:
                self._add_connections(transfer.size)
            elif self._active_connections > 1:
                raise _RangeNotSupportedError(f"{self._source.upstream_name} does not do ranges")
            else:
                self._max_connections = 1
                if not transfer.is_partial:
                    self._pieces.extend_to_end(piece)
            await self._write_body(transfer, piece)
        if piece.stop == OPEN_END and not filling.is_verified:
            await filling.finish_at_frontier()
        elif piece.start < piece.stop and not filling.is_verified:
            raise UpstreamUnavailableError(f"{self._source.upstream_name} broke off a transfer")

    async def _write_body(self, body: BlobBody, piece: Piece) -> None:
        """Write what arrives, while more arrives."""
        async for chunk in self._source.iter_chunks(body, piece.start):
            await self._writer.write(piece, chunk)
            self._bytes_received += len(chunk)
            if piece.start >= piece.stop:
                return

    def _add_connections(self, size: int) -> None:
        """Let others join once upstream has shown that it does ranges, if the blob is worth it."""
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
        """Start others, unless one is so fast that more would cost work and bring nothing."""
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

    async def _handle_unsatisfiable_range(self, piece: Piece, error: ProxyError) -> None:
        """Upstream has nothing at this offset: the blob is empty, at its end, or another one."""
        if self._writer.size is not None:
            raise self._source.record_mismatch() from error
        if piece.start == 0 and self._max_connections > 1:
            # No range of an empty blob can be had.
            self._max_connections = 1
            self._pieces.extend_to_end(piece)
        else:
            await self._writer.finish_at_frontier()
