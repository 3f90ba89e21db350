"""A scripted upstream that sends raw bytes, for responses that no HTTP library would send."""

import asyncio
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True, slots=True)
class RecvUntil:
    """Read until this marker is received."""

    marker: bytes = HEAD_END


@dataclass(frozen=True, slots=True)
class Send:
    """Send these bytes."""

    content: bytes


@dataclass(frozen=True, slots=True)
class SendForever:
    """Send these bytes again and again, until the peer closes."""

    content: bytes


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait until the event is set."""

    event: asyncio.Event


@dataclass(frozen=True, slots=True)
class Reset:
    """Close with RST."""


@dataclass(frozen=True, slots=True)
class Fin:
    """Close with FIN, as every script does at its end."""


Step = RecvUntil | Send | SendForever | Wait | Reset | Fin


class RawUpstream:
    """Plays the next script on each connection; the last script on all further ones."""

    def __init__(self, *scripts: Sequence[Step], host: str = "127.0.0.1") -> None:
        self.received: list[bytes] = []
        self._host = host
        self._scripts = scripts
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._idle = asyncio.Event()
        self.port = 0

    @property
    def url(self) -> str:
        """The URL to configure as upstream."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    async def until_left(self) -> None:
        """Wait until no connection is open."""
        await self._idle.wait()

    @property
    def connections(self) -> int:
        """The number of connections so far."""
        return len(self.received)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._play, self._host, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await self._server.wait_closed()

    async def _play(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(self.received)
        self.received.append(b"")
        self._writers.add(writer)
        self._idle.clear()
        try:
            for step in self._scripts[min(number, len(self._scripts) - 1)]:
                await self._take(step, number, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the peer has closed the connection
        finally:
            self._writers.discard(writer)
            if not self._writers:
                self._idle.set()
            writer.close()

    async def _take(
        self, step: Step, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        match step:
            case RecvUntil(marker):
                self.received[number] += await reader.readuntil(marker)
            case Send(content):
                writer.write(content)
                await writer.drain()
            case SendForever(content):
                while True:
                    writer.write(content)
                    await writer.drain()
            case Wait(event):
                await event.wait()
            case Fin():
                writer.close()
            case Reset():
                linger = struct.pack("ii", 1, 0)
                peer = writer.get_extra_info("socket")
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
