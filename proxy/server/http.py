"""aiohttp's server with limits of ours, and errors of malformed requests in OCI form."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp.http_parser import RawRequestMessage
from aiohttp.web import BaseRequest, RequestHandler, Response, Server, StreamResponse

from proxy.log import get_logger
from proxy.server.responses import json_response

# How long a connection may say nothing, before its first request and between two, in seconds.
KEEPALIVE_TIMEOUT = 75.0
# How long the rest of a body that nobody reads is waited for.
LINGERING_TIME = 2.0

log = get_logger(__name__)


class _Connection(RequestHandler):
    """Answers what aiohttp cannot parse without repeating a byte of it."""

    __slots__ = ()

    def last_call(self, seconds: float) -> None:
        """Close the connection after what it asks now, or begins to ask within so many seconds."""
        if self._request_in_progress or self._messages:
            self.close()
            return
        loop = asyncio.get_running_loop()
        self._request_factory = self._last_request
        if self._keepalive_handle is not None:
            self._keepalive_handle.cancel()
        self._next_keepalive_close_time = loop.time() + seconds
        self._keepalive_handle = loop.call_later(seconds, self._process_keepalive)

    def _last_request(self, message: RawRequestMessage, *rest: Any) -> BaseRequest:
        """Make a request whose answer says that the connection is closed."""
        assert self._manager is not None
        return self._manager.request_factory(message._replace(should_close=True), *rest)

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 (it quotes what the client sent)
    ) -> StreamResponse:
        """Return the answer to a request that did not parse, or that no handler survived."""
        if self.transport is None or isinstance(exc, ConnectionError):
            # The client has left, or its body was cut: there is nobody to tell.
            raise ConnectionResetError("no answer can be sent any more")
        if status >= 500:
            log.error("request_failed", exc_info=exc)
        else:
            log.info("malformed_request", client=request.remote, status=status)
        code = "UNKNOWN" if status >= 500 else "UNSUPPORTED"
        document = {"errors": [{"code": code, "message": "the request is not valid HTTP"}]}
        response: Response = json_response(document, status=status)
        response.force_close()
        return response


class HttpServer(Server):
    """Makes a `_Connection` for each client."""

    def __init__(self, handler: Callable[[BaseRequest], Awaitable[StreamResponse]]) -> None:
        # A client that leaves ends its handler, wherever that waits; downloads are not its own.
        super().__init__(handler, handler_cancellation=True)
        self._options: dict[str, Any] = {
            "keepalive_timeout": KEEPALIVE_TIMEOUT,
            "lingering_time": LINGERING_TIME,
            "access_log": None,
            "read_bufsize": 1 << 20,
        }
        self.over = asyncio.Event()
        self._alive: set[_Connection] = set()
        self._patience: float | None = None

    def last_call(self, seconds: float) -> None:
        """Answer what is asked now, or begins to be asked within so many seconds; `over` is set when all have left."""
        if self._patience is not None:
            return
        self._patience = seconds
        for connection in list(self._alive):
            connection.last_call(seconds)
        if not self._alive:
            self.over.set()

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Count a connection."""
        super().connection_made(handler, transport)
        assert isinstance(handler, _Connection)
        self._alive.add(handler)
        if self._patience is not None:
            # It was accepted in the turn of the loop in which the last call was.
            asyncio.get_running_loop().call_soon(handler.last_call, self._patience)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Count a connection less."""
        super().connection_lost(handler, exc)
        assert isinstance(handler, _Connection)
        self._alive.discard(handler)
        if self._patience is not None and not self._alive:
            self.over.set()

    def __call__(self) -> RequestHandler:
        """Return the protocol of a new connection."""
        return _Connection(self, loop=asyncio.get_running_loop(), **self._options)
