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
from proxy.server.ranges import Window
from proxy.storage.blobs import OpenBlob

# The most that one connection sends before others have their turn.
TURN = 2 << 20
# Whether the file is in memory is asked once for so many bytes, as asking for each turn costs a tenth of the sending.
# What is not is the work of a thread, this much at a time.
AHEAD = 4 * TURN
# What is read and encrypted at a time. It stays in the processor's cache, and a client that does not read holds two.
PIECE = 64 << 10
# How many of those before others have their turn.
COPY_TURN = 4 * PIECE

# What a file system fails with; everything else a connection does.
_DISK_ERRORS = (errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ESTALE, errno.ENODATA)

UNREADABLE = "the disk cannot be read"
SHRUNK = "a file in the store is shorter than it was"
LEFT = "the client has left"


# A reader that takes nothing for so long is dropped, in seconds.
READER_TIMEOUT = 60.0

_BYTES_ACKED = struct.Struct("=120xQ")  # tcpi_bytes_acked in Linux's struct tcp_info


class Watch:
    """Calls `on_silence` if a client takes nothing for a minute, unless it is cancelled before.

    A full buffer alone does not tell: whoever reads a megabyte in two minutes leaves it full for that long.
    """

    __slots__ = ("_on_silence", "_taken", "_timer", "_transport")

    def __init__(self, transport: asyncio.BaseTransport, on_silence: Callable[[], object]) -> None:
        self._transport = transport
        self._on_silence = on_silence
        # Most waits end at once, so nothing is asked of the system before half of the time is over.
        self._taken = -1
        self._wait()

    def cancel(self) -> None:
        """End the watch."""
        self._timer.cancel()

    def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(READER_TIMEOUT / 2, self._look)

    def _look(self) -> None:
        taken = _bytes_taken(self._transport)
        if taken == self._taken:
            self._on_silence()
            return
        self._taken = taken
        self._wait()


def _bytes_taken(transport: asyncio.BaseTransport) -> int:
    """Return how many bytes the other end of a TCP connection has acknowledged; 0 where nobody counts."""
    connection = transport.get_extra_info("socket")
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
    except OSError:
        return 0
    return int(_BYTES_ACKED.unpack(info)[0]) if len(info) == _BYTES_ACKED.size else 0


def duplicate(transport: asyncio.Transport) -> socket.socket:
    """Return the socket of a connection once more: uvloop does not lend its own."""
    own = transport.get_extra_info("socket")
    copy = socket.socket(own.family, own.type, own.proto, fileno=os.dup(own.fileno()))
    copy.setblocking(False)
    return copy


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a file, and the head that is sent before it. `threads` read or send what is not in memory."""

    fd: int
    window: Window
    threads: Executor
    head: bytes = b""


class _Way(ABC):
    """How a part of a file gets to a client. `offset` is how far it has come.

    For what is not in memory a thread waits: the event loop does not wait for the disk.
    """

    def __init__(self, transport: asyncio.Transport, part: Part) -> None:
        self.offset = part.window.start
        self._transport = transport
        self._fd = part.fd
        self._stop = part.window.stop
        self._threads = part.threads
        self._head = part.head
        # Up to where the file was found to be in memory.
        self._known = self.offset
        self._is_in_thread = False
        self._ended: Callable[[Exception | None], None] | None = None

    def start(self, ended: Callable[[Exception | None], None]) -> None:
        """Send, and call `ended` when all was sent, with None, or with what has prevented it.

        That is `StorageError`, or `ConnectionError` if the client leaves, or reads nothing for a minute.
        """
        self._ended = ended
        self._go_on()

    def stop(self) -> None:
        """Send nothing more; `ended` is not called any more."""
        self._ended = None

    def resume(self) -> None:  # noqa: B027 (not every way is told)
        """Go on: the transport takes more."""

    def _go_on(self) -> None:
        """Send what can be sent now, but not more than a turn; see that it goes on."""
        if self._ended is None or self._is_in_thread:
            return
        try:
            if self.offset >= self._stop:
                self._end(None)
            elif count := self._count_ready():
                self._send(count)
            else:
                self._send_from_disk()
        except OSError as error:
            self._fail(error)

    @abstractmethod
    def _send(self, count: int) -> None:
        """Send what can be sent now of so many bytes, which are in memory."""

    @abstractmethod
    def _send_from_disk(self) -> None:
        """Have a thread read or send what comes next, which is not in memory."""

    def _fail(self, error: OSError) -> None:
        is_disk = error.errno in _DISK_ERRORS
        self._end(StorageError(UNREADABLE) if is_disk else ConnectionResetError(LEFT))

    def _end(self, problem: Exception | None) -> None:
        ended = self._ended
        self.stop()
        if ended:
            ended(problem)

    # The disk.

    def _count_ready(self) -> int:
        """Return how many of the next bytes are in memory, a turn at most; 0 if they have to be read."""
        if self.offset >= self._known:
            ahead = min(self._stop, self.offset + AHEAD)
            if not (is_cached(self._fd, self.offset) and is_cached(self._fd, ahead - 1)):
                return 0
            self._known = ahead
        return min(self._known - self.offset, TURN)

    def _in_thread(
        self, work: Callable[[int, int, int], int], count: int, done: Callable[[int], None]
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

        self._is_in_thread = True
        working = asyncio.get_running_loop().run_in_executor(self._threads, run)
        working.add_done_callback(partial(self._is_done, done))

    def _is_done(self, done: Callable[[int], None], working: "asyncio.Future[int]") -> None:
        self._is_in_thread = False
        error = working.exception()
        if self._ended is None:
            return
        if isinstance(error, OSError):
            self._fail(error)
        else:
            done(working.result())


class Flow(_Way):
    """The kernel sends the file on a socket that does not block, as the client takes it."""

    def __init__(self, connection: socket.socket, transport: asyncio.Transport, part: Part) -> None:
        super().__init__(transport, part)
        self._connection = connection
        self._watch: Watch | None = None

    def stop(self) -> None:
        """Send nothing more; `ended` is not called any more."""
        super().stop()
        self._rest()

    def _send(self, count: int) -> None:
        if self._send_head():
            self._have_sent(_sendfile(self._connection.fileno(), self._fd, self.offset, count))

    def _send_from_disk(self) -> None:
        if not self._send_head():
            return
        self._rest()
        connection = self._connection.dup()  # which may be closed meanwhile, too

        def send(file: int, offset: int, count: int) -> int:
            with connection:
                return _sendfile(connection.fileno(), file, offset, count)

        self._in_thread(send, min(self._stop - self.offset, AHEAD), self._have_sent)

    def _send_head(self) -> bool:
        """Tell whether the kernel has taken all of the head. It keeps it for what follows."""
        if self._head:
            with suppress(BlockingIOError):
                sent = self._connection.send(self._head, socket.MSG_MORE)
                self._head = self._head[sent:]
            if self._head:
                self._wait()
        return not self._head

    def _have_sent(self, count: int) -> None:
        self.offset += max(0, count)
        if not count:
            self._end(StorageError(SHRUNK))
        elif self.offset < self._stop:
            self._wait()
        else:
            self._end(None)

    # Waiting for the client.

    def _wait(self) -> None:
        if self._watch is None:
            self._cork(True)
            asyncio.get_running_loop().add_writer(self._connection, self._go_on)
            self._watch = Watch(self._transport, self._on_silence)

    def _rest(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
            asyncio.get_running_loop().remove_writer(self._connection)
            self._cork(False)

    def _cork(self, is_corked: bool) -> None:
        """Have the kernel send full segments only, or what is left, too (tcp(7), TCP_CORK).

        The end of each turn would be a segment of its own, which costs a single client a seventh of its speed.
        """
        with suppress(OSError):  # it may be gone
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, is_corked)

    def _on_silence(self) -> None:
        self._end(ConnectionAbortedError("the client has read nothing for a minute"))


class Copy(_Way):
    """The file goes through the transport, which encrypts it, a piece at a time while `is_paused` is false.

    When it is not any more, somebody calls `resume`.
    """

    def __init__(
        self, is_paused: Callable[[], bool], transport: asyncio.Transport, part: Part
    ) -> None:
        super().__init__(transport, part)
        self._is_paused = is_paused
        transport.set_write_buffer_limits(PIECE)

    def resume(self) -> None:
        """Go on: the transport takes more."""
        # Not within the call of the transport that says so.
        asyncio.get_running_loop().call_soon(self._go_on)

    def _send(self, count: int) -> None:
        stop = self.offset + min(count, COPY_TURN)
        while self.offset < stop and not self._is_paused():
            if self._transport.is_closing():
                raise ConnectionResetError(LEFT)
            piece = os.pread(self._fd, min(PIECE, stop - self.offset), self.offset)
            if not piece:
                self._end(StorageError(SHRUNK))
                return
            self._transport.write(self._head + piece if self._head else piece)
            self._head = b""
            self.offset += len(piece)
        if self.offset >= self._stop:
            self._end(None)
        elif not self._is_paused():
            asyncio.get_running_loop().call_soon(self._go_on)

    def _send_from_disk(self) -> None:
        self._in_thread(_read, min(self._stop - self.offset, TURN), self._have_read)

    def _have_read(self, stop: int) -> None:
        self._known = stop
        self._go_on()


@dataclass(slots=True)
class Delivery:
    """A whole blob that is sent in answer to a request, after `head`. It closes the blob in the end."""

    head: bytes
    blob: OpenBlob
    threads: Executor
    note: Callable[[int, Exception | None], None]
    """Is told how many bytes of the blob were sent, and what has prevented more."""
    _way: _Way | None = field(default=None, init=False)
    _connection: socket.socket | None = field(default=None, init=False)

    def start(
        self,
        transport: asyncio.Transport,
        is_paused: Callable[[], bool],
        done: Callable[[bool], None],
    ) -> None:
        """Send it on a connection; `done` is told whether all was sent.

        The kernel sends it, unless it is to be encrypted, or the transport still has to write what comes before.
        """
        part = Part(self.blob.fd, Window(0, self.blob.size), self.threads, self.head)
        if not (transport.get_extra_info("sslcontext") or transport.get_write_buffer_size()):
            with suppress(OSError):  # no descriptor to spare
                self._connection = duplicate(transport)
        if self._connection:
            self._way = Flow(self._connection, transport, part)
        else:
            self._way = Copy(is_paused, transport, part)
        self._way.start(partial(self._end, done))

    def resume(self) -> None:
        """Go on: the transport takes more."""
        if self._way:
            self._way.resume()

    def cancel(self) -> None:
        """Send nothing more: the connection is gone."""
        if self._way:
            self._way.stop()
            self._close(ConnectionResetError(LEFT))

    def _end(self, done: Callable[[bool], None], problem: Exception | None) -> None:
        self._close(problem)
        done(problem is None)

    def _close(self, problem: Exception | None) -> None:
        if self._way:
            way, self._way = self._way, None
            self.blob.close()
            if self._connection:
                self._connection.close()
            self.note(way.offset, problem)


def _read(fd: int, offset: int, count: int) -> int:
    """Read a part of a file, so that it is in memory; return where it ends."""
    os.pread(fd, count, offset)
    return offset + count


def _sendfile(connection: int, fd: int, offset: int, count: int) -> int:
    """Return how many bytes the kernel has taken; -1 if it takes none now, 0 if there are none."""
    try:
        return os.sendfile(connection, fd, offset, count)
    except BlockingIOError:
        return -1


def is_cached(fd: int, offset: int) -> bool:
    """Tell whether the byte at `offset` is in memory; where nobody can tell, hope that it is."""
    try:
        return bool(os.preadv(fd, (bytearray(1),), offset, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    except OSError:
        return True
