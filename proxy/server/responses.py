"""Answers, and the one routine that sends blobs: committed ones and growing ones alike.

`os.sendfile` goes out on a duplicate of the connection's socket (`flow.py`), because uvloop has no sendfile of its
own. The headers leave through the transport first, whose
buffer has to be empty before the file may follow. Over TLS the bytes are read, a piece at a time, and written.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from email.utils import formatdate
from functools import partial
from socket import socket

import msgspec
from aiohttp import hdrs
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import SERVER_SOFTWARE
from aiohttp.http_writer import _serialize_headers
from aiohttp.web import BaseRequest, Response

from proxy.concurrency import in_thread
from proxy.download.download import Detached, Download
from proxy.errors import ProxyError, StorageError
from proxy.server.ranges import Window
from proxy.server.sendfile import (
    COPY_TURN,
    LEFT,
    PIECE,
    SHRUNK,
    UNREADABLE,
    Flow,
    Part,
    duplicate,
    is_cached,
)
from proxy.storage.blobs import OpenBlob

API_VERSION = "registry/2.0"


class BodyCutError(ConnectionError):
    """A body stays short, because the rest cannot be had or must not be sent.

    As a `ConnectionError` it makes the server close the connection with FIN, without a word more: clients
    then resume by range, where a reset would make them fail.
    """


class Answer(Response):
    """An answer from memory, a long one sent as its client takes it: those who read slowly share its bytes.

    A plain `Response` hands the connection a copy of its whole body.
    """

    async def write_eof(self, data: bytes = b"") -> None:
        """Send what is left to be sent."""
        body = self.body
        if isinstance(body, bytes) and len(body) > PIECE and not self._must_be_empty_body:
            whole, self.body = memoryview(body), None
            for start in range(0, len(whole), PIECE):
                await self.write(whole[start : start + PIECE])
                # The kernel may take all of it at once: others have their turn meanwhile.
                await asyncio.sleep(0)
        await super().write_eof(data)


def json_response(
    document: object,
    *,
    status: int = 200,
    content_type: str = "application/json",
    headers: dict[str, str] | None = None,
) -> Response:
    """Return a JSON answer with the headers that every answer has."""
    return Answer(
        body=msgspec.json.encode(document),
        status=status,
        content_type=content_type,
        headers={"Docker-Distribution-Api-Version": API_VERSION, **(headers or {})},
    )


def head_of(response: Response, length: int) -> bytes:
    """Return the head that aiohttp would send for a new response to a client of HTTP/1.1 that stays.

    `length` is the body's.
    """
    headers = response.headers
    if response.status != 304:
        headers[hdrs.CONTENT_LENGTH] = str(length)
    headers[hdrs.DATE] = formatdate(usegmt=True)
    headers[hdrs.SERVER] = SERVER_SOFTWARE
    return _serialize_headers(f"HTTP/1.1 {response.status} {response.reason}", headers)


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
            raise ConnectionResetError(LEFT)
        self._transport = request.transport
        # Where the kernel sends files to; None where bytes have to go through the transport.
        self._socket: socket | None = None

    async def send(self, source: OpenBlob | Download, window: Window) -> None:
        """Send the bytes of the window, as they come. Raises `ConnectionError`."""
        transport = self._transport
        if transport.get_extra_info("sslcontext"):
            transport.set_write_buffer_limits(PIECE)
            await self._send_source(source, window)
            return
        await self._flush_headers(transport)
        with duplicate(transport) as self._socket:
            await self._send_source(source, window)

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
                        raise ConnectionResetError(LEFT)
                    await self._writer.drain()
                    await asyncio.sleep(0)
            finally:
                transport.set_write_buffer_limits(high, low)

    async def _send_file(self, fd: int, offset: int, stop: int) -> None:
        if self._socket is None:
            await self._copy_file(fd, offset, stop)
            return
        ended = asyncio.get_running_loop().create_future()
        part = Part(fd, Window(offset, stop), self._threads)
        flow = Flow(self._socket, self._transport, part)
        try:
            flow.start(partial(_settle, ended))
            await ended
        finally:
            flow.stop()
            self.sent += flow.offset - offset

    async def _copy_file(self, fd: int, offset: int, stop: int) -> None:
        while offset < stop:
            turn = min(stop, offset + COPY_TURN)
            is_here = is_cached(fd, turn - 1)
            while offset < turn:
                piece = await self._read(fd, offset, min(turn - offset, PIECE), is_here=is_here)
                await self._write(piece)
                offset += len(piece)
            await asyncio.sleep(0)

    async def _read(self, fd: int, offset: int, count: int, *, is_here: bool) -> bytes:
        try:
            if is_here:
                piece = os.pread(fd, count, offset)
            else:
                piece = await in_thread(self._threads, os.pread, fd, count, offset)
        except OSError as error:
            raise StorageError(UNREADABLE) from error
        if not piece:
            raise StorageError(SHRUNK)
        return piece


def _settle(ended: "asyncio.Future[None]", problem: Exception | None) -> None:
    if ended.done():
        return
    if problem:
        ended.set_exception(problem)
    else:
        ended.set_result(None)
