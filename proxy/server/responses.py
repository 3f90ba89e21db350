"""Answers, and the one routine that sends blobs: committed ones and growing ones alike.

`os.sendfile` goes out on a duplicate of the connection's socket, because uvloop has no sendfile of its
own and does not lend its descriptor. The headers leave through the transport first, whose
buffer has to be empty before the file may follow.
"""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager

import msgspec
from aiohttp.abc import AbstractStreamWriter
from aiohttp.web import BaseRequest, Response

from proxy.cache.download import Detached, Download
from proxy.errors import ProxyError, StorageError
from proxy.flight import in_thread
from proxy.server.ranges import Window
from proxy.storage.local import OpenBlob

# The most that one connection sends before others have their turn.
TURN = 1 << 20
# A reader that takes nothing for so long is dropped, in seconds.
READER_TIMEOUT = 60.0

API_VERSION = "registry/2.0"

_DROPPED = "the client has read nothing for a minute"


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
        self.sent = 0
        self._request = request
        self._writer = writer
        self._threads = threads

    async def send(self, source: OpenBlob | Download, window: Window) -> None:
        """Send the bytes of the window, as they come. Raises `ConnectionError`."""
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        await self._flush_headers(transport)
        socket = os.dup(transport.get_extra_info("socket").fileno())
        try:
            if isinstance(source, OpenBlob):
                await self._send_file(socket, source.fd, window.start, window.stop)
            else:
                await self._follow(socket, source, window)
        except ProxyError as error:
            raise BodyCutError(str(error)) from error
        finally:
            os.close(socket)

    async def send_unsized(self, download: Download) -> None:
        """Send a blob of unknown size in chunks; the last of them only if the digest is right."""
        offset = 0
        try:
            while True:
                limit = await download.available(offset)
                if limit == offset:
                    break
                while offset < limit:
                    size = min(TURN, limit - offset)
                    chunk = await in_thread(self._threads, os.pread, download.fd, size, offset)
                    await self._write(chunk)
                    offset += len(chunk)
        except Detached:
            await self._pass_through(download.pass_through(offset, None))
        except ProxyError as error:
            raise BodyCutError(str(error)) from error

    async def _follow(self, socket: int, download: Download, window: Window) -> None:
        offset = window.start
        is_peek = download.is_peek(window.start, window.stop)
        try:
            while offset < window.stop:
                limit = await download.available(offset, window.stop, is_peek=is_peek)
                limit = min(limit, window.stop)
                await self._send_file(socket, download.fd, offset, limit)
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
        async with _patience():
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
                async with _patience():
                    while transport.get_write_buffer_size():
                        if transport.is_closing():
                            raise ConnectionResetError("the client has left")
                        await self._writer.drain()
                        await asyncio.sleep(0)
            finally:
                transport.set_write_buffer_limits(high, low)

    async def _send_file(self, socket: int, fd: int, offset: int, stop: int) -> None:
        loop = asyncio.get_running_loop()
        while offset < stop:
            count = min(stop - offset, TURN)
            try:
                if _is_cached(fd, offset + count - 1):
                    sent = os.sendfile(socket, fd, offset, count)
                else:
                    # The disk is slow, and sendfile waits for it: not on the loop.
                    sent = await in_thread(self._threads, os.sendfile, socket, fd, offset, count)
            except BlockingIOError:
                await _writable(loop, socket)
                continue
            except OSError as error:
                if error.errno == errno.EIO:
                    raise StorageError("the disk cannot be read") from error
                raise ConnectionResetError("the client has left") from error
            if sent == 0:
                raise StorageError("a file in the store is shorter than it was")
            offset += sent
            self.sent += sent
            if sent == TURN and offset < stop:
                await asyncio.sleep(0)


def _is_cached(fd: int, offset: int) -> bool:
    """Tell whether the byte at `offset` is in memory; where nobody can tell, hope that it is."""
    try:
        return bool(os.preadv(fd, (bytearray(1),), offset, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    except OSError:
        return True


@asynccontextmanager
async def _patience() -> AsyncIterator[None]:
    """Raise `ConnectionError` if the client takes nothing for a minute."""
    try:
        async with asyncio.timeout(READER_TIMEOUT):
            yield
    except TimeoutError:
        raise ConnectionAbortedError(_DROPPED) from None


async def _writable(loop: asyncio.AbstractEventLoop, socket: int) -> None:
    """Wait until the socket takes bytes. Raises `ConnectionError` if it does not for a minute."""
    waiter = loop.create_future()
    loop.add_writer(socket, _resolve, waiter)
    timer = loop.call_later(READER_TIMEOUT, _resolve, waiter, False)
    try:
        if not await waiter:
            raise ConnectionAbortedError(_DROPPED)
    finally:
        timer.cancel()
        loop.remove_writer(socket)


def _resolve(waiter: "asyncio.Future[bool]", result: bool = True) -> None:
    if not waiter.done():
        waiter.set_result(result)
