"""The bytes of a blob as upstream sends them, without a copy of them made on the way.

aiohttp reads the head of an answer, and its reader of bodies makes an object of every read of the
socket. Where the length of a body is known we therefore take its place at the connection, let the
kernel (or OpenSSL) fill two buffers by turns, and give the connection back at the end.
"""

import asyncio
import mmap
from collections.abc import AsyncIterator

from aiohttp import ClientResponse, ServerDisconnectedError, StreamReader, hdrs
from aiohttp.connector import Connection

from proxy.errors import UpstreamTimeoutError
from proxy.upstream import retry
from proxy.upstream.errors import map_errors

# What comes is taken in batches of half a buffer or more, since each costs calls of threads. A whole buffer and the rest
# waits in the kernel: the network is then faster than the disk. Memory is used as far as a batch fills it.
BUFFER_SIZE = 2 << 20
# The same where a blob has several connections: each is slow, or there would be one.
SHARED_BUFFER_SIZE = 512 << 10
# And where every reader has a transfer of its own, and there may be thousands.
SMALL_BUFFER_SIZE = 64 << 10
# How much a read takes that finds the buffer full (`DirectReader.get_buffer`).
OVERFLOW_SIZE = 4 << 10
# How long a slow link may hold up what has arrived, in seconds, for the sake of a larger batch.
BATCH_DELAY = 0.005


class BlobBody:
    """The bytes of a blob, from `offset` on. `size` is the whole blob's, None if upstream is mute.

    `is_ranged` says that upstream sends the part that was asked for, not the whole. It stands still
    if nothing comes for `stall` seconds. `buffer` bytes are read ahead, twice; it may be set before the first.
    """

    def __init__(
        self,
        response: ClientResponse,
        label: str,
        offset: int,
        size: int | None,
        *,
        stall_timeout: float,
        rate_monitor: retry.MinRateMonitor,
    ) -> None:
        self._response = response
        self._label = label
        self._stall_timeout = stall_timeout
        self._rate_monitor = rate_monitor
        self.offset = offset
        self.size = size
        self.is_partial = response.status == 206
        self.buffer_size = BUFFER_SIZE
        self._reader: StreamBodyReader | DirectReader | None = None
        self._first_chunk: memoryview | None = None

    async def read_first_chunk(self, limit: float) -> None:
        """Wait so many seconds for the first bytes, or raise `UpstreamError`."""
        with map_errors(self._label):
            async with asyncio.timeout(limit):
                self._first_chunk = await self._read()

    async def iter_chunks(self) -> AsyncIterator[memoryview]:
        """Yield what has arrived, the first bytes at once; more arrives while it is worked with.

        What is yielded is overwritten after the next step. Raises `UpstreamError` when the transfer
        breaks, stands still, or drips. Only the time that we wait for upstream counts: our own slowness
        is not its fault.
        """
        now = asyncio.get_running_loop().time
        if self._first_chunk:
            yield self._first_chunk
        while True:
            began = now()
            with map_errors(self._label):
                chunk = await self._read()
            if not chunk:
                return
            if self._rate_monitor.is_too_slow(len(chunk), now() - began):
                raise UpstreamTimeoutError(f"{self._label} sends too slowly: {self._rate_monitor}")
            yield chunk

    async def _read(self) -> memoryview:
        if self._reader is None:
            self._reader = _create_reader(self._response, self._stall_timeout, self.buffer_size)
        return await self._reader.read()


class StreamBodyReader:
    """A body as aiohttp reads it: one that came with its head, or whose length is not known.

    What is `early` has been read of it already.
    """

    def __init__(
        self, content: StreamReader, initial_chunks: list[memoryview], buffer_size: int
    ) -> None:
        self._content = content
        self._initial_chunks = initial_chunks
        self._min_batch_size = buffer_size // 2
        self._is_first_chunk = True

    async def read(self) -> memoryview:
        """Return what has arrived; nothing at the end. Raises what aiohttp raises."""
        if self._initial_chunks:
            self._is_first_chunk = False
            return self._initial_chunks.pop(0)
        content = self._content
        data = await content.readany()
        if len(data) < self._min_batch_size and not self._is_first_chunk and not content.is_eof():
            # Upstream may send chunks of a byte.
            await asyncio.sleep(BATCH_DELAY)
            if not content.exception():
                data += content.read_nowait()
        self._is_first_chunk = False
        return memoryview(data)


class DirectReader(asyncio.BufferedProtocol):
    """A body, of which `left` bytes are still to come, read in the place of aiohttp's protocol."""

    def __init__(
        self,
        connection: Connection,
        content: StreamReader,
        initial_chunks: list[memoryview],
        bytes_left: int,
        stall_timeout: float,
        buffer_size: int,
    ) -> None:
        assert connection.transport is not None
        assert connection.protocol is not None
        self._content = content
        self._transport = transport = connection.transport
        self._aiohttp_protocol = handler = connection.protocol
        self._stall_timeout = stall_timeout
        self._initial_chunks = initial_chunks
        self._bytes_left = bytes_left
        # The first bytes go on at once, and not too many of them: somebody may wait for these.
        self._buffer = _allocate_buffer(min(SMALL_BUFFER_SIZE, bytes_left))
        self._spare_buffer = _allocate_buffer(min(buffer_size, bytes_left))
        self._bytes_buffered = 0
        # What arrived although the buffer was full: aiohttp resumes the transport when an earlier body
        # of this connection, received whole, is taken out of its memory.
        self._overflow = bytearray()
        self._overflow_buffer = memoryview(bytearray(OVERFLOW_SIZE))
        self._is_paused = False
        self._is_connection_lost = False
        self._is_first_chunk = True
        self._data_available = asyncio.Event()
        self._batch_ready = asyncio.Event()
        handler.pause_reading()  # which ends its own timeout, too
        transport.set_protocol(self)
        transport.resume_reading()

    async def read(self) -> memoryview:
        """Return what has arrived; nothing at the end. Raises what aiohttp raises."""
        if self._initial_chunks:
            self._is_first_chunk = False
            return self._initial_chunks.pop(0)
        if self._bytes_left or self._bytes_buffered:
            await self._wait_for_data()
        if not self._bytes_buffered:
            if self._bytes_left:
                raise self._content.exception() or ServerDisconnectedError
            return self._buffer[:0]
        taken = self._swap_buffers()
        if not (self._bytes_left or self._bytes_buffered):
            self._return_connection()
        elif not self._is_connection_lost:
            if not self._bytes_buffered:
                self._data_available.clear()
            self._batch_ready.clear()
            self._resume_reading()
        return taken

    def _resume_reading(self) -> None:
        if self._is_paused and self._bytes_left and self._bytes_buffered < len(self._buffer):
            self._is_paused = False
            self._transport.resume_reading()

    def _swap_buffers(self) -> memoryview:
        """Return what is in the buffer, and fill the other."""
        taken, self._bytes_buffered = self._buffer[: self._bytes_buffered], 0
        self._buffer, self._spare_buffer = self._spare_buffer, self._buffer
        if len(self._spare_buffer) < len(self._buffer):
            # After the first bytes.
            self._spare_buffer = _allocate_buffer(len(self._buffer))
        size = min(len(self._overflow), len(self._buffer))
        self._buffer[:size] = self._overflow[:size]
        del self._overflow[:size]
        self._bytes_buffered = size
        return taken

    async def _wait_for_data(self) -> None:
        """Wait for bytes, or for the end; a little longer for more of them."""
        if not self._data_available.is_set():
            async with asyncio.timeout(self._stall_timeout):
                await self._data_available.wait()
        if not self._is_first_chunk and not self._batch_ready.is_set():
            timer = asyncio.get_running_loop().call_later(BATCH_DELAY, self._batch_ready.set)
            await self._batch_ready.wait()
            timer.cancel()
        self._is_first_chunk = False

    def _return_connection(self) -> None:
        """Let the connection be used again."""
        if not self._is_connection_lost:
            self._transport.set_protocol(self._aiohttp_protocol)
            self._content.feed_eof()

    # Called by the transport.

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Return where to read into; uvloop closes the connection if that is an empty buffer."""
        free = self._buffer[self._bytes_buffered : self._bytes_buffered + self._bytes_left]
        return free or self._overflow_buffer[: self._bytes_left or None]

    def buffer_updated(self, nbytes: int) -> None:
        """Count what was read."""
        if self._is_paused:
            self._transport.pause_reading()
            if self._bytes_left:
                self._overflow += self._overflow_buffer[:nbytes]
                self._bytes_left -= nbytes
            else:  # upstream has sent more than it announced
                self._aiohttp_protocol.close()
            return
        self._bytes_buffered += nbytes
        self._bytes_left -= nbytes
        self._data_available.set()
        is_full = self._bytes_buffered == len(self._buffer) or not self._bytes_left
        if self._bytes_buffered >= len(self._buffer) // 2 or is_full:
            self._batch_ready.set()
        if is_full:
            self._is_paused = True
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell aiohttp, which then knows what to call it."""
        self._aiohttp_protocol.connection_lost(exc)
        self._is_connection_lost = True
        self._data_available.set()
        self._batch_ready.set()


def _allocate_buffer(size: int) -> memoryview:
    """Return a buffer that takes memory only as far as it is filled; a bytearray is filled with zeros."""
    return memoryview(mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _create_reader(
    response: ClientResponse, stall_timeout: float, buffer_size: int
) -> StreamBodyReader | DirectReader:
    content, length = response.content, response.content_length
    read = memoryview(b"".join(iter(content.read_nowait, b"")))
    # Somebody may wait for the first bytes: few are written and hashed sooner than many.
    early = [part for part in (read[:SMALL_BUFFER_SIZE], read[SMALL_BUFFER_SIZE:]) if part]
    # A connection that has been let go has delivered everything.
    if length is None or hdrs.TRANSFER_ENCODING in response.headers or not response.connection:
        return StreamBodyReader(content, early, buffer_size)
    return DirectReader(
        response.connection, content, early, length - len(read), stall_timeout, buffer_size
    )
