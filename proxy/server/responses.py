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
from functools import partial

import msgspec
from aiohttp.abc import AbstractStreamWriter
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
            raise ConnectionResetError("the client has left")
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
                        raise ConnectionResetError("the client has left")
                    await self._writer.drain()
                    await asyncio.sleep(0)
            finally:
                transport.set_write_buffer_limits(high, low)

    async def _send_file(self, fd: int, offset: int, stop: int) -> None:
        if self._socket is None:
            await self._copy_file(fd, offset, stop)
            return
        while offset < stop:
            sent = await self._sendfile(self._socket, fd, offset, min(stop - offset, TURN))
            offset += sent
            self.sent += sent
            if sent == TURN and offset < stop:
                await asyncio.sleep(0)

    async def _sendfile(self, socket: int, fd: int, offset: int, count: int) -> int:
        """Return how much the client has taken, 0 if it has to be asked again."""
        try:
            if _is_cached(fd, offset + count - 1):
                sent = os.sendfile(socket, fd, offset, count)
            else:
                # The disk is slow, and sendfile waits for it: not on the loop.
                sent = await in_thread(self._threads, os.sendfile, socket, fd, offset, count)
        except BlockingIOError:
            await self._writable(socket)
            return 0
        except OSError as error:
            if error.errno == errno.EIO:
                raise StorageError(_UNREADABLE) from error
            raise ConnectionResetError("the client has left") from error
        if sent == 0:
            raise StorageError(_SHRUNK)
        return sent

    async def _writable(self, socket: int) -> None:
        """Wait until the socket takes bytes. Raises `ConnectionError` if the client reads nothing."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        loop.add_writer(socket, _resolve, waiter)
        watch = readers.Watch(self._transport, partial(_resolve, waiter, False))
        try:
            if not await waiter:
                raise ConnectionAbortedError("the client has read nothing for a minute")
        finally:
            watch.cancel()
            loop.remove_writer(socket)

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


def _is_cached(fd: int, offset: int) -> bool:
    """Tell whether the byte at `offset` is in memory; where nobody can tell, hope that it is."""
    try:
        return bool(os.preadv(fd, (bytearray(1),), offset, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    except OSError:
        return True


def _resolve(waiter: "asyncio.Future[bool]", result: bool = True) -> None:
    if not waiter.done():
        waiter.set_result(result)
