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
from proxy.upstream.errors import translated

# What comes is taken in batches of half a buffer or more, since each costs calls of threads. A whole buffer and the rest
# waits in the kernel: the network is then faster than the disk. Memory is used as far as a batch fills it.
BUFFER = 2 << 20
# The same where a blob has several connections: each is slow, or there would be one.
SHARED_BUFFER = 512 << 10
# And where every reader has a transfer of its own, and there may be thousands.
SMALL_BUFFER = 64 << 10
# How long a slow link may hold up what has arrived, in seconds, for the sake of a larger batch.
LINGER = 0.005


class Transfer:
    """The bytes of a blob, from `offset` on. `size` is the whole blob's, None if upstream is mute.

    `is_ranged` says that upstream sends the part that was asked for, not the whole. It stands still
    if nothing comes for `stall` seconds. `buffer` bytes are read ahead, twice; it may be set before the first.
    """

    def __init__(
        self,
        response: ClientResponse,
        peer: str,
        offset: int,
        size: int | None,
        *,
        stall: float,
        floor: retry.Floor,
    ) -> None:
        self._response = response
        self._peer = peer
        self._stall = stall
        self._floor = floor
        self.offset = offset
        self.size = size
        self.is_ranged = response.status == 206
        self.buffer = BUFFER
        self._body: _Parsed | _Direct | None = None
        self._first: memoryview | None = None

    async def begin(self, patience: float) -> None:
        """Wait so many seconds for the first bytes, or raise `UpstreamError`."""
        with translated(self._peer):
            async with asyncio.timeout(patience):
                self._first = await self._take()

    async def chunks(self) -> AsyncIterator[memoryview]:
        """Yield what has arrived, the first bytes at once; more arrives while it is worked with.

        What is yielded is overwritten after the next step. Raises `UpstreamError` when the transfer
        breaks, stands still, or drips. Only the time that we wait for upstream counts: our own slowness
        is not its fault.
        """
        now = asyncio.get_running_loop().time
        if self._first:
            yield self._first
        while True:
            began = now()
            with translated(self._peer):
                chunk = await self._take()
            if not chunk:
                return
            if self._floor.is_missed(len(chunk), now() - began):
                raise UpstreamTimeoutError(f"{self._peer} sends too slowly: {self._floor}")
            yield chunk

    async def _take(self) -> memoryview:
        if self._body is None:
            self._body = _body_of(self._response, self._stall, self.buffer)
        return await self._body.take()


class _Parsed:
    """A body as aiohttp reads it: one that came with its head, or whose length is not known.

    What is `early` has been read of it already.
    """

    def __init__(self, content: StreamReader, early: list[memoryview], buffer: int) -> None:
        self._content = content
        self._early = early
        self._batch = buffer // 2
        self._is_first = True

    async def take(self) -> memoryview:
        """Return what has arrived; nothing at the end. Raises what aiohttp raises."""
        if self._early:
            self._is_first = False
            return self._early.pop(0)
        content = self._content
        data = await content.readany()
        if len(data) < self._batch and not self._is_first and not content.is_eof():
            # Upstream may send chunks of a byte.
            await asyncio.sleep(LINGER)
            if not content.exception():
                data += content.read_nowait()
        self._is_first = False
        return memoryview(data)


class _Direct(asyncio.BufferedProtocol):
    """A body, of which `left` bytes are still to come, read in the place of aiohttp's protocol."""

    def __init__(
        self,
        connection: Connection,
        content: StreamReader,
        early: list[memoryview],
        left: int,
        stall: float,
        buffer: int,
    ) -> None:
        assert connection.transport is not None
        assert connection.protocol is not None
        self._content = content
        self._transport = transport = connection.transport
        self._handler = handler = connection.protocol
        self._stall = stall
        self._early = early
        self._left = left
        # The first bytes go on at once, and not too many of them: somebody may wait for these.
        self._buffer = _memory(min(SMALL_BUFFER, left))
        self._other = _memory(min(buffer, left))
        self._size = 0
        self._is_paused = False
        self._is_lost = False
        self._is_first = True
        self._some = asyncio.Event()
        self._enough = asyncio.Event()
        handler.pause_reading()  # which ends its own timeout, too
        transport.set_protocol(self)
        transport.resume_reading()

    async def take(self) -> memoryview:
        """Return what has arrived; nothing at the end. Raises what aiohttp raises."""
        if self._early:
            self._is_first = False
            return self._early.pop(0)
        if self._left or self._size:
            await self._arrival()
        if not self._size:
            if self._left:
                raise self._content.exception() or ServerDisconnectedError
            return self._buffer[:0]
        taken = self._swap()
        if not self._left:
            self._give_back()
        elif not self._is_lost:
            self._some.clear()
            self._enough.clear()
            if self._is_paused:
                self._is_paused = False
                self._transport.resume_reading()
        return taken

    def _swap(self) -> memoryview:
        """Return what is in the buffer, and fill the other."""
        taken, self._size = self._buffer[: self._size], 0
        self._buffer, self._other = self._other, self._buffer
        if len(self._other) < len(self._buffer):
            # After the first bytes.
            self._other = _memory(len(self._buffer))
        return taken

    async def _arrival(self) -> None:
        """Wait for bytes, or for the end; a little longer for more of them."""
        if not self._some.is_set():
            async with asyncio.timeout(self._stall):
                await self._some.wait()
        if not self._is_first and not self._enough.is_set():
            timer = asyncio.get_running_loop().call_later(LINGER, self._enough.set)
            await self._enough.wait()
            timer.cancel()
        self._is_first = False

    def _give_back(self) -> None:
        """Let the connection be used again."""
        if not self._is_lost:
            self._transport.set_protocol(self._handler)
            self._content.feed_eof()

    # Called by the transport.

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Return where to read into: never beyond the end of the body."""
        return self._buffer[self._size : self._size + self._left]

    def buffer_updated(self, nbytes: int) -> None:
        """Count what was read."""
        self._size += nbytes
        self._left -= nbytes
        self._some.set()
        is_full = self._size == len(self._buffer) or not self._left
        if self._size >= len(self._buffer) // 2 or is_full:
            self._enough.set()
        if is_full:
            self._is_paused = True
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell aiohttp, which then knows what to call it."""
        self._handler.connection_lost(exc)
        self._is_lost = True
        self._some.set()
        self._enough.set()


def _memory(size: int) -> memoryview:
    """Return a buffer that takes memory only as far as it is filled; a bytearray is filled with zeros."""
    return memoryview(mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _body_of(response: ClientResponse, stall: float, buffer: int) -> _Parsed | _Direct:
    content, length = response.content, response.content_length
    read = memoryview(b"".join(iter(content.read_nowait, b"")))
    # Somebody may wait for the first bytes: few are written and hashed sooner than many.
    early = [part for part in (read[:SMALL_BUFFER], read[SMALL_BUFFER:]) if part]
    # A connection that has been let go has delivered everything.
    if length is None or hdrs.TRANSFER_ENCODING in response.headers or not response.connection:
        return _Parsed(content, early, buffer)
    return _Direct(response.connection, content, early, length - len(read), stall, buffer)
