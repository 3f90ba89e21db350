"""A client that sends raw bytes, and sees how the server ends the connection."""

import asyncio
import socket
from dataclasses import dataclass, field
from typing import Literal

# Seconds to wait for the server.
TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class RawResponse:
    """Everything received on one connection. `end` is None while it is open."""

    data: bytes
    end: Literal["fin", "reset"] | None

    @property
    def status(self) -> int:
        """The status of the first response."""
        return int(self.data.split(b" ", 2)[1])

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the first response, by lower-case name."""
        lines = self.data.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
        pairs = (line.partition(":") for line in lines)
        return {name.lower(): value.strip() for name, _, value in pairs}

    @property
    def body(self) -> bytes:
        """Everything after the first head."""
        return self.data.partition(b"\r\n\r\n")[2]


_open: list["RawClient"] = []


@dataclass(slots=True)
class RawClient:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    received: bytearray = field(default_factory=bytearray)

    @classmethod
    async def connect(cls, url: str, *, receive_buffer: int | None = None) -> "RawClient":
        """Connect to the server at `url`; a small `receive_buffer` makes a slow client."""
        host, _, port = url.removeprefix("http://").rpartition(":")
        connection = socket.socket()
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
        except OSError:
            connection.close()
            raise
        limit = receive_buffer or 1 << 20
        peer = cls(*await asyncio.open_connection(sock=connection, limit=limit))
        _open.append(peer)
        return peer

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)

    async def read(self, count: int) -> bytes:
        """Read `count` more bytes."""
        async with asyncio.timeout(TIMEOUT):
            data = await self.reader.readexactly(count)
        self.received += data
        return data

    async def read_to_end(self) -> RawResponse:
        """Read until the server closes the connection."""
        try:
            async with asyncio.timeout(TIMEOUT):
                while data := await self.reader.read(1 << 16):
                    self.received += data
        except ConnectionResetError:
            return RawResponse(bytes(self.received), "reset")
        return RawResponse(bytes(self.received), "fin")

    async def read_response(self) -> RawResponse:
        """Read one response that states its length, or until the server closes."""
        async with asyncio.timeout(TIMEOUT):
            try:
                self.received += await self.reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError as error:
                return RawResponse(bytes(self.received) + error.partial, "fin")
            answer = RawResponse(bytes(self.received), None)
            if answer.headers.get("transfer-encoding"):
                self.received += await self.reader.readuntil(b"0\r\n\r\n")
            else:
                length = int(answer.headers.get("content-length", "0"))
                self.received += await self.reader.readexactly(length)
        return RawResponse(bytes(self.received), None)

    async def close(self) -> None:
        """Close the connection; closing it again does nothing."""
        self.writer.transport.abort()
        await asyncio.sleep(0)


async def exchange(url: str, request: bytes) -> RawResponse:
    """Send `request` on a new connection and return the first response."""
    peer = await RawClient.connect(url)
    try:
        peer.send(request)
        return await peer.read_response()
    finally:
        await peer.close()


async def close_all() -> None:
    """Close connections that a failed test left open; uvloop would wait for them for ever."""
    while _open:
        await _open.pop().close()
