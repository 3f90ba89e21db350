"""aiohttp's server with limits of ours, and errors of malformed requests in OCI form."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

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

    def __call__(self) -> RequestHandler:
        """Return the protocol of a new connection."""
        return _Connection(self, loop=asyncio.get_running_loop(), **self._options)
