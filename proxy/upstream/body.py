"""The bytes of a blob as upstream sends them, read directly into the caller's buffer.

aiohttp reads the head of a response, but its body reader creates an object for each read of the
socket. If the length of a body is known, `DirectReader` therefore replaces aiohttp's protocol on
the connection, lets the kernel (or OpenSSL) fill the caller's buffer, and gives the connection back
at the end.
"""

import asyncio
from contextlib import suppress

from aiohttp import ClientResponse, ServerDisconnectedError, StreamReader, hdrs
from aiohttp.connector import Connection

from proxy.errors import UpstreamError, UpstreamTimeoutError
from proxy.oci.digest import Digest
from proxy.upstream.encoding import gunzip
from proxy.upstream.errors import map_errors
from proxy.upstream.network import retry

# A read collects this many bytes, as each read costs a turn of the loop. The first read returns at
# once, because a client may be waiting for the first bytes.
BATCH_SIZE = 512 << 10
# How long bytes that have arrived may wait for a full batch, in seconds.
BATCH_DELAY = 0.005
# The buffer for bytes that arrive while no caller reads (`DirectReader.get_buffer`).
_OVERFLOW_SIZE = 4 << 10
# Larger blobs are not decoded, in bytes: they are layers, not configs.
MAX_ENCODED_BLOB = 4 << 20
# The most that a mirror's first read takes (`BlobBody.read_first_bytes`).
_FIRST_SIZE = 64 << 10


class BlobBody:
    """The bytes of a blob from `offset` on. `size` is that of the whole blob, None if unknown.

    `is_partial` means that upstream sends the requested range, not the whole blob.
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
        self._reader: StreamBodyReader | DirectReader | None = None
        self._first = b""

    async def read_first_bytes(self, limit: float) -> None:
        """Wait `limit` seconds for the first bytes, or raise `UpstreamError`."""
        buffer = memoryview(bytearray(_FIRST_SIZE))
        with map_errors(self._label):
            async with asyncio.timeout(limit):
                self._first = bytes(buffer[: await self._read(buffer)])

    async def undo_encoding(self, digest: Digest) -> None:
        """Decode a small blob, such as a config, that upstream has gzip-encoded on its way.

        A blob in gzip format stays as it is: only the digest tells the two apart. Raises
        `UpstreamError`.
        """
        content = bytearray()
        buffer = memoryview(bytearray(_FIRST_SIZE))
        while len(content) <= MAX_ENCODED_BLOB:
            with map_errors(self._label):
                count = await self._read(buffer)
            if not count:
                break
            content += buffer[:count]
        else:
            self._first = bytes(content)
            return
        self._first = bytes(content)
        if not _has_digest(self._first, digest):
            with suppress(UpstreamError):
                decoded = await asyncio.to_thread(gunzip, self._first, MAX_ENCODED_BLOB)
                if _has_digest(decoded, digest):
                    self._first, self.size, self.is_partial = decoded, len(decoded), False

    async def read_into(self, buffer: memoryview) -> int:
        """Read the next bytes into `buffer`, which is not empty; return their number, 0 at the end.

        Raises `UpstreamError` if the transfer breaks, stalls, or falls below the minimum rate. Only
        time spent waiting for upstream counts towards the rate.
        """
        if self._first:
            count = min(len(self._first), len(buffer))
            buffer[:count], self._first = self._first[:count], self._first[count:]
            return count
        now = asyncio.get_running_loop().time
        began = now()
        with map_errors(self._label):
            count = await self._read(buffer)
        if count and self._rate_monitor.is_too_slow(count, now() - began):
            raise UpstreamTimeoutError(f"{self._label} sends too slowly: {self._rate_monitor}")
        return count

    async def _read(self, buffer: memoryview) -> int:
        if self._reader is None:
            self._reader = _create_reader(self._response, self._stall_timeout)
        return await self._reader.read_into(buffer)


class StreamBodyReader:
    """Reads a body through aiohttp: one that arrived with its head, or whose length is unknown.

    `buffered` holds the bytes that have been read already.
    """

    def __init__(self, content: StreamReader, buffered: bytes) -> None:
        self._content = content
        self._unread = memoryview(buffered)
        self._is_first = not buffered

    async def read_into(self, buffer: memoryview) -> int:
        """Read bytes that have arrived; return their number, 0 at the end. Raises aiohttp's errors."""
        if not self._unread:
            self._unread = memoryview(await self._read_batch())
        count = min(len(self._unread), len(buffer))
        buffer[:count], self._unread = self._unread[:count], self._unread[count:]
        return count

    async def _read_batch(self) -> bytes:
        content = self._content
        data = await content.readany()
        if len(data) < BATCH_SIZE and not self._is_first and not content.is_eof():
            # Upstream may send chunks of a byte.
            await asyncio.sleep(BATCH_DELAY)
            if not content.exception():
                data += content.read_nowait()
        self._is_first = False
        return data


class DirectReader(asyncio.BufferedProtocol):
    """Reads the last `bytes_left` of a body in place of aiohttp's protocol, after `buffered`.

    The transport reads only while a caller waits in `read_into`, into that caller's buffer.
    """

    def __init__(
        self,
        connection: Connection,
        content: StreamReader,
        buffered: bytes,
        bytes_left: int,
        stall_timeout: float,
    ) -> None:
        assert connection.transport is not None
        assert connection.protocol is not None
        self._content = content
        self._transport = transport = connection.transport
        self._aiohttp_protocol = connection.protocol
        self._stall_timeout = stall_timeout
        self._buffered = memoryview(buffered)
        self._bytes_left = bytes_left
        self._buffer: memoryview | None = None
        self._count = 0
        # Bytes that arrived while no caller was waiting: aiohttp resumes the transport when it
        # releases an earlier body of this connection that it has received completely.
        self._overflow = bytearray()
        self._overflow_buffer = memoryview(bytearray(_OVERFLOW_SIZE))
        self._is_connection_lost = False
        self._is_first = not buffered
        self._data_available = asyncio.Event()
        self._batch_ready = asyncio.Event()
        self._aiohttp_protocol.pause_reading()  # also stops aiohttp's own read timeout
        transport.set_protocol(self)

    async def read_into(self, buffer: memoryview) -> int:
        """Read bytes that have arrived; return their number, 0 at the end. Raises aiohttp's errors."""
        if self._buffered:
            count = min(len(self._buffered), len(buffer))
            buffer[:count], self._buffered = self._buffered[:count], self._buffered[count:]
            return count
        if self._overflow:
            count = min(len(self._overflow), len(buffer))
            buffer[:count] = self._overflow[:count]
            del self._overflow[:count]
        elif not self._bytes_left:
            return 0
        else:
            if not self._is_connection_lost:
                await self._fill(buffer[: self._bytes_left])
            count, self._count = self._count, 0
            if not count:
                raise self._content.exception() or ServerDisconnectedError
        if not (self._bytes_left or self._overflow or self._is_connection_lost):
            # aiohttp may reuse the connection.
            self._transport.set_protocol(self._aiohttp_protocol)
            self._content.feed_eof()
        return count

    async def _fill(self, buffer: memoryview) -> None:
        """Let the transport fill `buffer` until a batch has arrived or `BATCH_DELAY` is over."""
        self._buffer = buffer
        self._data_available.clear()
        self._batch_ready.clear()
        self._transport.resume_reading()
        try:
            async with asyncio.timeout(self._stall_timeout):
                await self._data_available.wait()
            if not self._is_first and not self._batch_ready.is_set():
                timer = asyncio.get_running_loop().call_later(BATCH_DELAY, self._batch_ready.set)
                try:
                    await self._batch_ready.wait()
                finally:
                    timer.cancel()
            self._is_first = False
        finally:
            self._buffer = None
            if not self._is_connection_lost:
                self._transport.pause_reading()

    # Called by the transport.

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Return the buffer to read into: never empty, and not larger than the rest of the body."""
        if self._buffer is None or self._count == len(self._buffer):
            return self._overflow_buffer[: max(1, self._bytes_left)]
        return self._buffer[self._count :]

    def buffer_updated(self, nbytes: int) -> None:
        """Count the bytes that were read; close the connection if they exceed the body."""
        if nbytes > self._bytes_left:
            self._transport.abort()  # bytes beyond the body, which no request asked for
            return
        self._bytes_left -= nbytes
        if self._buffer is None or self._count == len(self._buffer):
            self._overflow += self._overflow_buffer[:nbytes]
            self._transport.pause_reading()
            return
        self._count += nbytes
        self._data_available.set()
        is_full = self._count == len(self._buffer)
        if self._count >= BATCH_SIZE or is_full:
            self._batch_ready.set()
        if is_full:
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass the event to aiohttp, which sets the exception that `read_into` raises."""
        self._aiohttp_protocol.connection_lost(exc)
        self._is_connection_lost = True
        self._data_available.set()
        self._batch_ready.set()


def _has_digest(content: bytes, digest: Digest) -> bool:
    hasher = digest.new_hasher()
    hasher.update(content)
    return digest.matches(hasher)


def _create_reader(
    response: ClientResponse, stall_timeout: float
) -> StreamBodyReader | DirectReader:
    content, length = response.content, response.content_length
    buffered = b"".join(iter(content.read_nowait, b""))
    # aiohttp releases a connection when the body is complete.
    connection = response.connection
    is_chunked = length is None or hdrs.TRANSFER_ENCODING in response.headers
    if length is None or is_chunked or not connection or length <= len(buffered):
        return StreamBodyReader(content, buffered)
    return DirectReader(connection, content, buffered, length - len(buffered), stall_timeout)
