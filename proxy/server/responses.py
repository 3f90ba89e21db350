"""Answers, and the one routine that sends blobs: committed ones and growing ones alike.

`os.sendfile` goes out on a duplicate of the connection's socket (`flow.py`), because uvloop has no sendfile of its
own. The headers leave through the transport first, whose
buffer has to be empty before the file may follow. Over TLS the bytes are read, a piece at a time, and written.
"""

import asyncio
import os
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

from proxy.concurrency import run_in_thread
from proxy.download.reader import DownloadReader
from proxy.errors import ProxyError, StorageError
from proxy.server.ranges import ByteRange
from proxy.server.sendfile import (
    CLIENT_DISCONNECTED,
    COPY_CHUNK_SIZE,
    COPY_SIZE,
    DISK_UNREADABLE,
    FILE_TRUNCATED,
    FileRange,
    SendfileTask,
    StallTimer,
    duplicate_socket,
    is_resident,
)
from proxy.storage.blobs import OpenBlob

API_VERSION = "registry/2.0"


class TruncatedBodyError(ConnectionError):
    """A body stays short, because the rest cannot be had or must not be sent.

    As a `ConnectionError` it makes the server close the connection with FIN, without a word more: clients
    then resume by range, where a reset would make them fail.
    """


class InMemoryResponse(Response):
    """An answer from memory, a long one sent as its client takes it: those who read slowly share its bytes.

    A plain `Response` hands the connection a copy of its whole body.
    """

    async def write_eof(self, data: bytes = b"") -> None:
        """Send what is left to be sent."""
        body = self.body
        if isinstance(body, bytes) and len(body) > COPY_CHUNK_SIZE and not self._must_be_empty_body:
            whole, self.body = memoryview(body), None
            for start in range(0, len(whole), COPY_CHUNK_SIZE):
                await self.write(whole[start : start + COPY_CHUNK_SIZE])
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
    return InMemoryResponse(
        body=msgspec.json.encode(document),
        status=status,
        content_type=content_type,
        headers={"Docker-Distribution-Api-Version": API_VERSION, **(headers or {})},
    )


def serialize_head(response: Response, content_length: int) -> bytes:
    """Return the head that aiohttp would send for a new response to a client of HTTP/1.1 that stays.

    `length` is the body's.
    """
    headers = response.headers
    if response.status != 304:
        headers[hdrs.CONTENT_LENGTH] = str(content_length)
    headers[hdrs.DATE] = formatdate(usegmt=True)
    headers[hdrs.SERVER] = SERVER_SOFTWARE
    return _serialize_headers(f"HTTP/1.1 {response.status} {response.reason}", headers)


class BodySender:
    """Sends the body of one response, whose headers `writer` has been given already."""

    def __init__(
        self, request: BaseRequest, writer: AbstractStreamWriter, threads: Executor
    ) -> None:
        """Raise `ConnectionError` if the client has left already."""
        self.bytes_sent = 0
        self._writer = writer
        self._threads = threads
        if request.transport is None:
            raise ConnectionResetError(CLIENT_DISCONNECTED)
        self._transport = request.transport
        # Where the kernel sends files to; None where bytes have to go through the transport.
        self._socket: socket | None = None

    async def send(self, source: OpenBlob | DownloadReader, byte_range: ByteRange) -> None:
        """Send the bytes of the window, as they come. Raises `ConnectionError`."""
        transport = self._transport
        if transport.get_extra_info("sslcontext"):
            transport.set_write_buffer_limits(COPY_CHUNK_SIZE)
            await self._send_source(source, byte_range)
            return
        await self._flush_headers(transport)
        with duplicate_socket(transport) as self._socket:
            await self._send_source(source, byte_range)

    async def _send_source(self, source: OpenBlob | DownloadReader, byte_range: ByteRange) -> None:
        try:
            if isinstance(source, OpenBlob):
                await self._send_file(source.fd, byte_range.start, byte_range.stop)
            else:
                await self._send_download(source, byte_range)
        except ProxyError as error:
            raise TruncatedBodyError(str(error)) from error

    async def send_unsized(self, reader: DownloadReader) -> None:
        """Send a blob of unknown size in chunks; the last of them only if the digest is right."""
        offset = 0
        try:
            while part := await reader.next(offset):
                if isinstance(part, memoryview):
                    offset += await self._copy_memory(part)
                else:
                    await self._copy_file(part.fd, offset, part.stop)
                    offset = part.stop
        except ProxyError as error:
            raise TruncatedBodyError(str(error)) from error

    async def _send_download(self, reader: DownloadReader, byte_range: ByteRange) -> None:
        offset = byte_range.start
        while offset < byte_range.stop:
            part = await reader.next(offset, byte_range.stop)
            if isinstance(part, memoryview):
                offset += await self._send_memory(part)
            else:
                await self._send_file(part.fd, offset, part.stop)
                offset = part.stop

    async def _send_memory(self, part: memoryview) -> int:
        """Send what the client takes now, and wait until it takes more; return how much was sent."""
        if self._socket is None:
            return await self._copy_memory(part)
        sent = 0
        try:
            sent = self._socket.send(part)
            self.bytes_sent += sent
        except BlockingIOError:
            pass
        except OSError:
            raise ConnectionResetError(CLIENT_DISCONNECTED) from None
        if sent < len(part):
            await self._wait_writable(self._socket)
        return sent

    async def _wait_writable(self, connection: socket) -> None:
        loop = asyncio.get_running_loop()
        writable = loop.create_future()
        stalled = ConnectionAbortedError("the client has read nothing for a minute")
        timer = StallTimer(self._transport, partial(_complete_future, writable, stalled))
        loop.add_writer(connection, _complete_future, writable, None)
        try:
            await writable
        finally:
            loop.remove_writer(connection)
            timer.cancel()

    async def _copy_memory(self, part: memoryview) -> int:
        piece = bytes(part[:COPY_CHUNK_SIZE])
        await self._write(piece)
        await asyncio.sleep(0)
        return len(piece)

    async def _write(self, chunk: bytes) -> None:
        await self._writer.write(chunk)
        self.bytes_sent += len(chunk)

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
                        raise ConnectionResetError(CLIENT_DISCONNECTED)
                    await self._writer.drain()
                    await asyncio.sleep(0)
            finally:
                transport.set_write_buffer_limits(high, low)

    async def _send_file(self, fd: int, offset: int, stop: int) -> None:
        if self._socket is None:
            await self._copy_file(fd, offset, stop)
            return
        ended = asyncio.get_running_loop().create_future()
        part = FileRange(fd, ByteRange(offset, stop), self._threads)
        flow = SendfileTask(self._socket, self._transport, part)
        try:
            flow.start(partial(_complete_future, ended))
            await ended
        finally:
            flow.stop()
            self.bytes_sent += flow.offset - offset

    async def _copy_file(self, fd: int, offset: int, stop: int) -> None:
        while offset < stop:
            turn = min(stop, offset + COPY_SIZE)
            is_here = is_resident(fd, turn - 1)
            while offset < turn:
                piece = await self._read_chunk(
                    fd, offset, min(turn - offset, COPY_CHUNK_SIZE), is_resident=is_here
                )
                await self._write(piece)
                offset += len(piece)
            await asyncio.sleep(0)

    async def _read_chunk(self, fd: int, offset: int, count: int, *, is_resident: bool) -> bytes:
        try:
            if is_resident:
                piece = os.pread(fd, count, offset)
            else:
                piece = await run_in_thread(self._threads, os.pread, fd, count, offset)
        except OSError as error:
            raise StorageError(DISK_UNREADABLE) from error
        if not piece:
            raise StorageError(FILE_TRUNCATED)
        return piece


def _complete_future(future: "asyncio.Future[None]", error: Exception | None) -> None:
    if future.done():
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(None)
