"""Sending the body of a response, from memory and ranges of files, as fast as the client takes it.

On a plain connection the kernel takes the bytes from the file (`os.sendfile`) or from memory, on a
duplicate of the connection's socket, because uvloop does not implement sendfile and does not expose its
socket. For TLS and bodies of unknown length, and if no descriptor is left for the duplicate, the bytes
are copied through the transport.
"""

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path

from proxy.concurrency import run_in_thread
from proxy.errors import StorageError
from proxy.server.ranges import ByteRange
from proxy.server.responses import Body, BodySource, FileBody
from proxy.server.send_turns import SENDFILE_SPEEDUP, SendTurns
from proxy.storage.blobs import FileRange

# The most that one connection sends in its turn.
SEND_SIZE = 2 << 20
# The page cache is checked once per this many bytes: a check per turn would cost a tenth of the sending.
# A thread reads non-resident bytes, this many at a time.
READAHEAD_SIZE = 4 * SEND_SIZE
# Bytes read and encrypted at a time: they stay in the processor's cache, and a client that does not read
# occupies two such chunks of memory.
COPY_CHUNK_SIZE = 64 << 10
# Bytes that one connection copies in its turn.
COPY_SIZE = 4 * COPY_CHUNK_SIZE
# A client that takes no bytes for this long is disconnected, in seconds; it is looked at so often meanwhile.
STALL_TIMEOUT = 60.0
STALL_CHECKS = 4

# Errors of the file system in sendfile(2); all others are of the connection.
_DISK_ERRNOS = (errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ESTALE, errno.ENODATA)

DISK_UNREADABLE = "the disk cannot be read"
FILE_TRUNCATED = "a file in the store is shorter than it was"
CLIENT_DISCONNECTED = "the client has disconnected"
CLIENT_STALLED = "the client has read nothing for a minute"

_TCP_INFO_BYTES_ACKED = struct.Struct("=120xQ")  # tcpi_bytes_acked in Linux's struct tcp_info


class StallTimer:
    """Calls `on_stall` once a client has taken no bytes for `STALL_TIMEOUT`, unless cancelled before.

    A full buffer does not prove a stall: a client that reads a megabyte in two minutes leaves it full for
    that long. So the timer compares the bytes that the client has acknowledged.
    """

    __slots__ = ("_last_acked", "_on_stall", "_timer", "_transport", "_unchanged")

    def __init__(self, transport: asyncio.BaseTransport, on_stall: Callable[[], object]) -> None:
        self._transport = transport
        self._on_stall = on_stall
        self.restart()
        self._schedule()

    def restart(self) -> None:
        """Begin to watch anew. Costs next to nothing, as most waits are short."""
        # How often the acknowledged bytes were found unchanged.
        self._last_acked, self._unchanged = -1, 0

    def cancel(self) -> None:
        """Stop watching."""
        self._timer.cancel()

    def _schedule(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(STALL_TIMEOUT / STALL_CHECKS, self._check)

    def _check(self) -> None:
        acked = _bytes_acked(self._transport)
        self._unchanged = self._unchanged + 1 if acked == self._last_acked else 0
        self._last_acked = acked
        if self._unchanged == STALL_CHECKS:
            self._on_stall()
        else:
            self._schedule()


def _bytes_acked(transport: asyncio.BaseTransport) -> int:
    """Return how many bytes the peer of a TCP connection has acknowledged; 0 on other sockets."""
    connection = transport.get_extra_info("socket")
    try:
        info = connection.getsockopt(
            socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES_ACKED.size
        )
    except OSError:
        return 0
    is_complete = len(info) == _TCP_INFO_BYTES_ACKED.size
    return int(_TCP_INFO_BYTES_ACKED.unpack(info)[0]) if is_complete else 0


class BodySender:
    """Sends the body of one response. `bytes_sent` counts the bytes of the body, without framing."""

    def __init__(
        self,
        transport: asyncio.Transport,
        writer: "SocketWriter | None",
        drain: Callable[[], Awaitable[None]],
        threads: Executor,
        turns: SendTurns,
    ) -> None:
        """Initialize the sender; without a `writer`, all bytes are copied through the transport.

        `drain` waits until the transport takes more, and raises `ConnectionError` if it is closed.
        """
        self.bytes_sent = 0
        # The part of the head that the kernel has not taken, once some of it was sent.
        self._unsent_head: memoryview | None = None
        self._transport = transport
        self._writer = writer
        self._drain = drain
        self._threads = threads
        self._turns = turns
        # Up to this offset, the current file was found in memory.
        self._resident_end = 0

    def can_send_now(self, body: FileBody) -> bool:
        """Tell whether the kernel may take all of a file at once, as it does with most blobs."""
        if self._writer is None or self._transport.get_write_buffer_size():
            return False
        blob = body.blob
        return self._count_resident(blob.fd, 0, blob.size) == blob.size

    def send_now(self, head: bytes, body: FileBody) -> bool:
        """Send what the kernel takes of a file; tell whether that was all. If not, call `send`."""
        writer, blob = self._writer, body.blob
        assert writer is not None
        # An error is raised again by `send`.
        with suppress(ConnectionError, StorageError):
            self._unsent_head = memoryview(head)[writer.send_now(head, socket.MSG_MORE) :]
            if not self._unsent_head:
                self.bytes_sent = writer.sendfile(blob.fd, 0, blob.size)
        return self.bytes_sent == blob.size

    async def send(self, head: bytes, body: Body | FileBody) -> None:
        """Send the head of a response, and its body as it arrives.

        Raises `ConnectionError` if the client disconnects or stalls, `ProxyError` if the body is cut short.
        """
        if body.length is None:
            assert isinstance(body, Body)
            await self._send_in_chunks(head, body.source)
        elif self._writer is None:
            await self._send_through_transport(head, body)
        else:
            await self._send_on_socket(self._writer, head, body)

    async def send_copied(self, head: bytes, content: bytes) -> None:
        """Send the head of a response and a body in memory, which several slow clients may share.

        Raises `ConnectionError`.
        """
        self._transport.write(head)
        await self._copy_memory(content)

    # By the kernel.

    async def _send_on_socket(
        self, writer: "SocketWriter", head: bytes, body: Body | FileBody
    ) -> None:
        await self._flush_transport()
        unsent = memoryview(head) if self._unsent_head is None else self._unsent_head
        try:
            await writer.send(unsent, socket.MSG_MORE if body.length else 0)
            if isinstance(body, FileBody):
                await self._send_file(writer, body.range_from(self.bytes_sent))
                return
            for segment in body.segments:
                if isinstance(segment, ByteRange):
                    await self._send_range(writer, body.source, segment)
                else:
                    await writer.send(memoryview(segment), 0)
                    self.bytes_sent += len(segment)
        finally:
            writer.stop_waiting()

    async def _send_range(
        self, writer: "SocketWriter", source: BodySource, byte_range: ByteRange
    ) -> None:
        offset = byte_range.start
        granted = 0
        while offset < byte_range.stop:
            # The source may take long: the kernel must send its last segment, and this is no stall.
            writer.stop_waiting()
            part = await source.next(offset, byte_range.stop)
            if isinstance(part, FileRange):
                await self._send_file(writer, part)
                offset = part.stop
                continue
            if not granted:
                granted = min(len(part), SEND_SIZE)
                if await self._turns.take(granted):
                    continue  # the source may have reused the memory
            part = part[:granted]
            granted = 0
            sent = writer.send_now(part, 0)
            self.bytes_sent += sent
            offset += sent
            if sent < len(part):
                await writer.wait_writable()

    async def _send_file(self, writer: "SocketWriter", part: FileRange) -> None:
        offset = self._resident_end = part.start
        while offset < part.stop:
            count = self._count_resident(part.fd, offset, part.stop)
            if count:
                await self._turns.take(count // SENDFILE_SPEEDUP)
                sent = writer.sendfile(part.fd, offset, count)
            else:
                writer.stop_waiting()  # a slow disk is no stall
                count = min(part.stop - offset, READAHEAD_SIZE)
                sent = await writer.sendfile_from_disk(self._threads, part.fd, offset, count)
            offset += sent
            self.bytes_sent += sent
            if offset < part.stop:
                await writer.wait_writable()

    async def _flush_transport(self) -> None:
        """Wait until the kernel has all bytes written to the transport before."""
        transport = self._transport
        if not transport.get_write_buffer_size():
            return
        low, high = transport.get_write_buffer_limits()
        transport.set_write_buffer_limits(0)
        try:
            while transport.get_write_buffer_size():
                await self._drain()
                # uvloop writes at the end of a turn.
                await asyncio.sleep(0)
        finally:
            transport.set_write_buffer_limits(high, low)

    # Through the transport.

    async def _send_through_transport(self, head: bytes, body: Body | FileBody) -> None:
        self._transport.set_write_buffer_limits(COPY_CHUNK_SIZE)
        self._transport.write(head)
        if isinstance(body, FileBody):
            await self._copy_file(body.range_from(0))
            return
        for segment in body.segments:
            if not isinstance(segment, ByteRange):
                await self._write(segment)
                continue
            offset = segment.start
            while offset < segment.stop:
                part = await body.source.next(offset, segment.stop)
                offset += await self._copy_part(part)

    async def _send_in_chunks(self, head: bytes, source: BodySource) -> None:
        """Send a body of unknown length in chunks (RFC 9112 section 7.1).

        The last chunk is sent only if the source ends without an error.
        """
        transport = self._transport
        transport.set_write_buffer_limits(COPY_CHUNK_SIZE)
        transport.write(head)
        offset = 0
        while True:
            part = await source.next(offset)
            if isinstance(part, FileRange):
                length = part.stop - part.start
            else:
                part = part[:COPY_CHUNK_SIZE]
                length = len(part)
            if not length:
                break
            transport.write(b"%x\r\n" % length)
            offset += await self._copy_part(part)
            transport.write(b"\r\n")
        transport.write(b"0\r\n\r\n")

    async def _copy_part(self, part: memoryview | FileRange) -> int:
        """Send a part, or the beginning of one in memory; return the number of bytes sent."""
        if isinstance(part, FileRange):
            await self._copy_file(part)
            return part.stop - part.start
        # A copy, because the transport keeps unsent bytes and the source reuses its memory.
        piece = bytes(part[:COPY_CHUNK_SIZE])
        await self._turns.take(len(piece))
        await self._write(piece)
        return len(piece)

    async def _copy_memory(self, content: bytes) -> None:
        view = memoryview(content)
        for start in range(0, len(view), COPY_CHUNK_SIZE):
            await self._turns.take(COPY_CHUNK_SIZE)
            await self._write(view[start : start + COPY_CHUNK_SIZE])

    async def _copy_file(self, part: FileRange) -> None:
        offset = self._resident_end = part.start
        while offset < part.stop:
            count = min(COPY_SIZE, self._count_resident(part.fd, offset, part.stop))
            if not count:
                await self._load(part.fd, offset, part.stop)
                continue
            end = offset + count
            await self._turns.take(count)
            while offset < end:
                piece = _read(part.fd, min(COPY_CHUNK_SIZE, end - offset), offset)
                await self._write(piece)
                offset += len(piece)

    async def _write(self, piece: bytes | memoryview) -> None:
        self._transport.write(piece)
        self.bytes_sent += len(piece)
        await self._drain()

    # The disk.

    def _count_resident(self, fd: int, offset: int, stop: int) -> int:
        """Return how many next bytes are in memory, `SEND_SIZE` at most; 0 if a thread must read."""
        if offset >= self._resident_end:
            ahead = min(stop, offset + READAHEAD_SIZE)
            if not (is_resident(fd, offset) and is_resident(fd, ahead - 1)):
                return 0
            self._resident_end = ahead
        return min(self._resident_end - offset, SEND_SIZE)

    async def _load(self, fd: int, offset: int, stop: int) -> None:
        """Read the next bytes into memory in a thread. Raises `StorageError`."""
        count = min(stop - offset, READAHEAD_SIZE)
        # The file may be closed before the thread is done, if the client leaves.
        copy = os.dup(fd)
        try:
            await run_in_thread(self._threads, _load_and_close, copy, offset, count)
        except OSError as error:
            raise StorageError(DISK_UNREADABLE) from error
        self._resident_end = offset + count


class SocketWriter:
    """Sends on a non-blocking socket, and waits until it takes more."""

    def __init__(self, connection: socket.socket, transport: asyncio.Transport) -> None:
        self._connection = connection
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._is_watched = False
        self._stall_timer: StallTimer | None = None

    @classmethod
    def open(cls, transport: asyncio.Transport) -> "SocketWriter | None":
        """Return a writer on a duplicate of the connection's socket; None if the kernel cannot send on it."""
        if transport.get_extra_info("sslcontext"):
            return None
        with suppress(OSError):  # no descriptor is left
            return cls(duplicate_socket(transport), transport)
        return None

    def close(self) -> None:
        """Close the duplicate."""
        self._connection.close()

    async def send(self, data: memoryview, flags: int) -> None:
        """Send all of `data`. Raises `ConnectionError`."""
        while data:
            data = data[self.send_now(data, flags) :]
            if data:
                await self.wait_writable()

    def send_now(self, data: bytes | memoryview, flags: int) -> int:
        """Send without waiting; return how many bytes the kernel took. Raises `ConnectionError`."""
        try:
            return self._connection.send(data[:SEND_SIZE], flags)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ConnectionResetError(CLIENT_DISCONNECTED) from error

    def sendfile(self, fd: int, offset: int, count: int) -> int:
        """Send bytes of a file without waiting; return how many bytes the kernel took.

        Raises `ConnectionError`, and `StorageError` if the file cannot be read or is too short.
        """
        return _sendfile(self._connection.fileno(), fd, offset, count)

    async def sendfile_from_disk(self, threads: Executor, fd: int, offset: int, count: int) -> int:
        """Send bytes of a file as `sendfile` does, in a thread that waits for the disk."""
        # Both may be closed before the thread is done, if the client leaves.
        connection = os.dup(self._connection.fileno())
        try:
            file = os.dup(fd)
        except OSError:
            os.close(connection)
            raise
        return await run_in_thread(threads, _send_from_disk, connection, file, offset, count)

    async def wait_writable(self) -> None:
        """Wait until the socket takes more. Raises `ConnectionError` if the client stalls."""
        if self._stall_timer is None:
            self._set_cork(True)
            self._stall_timer = StallTimer(self._transport, self._on_stall)
        if not self._is_watched:
            self._is_watched = True
            self._loop.add_writer(self._connection, self._on_writable)
        self._waiter = self._loop.create_future()
        await self._waiter

    def stop_waiting(self) -> None:
        """Let the kernel send a partial last segment, and stop watching the client."""
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
            self._unwatch()
            self._set_cork(False)

    def _unwatch(self) -> None:
        if self._is_watched:
            self._is_watched = False
            self._loop.remove_writer(self._connection)

    def _on_writable(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)
        else:
            # The sender waits for its turn; until then the socket would be reported in every turn.
            self._unwatch()

    def _on_stall(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_exception(ConnectionAbortedError(CLIENT_STALLED))

    def _set_cork(self, is_corked: bool) -> None:
        """Set TCP_CORK (tcp(7)): while it is set, the kernel sends only full segments.

        Otherwise each turn ends in a partial segment, which costs a single client a seventh of its speed.
        """
        with suppress(OSError):  # the connection may be gone
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, is_corked)


def duplicate_socket(transport: asyncio.Transport) -> socket.socket:
    """Return a duplicate of a connection's socket. Raises `OSError` if no descriptor is left."""
    own = transport.get_extra_info("socket")
    copy = socket.socket(own.family, own.type, own.proto, fileno=os.dup(own.fileno()))
    copy.setblocking(False)
    return copy


def is_resident(fd: int, offset: int) -> bool:
    """Tell whether the byte at `offset` is in memory; True if the file system cannot tell."""
    try:
        return bool(os.preadv(fd, (bytearray(1),), offset, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    except OSError:
        return True


def _sendfile(connection: int, fd: int, offset: int, count: int) -> int:
    try:
        sent = os.sendfile(connection, fd, offset, count)
    except BlockingIOError:
        return 0
    except OSError as error:
        if error.errno in _DISK_ERRNOS:
            raise StorageError(DISK_UNREADABLE) from error
        raise ConnectionResetError(CLIENT_DISCONNECTED) from error
    if not sent:
        raise StorageError(FILE_TRUNCATED)
    return sent


def _send_from_disk(connection: int, file: int, offset: int, count: int) -> int:
    """Send a part of a file that is not in memory, and close both descriptors. Blocks."""
    try:
        return _sendfile(connection, file, offset, count)
    finally:
        os.close(file)
        os.close(connection)


def _read(fd: int, count: int, offset: int) -> bytes:
    try:
        piece = os.pread(fd, count, offset)
    except OSError as error:
        raise StorageError(DISK_UNREADABLE) from error
    if not piece:
        raise StorageError(FILE_TRUNCATED)
    return piece


def _load_and_close(fd: int, offset: int, count: int) -> None:
    """Read a part of a file into the page cache, and close the descriptor. Blocks."""
    stop = offset + count
    try:
        # The kernel reads ahead as for any `sendfile`, into large folios, and copies nothing. With
        # POSIX_FADV_WILLNEED it takes single pages, and four times the time and eight times the CPU time.
        with Path(os.devnull).open("wb") as null:
            while offset < stop and (sent := os.sendfile(null.fileno(), fd, offset, stop - offset)):
                offset += sent
    finally:
        os.close(fd)
