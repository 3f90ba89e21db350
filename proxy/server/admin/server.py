"""The HTTP server of the admin API: aiohttp, in the form that listeners expect."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp.web import BaseRequest, RequestHandler, Response, Server, StreamResponse

from proxy.errors import InvalidRequestError
from proxy.log import get_logger
from proxy.server.admin.handler import api_error_response
from proxy.server.clients.connection_limit import ConnectionSlot

# Seconds that a connection may be idle.
KEEPALIVE_TIMEOUT = 75.0
# Seconds in which the rest of an unread body is received and discarded after the response.
LINGERING_TIME = 2.0
# Large, because imported bundles arrive as bodies.
READ_BUFFER_SIZE = 1 << 20
# Seconds that a handler may take to end after its connection was closed.
CLOSE_TIMEOUT = 0.1

_OPTIONS: Mapping[str, Any] = {
    "keepalive_timeout": KEEPALIVE_TIMEOUT,
    "lingering_time": LINGERING_TIME,
    "access_log": None,
    "read_bufsize": READ_BUFFER_SIZE,
}

log = get_logger(__name__)


class _AdminConnection(RequestHandler):
    """Responds to malformed requests in the form of the API, without quoting them."""

    __slots__ = ("_admin_server", "_slot")

    def __init__(self, server: "AdminServer", slot: ConnectionSlot | None) -> None:
        super().__init__(server.aiohttp_server, loop=asyncio.get_running_loop(), **_OPTIONS)
        self._admin_server = server
        self._slot = slot

    def connection_lost(self, exc: BaseException | None) -> None:
        """Remove the connection."""
        super().connection_lost(exc)
        self._admin_server.discard(self)
        if self._slot:
            self._slot.release()

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 (it quotes what the client sent)
    ) -> StreamResponse:
        """Return the response to a malformed request, or to one whose handler failed."""
        if request.transport is None or isinstance(exc, ConnectionError):
            # The client disconnected, or a response was truncated on purpose.
            raise ConnectionResetError("the connection is closed; no response can be sent")
        if status >= 500:
            log.error("admin_request_failed", exc_info=exc)
        else:
            log.info("malformed_request_rejected", client=request.remote, status=status)
        response: Response = api_error_response(
            InvalidRequestError("the request is not valid HTTP"), status
        )
        response.force_close()
        return response


class AdminServer:
    """Creates aiohttp's protocol for each connection, and closes them all at the end."""

    def __init__(self, handler: Callable[[BaseRequest], Awaitable[StreamResponse]]) -> None:
        # With cancellation, an operation ends when its client disconnects.
        self.aiohttp_server = Server(handler, handler_cancellation=True)
        self.all_closed = asyncio.Event()
        self._open_connections: set[asyncio.BaseProtocol] = set()
        self._is_draining = False

    def __call__(self, slot: ConnectionSlot | None = None) -> asyncio.BaseProtocol:
        """Return the protocol of a new connection."""
        connection = _AdminConnection(self, slot)
        self._open_connections.add(connection)
        return connection

    def discard(self, connection: asyncio.BaseProtocol) -> None:
        """Remove a connection."""
        self._open_connections.discard(connection)
        if self._is_draining and not self._open_connections:
            self.all_closed.set()

    def close_gracefully(self, drain_timeout: float) -> None:  # noqa: ARG002 (commands do not reconnect)
        """Close idle connections now, and each other one after its current request."""
        self._is_draining = True
        self.aiohttp_server.pre_shutdown()
        if not self._open_connections:
            self.all_closed.set()

    async def close(self) -> None:
        """Close all connections now."""
        await self.aiohttp_server.shutdown(CLOSE_TIMEOUT)
