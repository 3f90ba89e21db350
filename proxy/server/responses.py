"""Answers, and the one routine that sends blobs: committed ones and growing ones alike.

`os.sendfile` goes out on a duplicate of the connection's socket, because uvloop has no sendfile of its
own and does not lend its descriptor. The headers leave through the transport first, whose
buffer has to be empty before the file may follow. Over TLS the bytes are read, a piece at a time, and written.
"""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from email.utils import formatdate

import msgspec
from aiohttp import hdrs
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import SERVER_SOFTWARE
from aiohttp.http_writer import _serialize_headers
from aiohttp.web import BaseRequest, Response

from proxy.cache.download import Detached, Download
from proxy.errors import ProxyError, StorageError
from proxy.flight import in_thread
from proxy.server import readers
from proxy.server.ranges import Window
from proxy.storage.local import OpenBlob

# The most that one connection sends before others have their turn.
TURN = 1 << 20
# What is read and encrypted at a time. It stays in the processor's cache, and a client that does not read holds two.
PIECE = 64 << 10

API_VERSION = "registry/2.0"

_UNREADABLE = "the disk cannot be read"
_SHRUNK = "a file in the store is shorter than it was"
_LEFT = "the client has left"


class BodyCutError(ConnectionError):
    """A body stays short, because the rest cannot be had or must not be sent.

    As a `ConnectionError` it makes the server close the connection with FIN, without a word more: clients
    then resume by range, where a reset would make them fail.
    """


def json_response(
    document: object,
    *,
    status: int = 200,
    content_type: str = "application/json",
    headers: dict[str, str] | None = None,
) -> Response:
    """Return a JSON answer with the headers that every answer has."""
    return Response(
        body=msgspec.json.encode(document),
        status=status,
        content_type=content_type,
        headers={"Docker-Distribution-Api-Version": API_VERSION, **(headers or {})},
    )


def in_bytes(response: Response, method: str) -> tuple[bytes, int]:
    """Return what aiohttp would send for a new response to a client of HTTP/1.1 that stays, and how much of it is body."""
    body = b"" if response.body is None else response.body
    assert isinstance(body, bytes)
    headers = response.headers
    if response.status != 304:
        headers[hdrs.CONTENT_LENGTH] = str(len(body))
    headers[hdrs.DATE] = formatdate(usegmt=True)
    headers[hdrs.SERVER] = SERVER_SOFTWARE
    if method == hdrs.METH_HEAD:
        body = b""
    head = _serialize_headers(f"HTTP/1.1 {response.status} {response.reason}", headers)
    return head + body, len(body)


class Sender:
    """Sends the body of one response, whose headers `writer` has been given already."""

    def __init__(
        self, request: BaseRequest, writer: AbstractStreamWriter, threads: Executor
    ) -> None:
        """Raise `ConnectionError` if the client has left already."""
        self.sent = 0
        self._writer = writer
        self._threads = threads
        if request.transport is None:
            raise ConnectionResetError(_LEFT)
        self._transport = request.transport
        # Where the kernel sends files to; None where bytes have to go through the transport.
        self._socket: int | None = None

    async def send(self, source: OpenBlob | Download, window: Window) -> None:
        """Send the bytes of the window, as they come. Raises `ConnectionError`."""
        transport = self._transport
        if transport.get_extra_info("sslcontext"):
            transport.set_write_buffer_limits(PIECE)
            await self._send_source(source, window)
            return
        await self._flush_headers(transport)
        self._socket = os.dup(transport.get_extra_info("socket").fileno())
        try:
            await self._send_source(source, window)
        finally:
            os.close(self._socket)

    async def _send_source(self, source: OpenBlob | Download, window: Window) -> None:
        try:
            if isinstance(source, OpenBlob):
                await self._send_file(source.fd, window.start, window.stop)
            else:
                await self._follow(source, window)
        except ProxyError as error:
            raise BodyCutError(str(error)) from error

    async def send_unsized(self, download: Download) -> None:
        """Send a blob of unknown size in chunks; the last of them only if the digest is right."""
        offset = 0
        try:
            while True:
                limit = await download.available(offset)
                if limit == offset:
                    break
                await self._copy_file(download.fd, offset, limit)
                offset = limit
        except Detached:
            await self._pass_through(download.pass_through(offset, None))
        except ProxyError as error:
            raise BodyCutError(str(error)) from error

    async def _follow(self, download: Download, window: Window) -> None:
        offset = window.start
        is_peek = download.is_peek(window.start, window.stop)
        try:
            while offset < window.stop:
                limit = await download.available(offset, window.stop, is_peek=is_peek)
                limit = min(limit, window.stop)
                await self._send_file(download.fd, offset, limit)
                offset = limit
        except Detached:
            await self._pass_through(download.pass_through(offset, window.stop))

    async def _pass_through(self, chunks: AsyncIterator[bytes]) -> None:
        try:
            async for chunk in chunks:
                await self._write(chunk)
        except ProxyError as error:
            raise BodyCutError(str(error)) from error

    async def _write(self, chunk: bytes) -> None:
        await self._writer.write(chunk)
        self.sent += len(chunk)

    async def _flush_headers(self, transport: asyncio.Transport) -> None:
        """Wait until nothing of this connection is left in its transport."""
        if transport.get_write_buffer_size():
            low, high = transport.get_write_buffer_limits()
            transport.set_write_buffer_limits(0)
            # The loop's turn comes before its writes do.
            await asyncio.sleep(0)
            try:
                while transport.get_write_buffer_size():
                    if transport.is_closing():
                        raise ConnectionResetError(_LEFT)
                    await self._writer.drain()
                    await asyncio.sleep(0)
            finally:
                transport.set_write_buffer_limits(high, low)

    async def _send_file(self, fd: int, offset: int, stop: int) -> None:
        if self._socket is None:
            await self._copy_file(fd, offset, stop)
            return
        flow = _Flow(self._transport, self._socket, fd, offset, stop)
        try:
            while not await flow.run():
                # The disk is slow, and sendfile would wait for it: not on the loop.
                await self._read(fd, flow.offset, flow.next)
                flow.trust()
        finally:
            self.sent += flow.offset - offset

    async def _copy_file(self, fd: int, offset: int, stop: int) -> None:
        while offset < stop:
            piece = await self._read(fd, offset, min(stop - offset, PIECE))
            if not piece:
                raise StorageError(_SHRUNK)
            await self._write(piece)
            offset += len(piece)
            await asyncio.sleep(0)

    async def _read(self, fd: int, offset: int, count: int) -> bytes:
        try:
            if _is_cached(fd, offset + count - 1):
                return os.pread(fd, count, offset)
            return await in_thread(self._threads, os.pread, fd, count, offset)
        except OSError as error:
            raise StorageError(_UNREADABLE) from error


class _Flow:
    """The kernel sends a file to a client, as it takes it, for as long as the file is in memory.

    One callback a time that the client has room, and no task until the end: a large blob has thousands of them.
    """

    def __init__(
        self, transport: asyncio.Transport, socket: int, fd: int, offset: int, stop: int
    ) -> None:
        self.offset = offset
        self._transport = transport
        self._socket = socket
        self._fd = fd
        self._stop = stop
        # Up to where the file is known to be in memory.
        self._cached = offset
        self._ended: asyncio.Future[bool]

    @property
    def next(self) -> int:
        """How many bytes are to be sent in the next turn."""
        return min(self._stop - self.offset, TURN)

    def trust(self) -> None:
        """Take the next turn's bytes to be in memory."""
        self._cached = self.offset + self.next

    async def run(self) -> bool:
        """Return True when all is sent, False when what comes next is not in memory.

        Raises `StorageError`, and `ConnectionError` if the client leaves, or reads nothing for a minute.
        """
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        self._send()
        if self._ended.done():
            return self._ended.result()
        loop.add_writer(self._socket, self._send)
        watch = readers.Watch(self._transport, self._on_silence)
        try:
            return await self._ended
        finally:
            watch.cancel()
            loop.remove_writer(self._socket)

    def _send(self) -> None:
        """Send what the client takes now, but not more than its turn."""
        if self._ended.done():
            return
        try:
            if self.offset >= self._cached:
                if not _is_cached(self._fd, self.offset + self.next - 1):
                    self._ended.set_result(False)
                    return
                self.trust()
            count = self._cached - self.offset
            sent = os.sendfile(self._socket, self._fd, self.offset, count)
        except BlockingIOError:
            return
        except OSError as error:
            is_disk = error.errno == errno.EIO
            self._ended.set_exception(
                StorageError(_UNREADABLE) if is_disk else ConnectionResetError(_LEFT)
            )
            return
        self.offset += sent
        if not sent:
            self._ended.set_exception(StorageError(_SHRUNK))
        elif self.offset >= self._stop:
            self._ended.set_result(True)

    def _on_silence(self) -> None:
        if not self._ended.done():
            problem = ConnectionAbortedError("the client has read nothing for a minute")
            self._ended.set_exception(problem)


def _is_cached(fd: int, offset: int) -> bool:
    """Tell whether the byte at `offset` is in memory; where nobody can tell, hope that it is."""
    try:
        return bool(os.preadv(fd, (bytearray(1),), offset, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    except OSError:
        return True
