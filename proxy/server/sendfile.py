"""A file on its way to a client: the kernel sends it, as the client takes it.

One callback a time that the client has room, and no task until the end: a large blob has thousands of them.
"""

import asyncio
import errno
import os
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from proxy.errors import StorageError
from proxy.server.ranges import ByteRange
from proxy.storage.blobs import OpenBlob

# The most that one connection sends before others have their turn.
SEND_SIZE = 2 << 20
# Whether the file is in memory is asked once for so many bytes, as asking for each turn costs a tenth of the sending.
# What is not is the work of a thread, this much at a time.
READAHEAD_SIZE = 4 * SEND_SIZE
# What is read and encrypted at a time. It stays in the processor's cache, and a client that does not read holds two.
COPY_CHUNK_SIZE = 64 << 10
# How many of those before others have their turn.
COPY_SIZE = 4 * COPY_CHUNK_SIZE

# What a file system fails with; everything else a connection does.
_DISK_ERRNOS = (errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ESTALE, errno.ENODATA)

DISK_UNREADABLE = "the disk cannot be read"
FILE_TRUNCATED = "a file in the store is shorter than it was"
CLIENT_DISCONNECTED = "the client has left"


# A reader that takes nothing for so long is dropped, in seconds.
STALL_TIMEOUT = 60.0

_TCP_INFO_BYTES_ACKED = struct.Struct("=120xQ")  # tcpi_bytes_acked in Linux's struct tcp_info


class StallTimer:
    """Calls `on_silence` if a client takes nothing for a minute, unless it is cancelled before.

    A full buffer alone does not tell: whoever reads a megabyte in two minutes leaves it full for that long.
    """

    __slots__ = ("_last_acked", "_on_stall", "_timer", "_transport")

    def __init__(self, transport: asyncio.BaseTransport, on_stall: Callable[[], object]) -> None:
        self._transport = transport
        self._on_stall = on_stall
        # Most waits end at once, so nothing is asked of the system before half of the time is over.
        self._last_acked = -1
        self._schedule()

    def cancel(self) -> None:
        """End the watch."""
        self._timer.cancel()

    def _schedule(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(STALL_TIMEOUT / 2, self._check)

    def _check(self) -> None:
        taken = _bytes_acked(self._transport)
        if taken == self._last_acked:
            self._on_stall()
            return
        self._last_acked = taken
        self._schedule()


def _bytes_acked(transport: asyncio.BaseTransport) -> int:
    """Return how many bytes the other end of a TCP connection has acknowledged; 0 where nobody counts."""
    connection = transport.get_extra_info("socket")
    try:
        info = connection.getsockopt(
            socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES_ACKED.size
        )
    except OSError:
        return 0
    return (
        int(_TCP_INFO_BYTES_ACKED.unpack(info)[0]) if len(info) == _TCP_INFO_BYTES_ACKED.size else 0
    )


def duplicate_socket(transport: asyncio.Transport) -> socket.socket:
    """Return the socket of a connection once more: uvloop does not lend its own."""
    own = transport.get_extra_info("socket")
    copy = socket.socket(own.family, own.type, own.proto, fileno=os.dup(own.fileno()))
    copy.setblocking(False)
    return copy


@dataclass(frozen=True, slots=True)
class FileRange:
    """A part of a file, and the head that is sent before it. `threads` read or send what is not in memory."""

    fd: int
    byte_range: ByteRange
    threads: Executor
    head: bytes = b""


class FileSend(ABC):
    """How a part of a file gets to a client. `offset` is how far it has come.

    For what is not in memory a thread waits: the event loop does not wait for the disk.
    """

    def __init__(self, transport: asyncio.Transport, file_range: FileRange) -> None:
        self.offset = file_range.byte_range.start
        self._transport = transport
        self._fd = file_range.fd
        self._stop = file_range.byte_range.stop
        self._threads = file_range.threads
        self._head = file_range.head
        # Up to where the file was found to be in memory.
        self._resident_end = self.offset
        self._is_thread_running = False
        self._on_end: Callable[[Exception | None], None] | None = None

    def start(self, on_end: Callable[[Exception | None], None]) -> None:
        """Send, and call `ended` when all was sent, with None, or with what has prevented it.

        That is `StorageError`, or `ConnectionError` if the client leaves, or reads nothing for a minute.
        """
        self._on_end = on_end
        self._send_next()

    def stop(self) -> None:
        """Send nothing more; `ended` is not called any more."""
        self._on_end = None

    def resume(self) -> None:  # noqa: B027 (not every way is told)
        """Go on: the transport takes more."""

    def _send_next(self) -> None:
        """Send what can be sent now, but not more than a turn; see that it goes on."""
        if self._on_end is None or self._is_thread_running:
            return
        try:
            if self.offset >= self._stop:
                self._finish(None)
            elif count := self._count_resident():
                self._send_from_memory(count)
            else:
                self._send_from_disk()
        except OSError as error:
            self._fail(error)

    @abstractmethod
    def _send_from_memory(self, count: int) -> None:
        """Send what can be sent now of so many bytes, which are in memory."""

    @abstractmethod
    def _send_from_disk(self) -> None:
        """Have a thread read or send what comes next, which is not in memory."""

    def _fail(self, error: OSError) -> None:
        is_disk = error.errno in _DISK_ERRNOS
        self._finish(
            StorageError(DISK_UNREADABLE) if is_disk else ConnectionResetError(CLIENT_DISCONNECTED)
        )

    def _finish(self, error: Exception | None) -> None:
        ended = self._on_end
        self.stop()
        if ended:
            ended(error)

    # The disk.

    def _count_resident(self) -> int:
        """Return how many of the next bytes are in memory, a turn at most; 0 if they have to be read."""
        if self.offset >= self._resident_end:
            ahead = min(self._stop, self.offset + READAHEAD_SIZE)
            if not (is_resident(self._fd, self.offset) and is_resident(self._fd, ahead - 1)):
                return 0
            self._resident_end = ahead
        return min(self._resident_end - self.offset, SEND_SIZE)

    def _run_in_thread(
        self, work: Callable[[int, int, int], int], count: int, on_done: Callable[[int], None]
    ) -> None:
        """Have a thread do `work` with a descriptor of its own, as the file may be closed meanwhile; then go on.

        It is given the descriptor, the offset and `count`; `done` gets what it returns.
        """
        file = os.dup(self._fd)

        def run() -> int:
            try:
                return work(file, self.offset, count)
            finally:
                os.close(file)

        self._is_thread_running = True
        working = asyncio.get_running_loop().run_in_executor(self._threads, run)
        working.add_done_callback(partial(self._on_thread_done, on_done))

    def _on_thread_done(
        self, on_done: Callable[[int], None], future: "asyncio.Future[int]"
    ) -> None:
        self._is_thread_running = False
        error = future.exception()
        if self._on_end is None:
            return
        if isinstance(error, OSError):
            self._fail(error)
        else:
            on_done(future.result())


class SendfileTask(FileSend):
    """The kernel sends the file on a socket that does not block, as the client takes it."""

    def __init__(
        self, connection: socket.socket, transport: asyncio.Transport, file_range: FileRange
    ) -> None:
        super().__init__(transport, file_range)
        self._connection = connection
        self._stall_timer: StallTimer | None = None

    def stop(self) -> None:
        """Send nothing more; `ended` is not called any more."""
        super().stop()
        self._stop_waiting()

    def _send_from_memory(self, count: int) -> None:
        if self._send_head():
            self._on_sent(_sendfile(self._connection.fileno(), self._fd, self.offset, count))

    def _send_from_disk(self) -> None:
        if not self._send_head():
            return
        self._stop_waiting()
        connection = self._connection.dup()  # which may be closed meanwhile, too

        def send(file: int, offset: int, count: int) -> int:
            with connection:
                return _sendfile(connection.fileno(), file, offset, count)

        self._run_in_thread(send, min(self._stop - self.offset, READAHEAD_SIZE), self._on_sent)

    def _send_head(self) -> bool:
        """Tell whether the kernel has taken all of the head. It keeps it for what follows."""
        if self._head:
            with suppress(BlockingIOError):
                sent = self._connection.send(self._head, socket.MSG_MORE)
                self._head = self._head[sent:]
            if self._head:
                self._wait_writable()
        return not self._head

    def _on_sent(self, count: int) -> None:
        self.offset += max(0, count)
        if not count:
            self._finish(StorageError(FILE_TRUNCATED))
        elif self.offset < self._stop:
            self._wait_writable()
        else:
            self._finish(None)

    # Waiting for the client.

    def _wait_writable(self) -> None:
        if self._stall_timer is None:
            self._set_cork(True)
            asyncio.get_running_loop().add_writer(self._connection, self._send_next)
            self._stall_timer = StallTimer(self._transport, self._on_stall)

    def _stop_waiting(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
            asyncio.get_running_loop().remove_writer(self._connection)
            self._set_cork(False)

    def _set_cork(self, is_corked: bool) -> None:
        """Have the kernel send full segments only, or what is left, too (tcp(7), TCP_CORK).

        The end of each turn would be a segment of its own, which costs a single client a seventh of its speed.
        """
        with suppress(OSError):  # it may be gone
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, is_corked)

    def _on_stall(self) -> None:
        self._finish(ConnectionAbortedError("the client has read nothing for a minute"))


class CopyTask(FileSend):
    """The file goes through the transport, which encrypts it, a piece at a time while `is_paused` is false.

    When it is not any more, somebody calls `resume`.
    """

    def __init__(
        self, is_paused: Callable[[], bool], transport: asyncio.Transport, file_range: FileRange
    ) -> None:
        super().__init__(transport, file_range)
        self._is_paused = is_paused
        transport.set_write_buffer_limits(COPY_CHUNK_SIZE)

    def resume(self) -> None:
        """Go on: the transport takes more."""
        # Not within the call of the transport that says so.
        asyncio.get_running_loop().call_soon(self._send_next)

    def _send_from_memory(self, count: int) -> None:
        stop = self.offset + min(count, COPY_SIZE)
        while self.offset < stop and not self._is_paused():
            if self._transport.is_closing():
                raise ConnectionResetError(CLIENT_DISCONNECTED)
            piece = os.pread(self._fd, min(COPY_CHUNK_SIZE, stop - self.offset), self.offset)
            if not piece:
                self._finish(StorageError(FILE_TRUNCATED))
                return
            self._transport.write(self._head + piece if self._head else piece)
            self._head = b""
            self.offset += len(piece)
        if self.offset >= self._stop:
            self._finish(None)
        elif not self._is_paused():
            asyncio.get_running_loop().call_soon(self._send_next)

    def _send_from_disk(self) -> None:
        self._run_in_thread(_read_ahead, min(self._stop - self.offset, SEND_SIZE), self._on_read)

    def _on_read(self, resident_end: int) -> None:
        self._resident_end = resident_end
        self._send_next()


@dataclass(slots=True)
class BlobResponse:
    """A whole blob that is sent in answer to a request, after `head`. It closes the blob in the end."""

    head: bytes
    blob: OpenBlob
    threads: Executor
    on_end: Callable[[int, Exception | None], None]
    """Is told how many bytes of the blob were sent, and what has prevented more."""
    _file_send: FileSend | None = field(default=None, init=False)
    _connection: socket.socket | None = field(default=None, init=False)

    def start(
        self,
        transport: asyncio.Transport,
        is_paused: Callable[[], bool],
        on_done: Callable[[bool], None],
    ) -> None:
        """Send it on a connection; `done` is told whether all was sent.

        The kernel sends it, unless it is to be encrypted, or the transport still has to write what comes before.
        """
        part = FileRange(self.blob.fd, ByteRange(0, self.blob.size), self.threads, self.head)
        if not (transport.get_extra_info("sslcontext") or transport.get_write_buffer_size()):
            with suppress(OSError):  # no descriptor to spare
                self._connection = duplicate_socket(transport)
        if self._connection:
            self._file_send = SendfileTask(self._connection, transport, part)
        else:
            self._file_send = CopyTask(is_paused, transport, part)
        self._file_send.start(partial(self._finish, on_done))

    def resume(self) -> None:
        """Go on: the transport takes more."""
        if self._file_send:
            self._file_send.resume()

    def cancel(self) -> None:
        """Send nothing more: the connection is gone."""
        if self._file_send:
            self._file_send.stop()
            self._close(ConnectionResetError(CLIENT_DISCONNECTED))

    def _finish(self, on_done: Callable[[bool], None], error: Exception | None) -> None:
        self._close(error)
        on_done(error is None)

    def _close(self, error: Exception | None) -> None:
        if self._file_send:
            way, self._file_send = self._file_send, None
            self.blob.close()
            if self._connection:
                self._connection.close()
            self.on_end(way.offset, error)


def _read_ahead(fd: int, offset: int, count: int) -> int:
    """Read a part of a file, so that it is in memory; return where it ends."""
    os.pread(fd, count, offset)
    return offset + count


def _sendfile(connection: int, fd: int, offset: int, count: int) -> int:
    """Return how many bytes the kernel has taken; -1 if it takes none now, 0 if there are none."""
    try:
        return os.sendfile(connection, fd, offset, count)
    except BlockingIOError:
        return -1


def is_resident(fd: int, offset: int) -> bool:
    """Tell whether the byte at `offset` is in memory; where nobody can tell, hope that it is."""
    try:
        return bool(os.preadv(fd, (bytearray(1),), offset, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    except OSError:
        return True
