"""An HTTP proxy on loopback, for CONNECT and absolute URLs. All names lead to this machine."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from tests.fakes.raw_server import HEAD_END
from tests.fakes.startable import Startable
from tests.support.ports import reserve_port


@dataclass(frozen=True, slots=True)
class ProxyRequest:
    """A request to the proxy, with its headers by lower-case name."""

    method: str
    target: str
    headers: dict[str, str]


class FakeProxy(Startable):
    """Forwards the requests whose Proxy-Authorization is `login`.

    With a `status` it sends that instead; if `is_silent` it does not respond.
    """

    def __init__(self, login: str = "") -> None:
        self.login = login
        self.status = 0
        self.is_silent = False
        self.asked: list[ProxyRequest] = []
        self.port = reserve_port(self)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """The URL to configure, without a login."""
        return f"http://127.0.0.1:{self.port}"

    def targets(self, method: str = "") -> set[str]:
        """Return the targets of the requests with `method`, or with any."""
        return {one.target for one in self.asked if one.method == (method or one.method)}

    async def start(self) -> None:
        """Listen, always on the same port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def stop(self) -> None:
        """Stop listening, and close every connection."""
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._answer(reader, writer)
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(HEAD_END)).decode("latin-1")
        lines = head.removesuffix("\r\n\r\n").split("\r\n")
        method, target, _ = lines[0].split(" ")
        pairs = [line.partition(": ") for line in lines[1:]]
        headers = {name.lower(): value for name, _, value in pairs}
        self.asked.append(ProxyRequest(method, target, headers))
        is_known = headers.get("proxy-authorization", "") == self.login
        status = self.status or (0 if is_known else 407)
        if self.is_silent:
            await reader.read()
            return
        if status:
            writer.write(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status)
            return
        authority = target if method == "CONNECT" else target.split("/", 3)[2]
        port = int(authority.rpartition(":")[2])
        origin_reader, origin_writer = await asyncio.open_connection("127.0.0.1", port)
        self._writers.add(origin_writer)
        try:
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                forwarded = [line for line in lines[1:] if not line.lower().startswith("proxy-")]
                request_line = f"{method} /{target.split('/', 3)[3]} HTTP/1.1"
                head = "\r\n".join([request_line, *forwarded, "Connection: close"])
                origin_writer.write(head.encode() + HEAD_END)
            await asyncio.gather(_copy(reader, origin_writer), _copy(origin_reader, writer))
        finally:
            self._writers.discard(origin_writer)
            origin_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
