"""Where clients connect: addresses that are bound here, sockets that were passed; and how they are let go."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any

from aiohttp.web import BaseRequest, ServerRunner, StreamResponse, TCPSite
from aiohttp.web_runner import BaseSite

from proxy.config import Address
from proxy.errors import ConfigError
from proxy.server.http import HttpServer

# Who is connected when the daemon stops has so many seconds to begin one more request: of a connection
# that was just accepted nobody knows that it will not be answered.
LAST_CALL = 1.0


class BoundSite(BaseSite):
    """A socket that is bound already, by a service manager or with a mode that aiohttp would set too late."""

    __slots__ = ("_socket",)

    def __init__(
        self,
        runner: ServerRunner,
        bound: socket.socket,
        *,
        tls: ssl.SSLContext | None = None,
        backlog: int = 1024,
    ) -> None:
        super().__init__(runner, ssl_context=tls, backlog=backlog)
        self._socket = bound

    @property
    def name(self) -> str:
        """What it is called."""
        return text_of(self._socket.getsockname())

    async def start(self) -> None:
        """Let clients connect."""
        await super().start()
        server = self._runner.server
        assert server is not None
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {
            "sock": self._socket,
            "ssl": self._ssl_context,
            "backlog": self._backlog,
        }
        if self._socket.family == socket.AF_UNIX:
            # Its file belongs to who has bound it. (asyncio knows this since Python 3.13, uvloop always.)
            options["cleanup_socket"] = False
            self._server = await loop.create_unix_server(server, **options)
        else:
            self._server = await loop.create_server(server, **options)


class Listener:
    """Serves `handler` at addresses and sockets, which `key` of the configuration names."""

    def __init__(
        self, handler: Callable[[BaseRequest], Awaitable[StreamResponse]], key: str
    ) -> None:
        self._server = HttpServer(handler)
        # What is still being sent after a drain is cut: aiohttp would wait as long again, twice.
        self._runner = ServerRunner(self._server, shutdown_timeout=0.1)
        self._key = key

    async def open(
        self,
        stack: AsyncExitStack,
        addresses: Sequence[Address],
        sockets: Sequence[socket.socket] = (),
        tls: ssl.SSLContext | None = None,
    ) -> list[str]:
        """Let clients connect until the stack ends; return the real addresses. Raises `ConfigError`."""
        await self._runner.setup()
        stack.push_async_callback(self._runner.cleanup)
        for bound in sockets:
            await BoundSite(self._runner, bound, tls=tls).start()
        for address in addresses:
            site = TCPSite(
                self._runner, address.host or None, address.port, ssl_context=tls, backlog=1024
            )
            try:
                await site.start()
            except OSError as error:
                raise ConfigError(
                    f"{self._key}: {address} cannot be used ({error.strerror}); "
                    "stop what uses it, or choose another"
                ) from error
        return [text_of(address) for address in self._runner.addresses]

    async def close(self) -> None:
        """Let nobody in any more, and those who are in ask once more at most.

        Who connects to a socket that was passed waits there for the next daemon.
        """
        for site in list(self._runner.sites):
            await site.stop()
        self._server.last_call(LAST_CALL)

    async def drain(self, seconds: float) -> None:
        """Wait until what was begun is answered and all have left, or `hurry` is called; not longer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._server.over.wait()

    def hurry(self) -> None:
        """End the drain, now or when it begins."""
        self._server.over.set()


def text_of(address: Any) -> str:
    """Return how a socket's address is written: `host:port`, `unix:/path`, `unix:@name`."""
    if isinstance(address, bytes):
        return f"unix:@{address[1:].decode(errors='replace')}"
    if isinstance(address, str):
        return f"unix:{address}"
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
