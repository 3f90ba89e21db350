"""aiohttp's server with limits of ours, and errors of malformed requests in OCI form."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from aiohttp import hdrs
from aiohttp.http_parser import RawRequestMessage
from aiohttp.web import BaseRequest, RequestHandler, Response, Server, StreamResponse

from proxy.log import get_logger
from proxy.server import sendfile
from proxy.server.connection_limit import ConnectionSlot
from proxy.server.responses import json_response
from proxy.server.sendfile import BlobResponse

# How long a connection may say nothing, before its first request and between two, in seconds.
KEEPALIVE_TIMEOUT = 75.0
# How long a request's head may take, and how long who is one too many is listened to.
HEAD_TIMEOUT = 30.0
REJECTED_TIMEOUT = 5.0
# How long the rest of a body that nobody reads is waited for.
LINGERING_TIME = 2.0
# What a client may send ahead while it is sent a file, in bytes, before it has to wait.
MAX_PIPELINED_SIZE = 64 << 10
# After so many lines about malformed requests the rest of a minute is only counted.
MAX_MALFORMED_LOGS_PER_MINUTE = 10
# Seconds after which who is one too many may come again.
RETRY_AFTER = 5

# A bundle that is imported comes in bodies; of requests the next one is not read before its turn.
READ_BUFFER_SIZE = 1 << 20

log = get_logger(__name__)


class FastPathHandler(Protocol):
    """Answers requests where they arrive, if they came before, byte for byte."""

    def try_respond(self, head: bytes, client: str | None) -> bytes | BlobResponse | None:
        """Return the whole answer to a request of these bytes; None lets it go the usual way."""

    def remember(self, head: bytes, message: RawRequestMessage) -> None:
        """Take note of what these bytes, which hold one request, mean."""


class _Connection(RequestHandler):
    """Answers what aiohttp cannot parse without repeating a byte of it, and waits for nobody for ever."""

    __slots__ = (
        "_blob_response",
        "_client",
        "_drain_timeout",
        "_fast_path",
        "_is_head_started",
        "_pipelined",
        "_server",
        "_slot",
        "_stall_timer",
    )

    def __init__(
        self,
        server: "HttpServer",
        slot: ConnectionSlot | None,
        fast_path: FastPathHandler | None,
        **options: Any,
    ) -> None:
        super().__init__(server, **options)
        self._fast_path = fast_path
        self._client: str | None = None
        # A file that is being sent, and what came meanwhile.
        self._blob_response: BlobResponse | None = None
        self._pipelined = b""
        self._drain_timeout: float | None = None
        self._server = server
        self._slot = slot
        self._is_head_started = False
        self._stall_timer: sendfile.StallTimer | None = None
        if slot and slot.is_rejected:
            self._request_handler = _reject
            self._fast_path = None

    def close_gracefully(self, drain_timeout: float) -> None:
        """Close the connection after what it asks now, or begins to ask within so many seconds."""
        self._fast_path = None
        if self._blob_response:
            self._drain_timeout = drain_timeout
            return
        if self._request_in_progress or self._messages:
            self.close()
            return
        loop = asyncio.get_running_loop()
        self._request_factory = self._make_last_request
        if self._keepalive_handle is not None:
            self._keepalive_handle.cancel()
        self._next_keepalive_close_time = loop.time() + drain_timeout
        self._keepalive_handle = loop.call_later(drain_timeout, self._process_keepalive)

    def _make_last_request(self, message: RawRequestMessage, *args: Any) -> BaseRequest:
        """Make a request whose answer says that the connection is closed."""
        assert self._manager is not None
        return self._manager.request_factory(message._replace(should_close=True), *args)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Give the place free."""
        super().connection_lost(exc)
        if self._blob_response:
            self._blob_response.cancel()
        if self._stall_timer:
            self._stall_timer.cancel()
        if self._slot:
            self._slot.release()

    def data_received(self, data: bytes) -> None:
        """Take what has come, and do not wait long for the rest of a head."""
        if self._blob_response:
            self._buffer_pipelined(data)
            return
        express = self._fast_path
        is_idle = self._is_awaiting_request and not (self._is_head_started or self._paused)
        if express and is_idle and self._try_fast_path(express, data):
            return
        super().data_received(data)
        if express and is_idle and len(self._messages) == 1:
            message, _ = self._messages[0]
            if isinstance(message, RawRequestMessage):
                express.remember(data, message)
        waits = bool(data) and self._is_awaiting_request
        if waits and not self._is_head_started and self._keepalive_handle:
            self._keepalive_handle.cancel()
            timeout = min(HEAD_TIMEOUT, self.keepalive_timeout)
            self._next_keepalive_close_time = self._loop.time() + timeout
            self._keepalive_handle = self._loop.call_later(timeout, self._process_keepalive)
        self._is_head_started = waits

    @property
    def _is_awaiting_request(self) -> bool:
        """Tell whether all that was asked is answered; so it is before the first request, which may come early."""
        waiter = self._waiter
        return not self._request_count if waiter is None else not waiter.done()

    def _try_fast_path(self, fast_path: FastPathHandler, head: bytes) -> bool:
        transport = self.transport
        if transport is None or transport.is_closing():
            return False
        if self._client is None and isinstance(self.peername, tuple):
            self._client = self.peername[0]
        answer = fast_path.try_respond(head, self._client)
        if answer is None:
            return False
        self._next_keepalive_close_time = self._loop.time() + self.keepalive_timeout
        if isinstance(answer, bytes):
            transport.write(answer)
        else:
            self._blob_response = answer
            answer.start(transport, self._is_paused, self._on_blob_sent)
        return True

    def _is_paused(self) -> bool:
        return self._paused

    def _buffer_pipelined(self, data: bytes) -> None:
        """Keep what a client sends while it is sent a file, until that has ended."""
        self._pipelined += data
        if len(self._pipelined) >= MAX_PIPELINED_SIZE and self.transport:
            self.transport.pause_reading()

    def _on_blob_sent(self, is_complete: bool) -> None:
        self._blob_response = None
        if not is_complete:
            # With FIN: clients resume what stays short.
            self.force_close()
            return
        self._next_keepalive_close_time = self._loop.time() + self.keepalive_timeout
        if self._drain_timeout is not None:
            self.close_gracefully(self._drain_timeout)
        early, self._pipelined = self._pipelined, b""
        if len(early) >= MAX_PIPELINED_SIZE and self.transport:
            self.transport.resume_reading()
        if early:
            self.data_received(early)

    def _process_keepalive(self) -> None:
        if self._blob_response:
            self._next_keepalive_close_time = self._loop.time() + self.keepalive_timeout
        super()._process_keepalive()

    def pause_writing(self) -> None:
        """Begin to watch a client that has not taken what is there for it."""
        super().pause_writing()
        if self._slot and self.transport:
            self._stall_timer = sendfile.StallTimer(self.transport, self._abort_stalled)

    def resume_writing(self) -> None:
        """End that."""
        super().resume_writing()
        if self._stall_timer:
            self._stall_timer.cancel()
        if self._blob_response:
            self._blob_response.resume()

    def _abort_stalled(self) -> None:
        if self.transport:
            log.info("client_stalled", client=str(self.peername))
            self.transport.abort()

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
            self._server.log_malformed(request.remote, status)
        code = "UNKNOWN" if status >= 500 else "UNSUPPORTED"
        return _closing_error_response(status, code, "the request is not valid HTTP")


class HttpServer(Server):
    """Makes a `_Connection` for each client."""

    def __init__(
        self,
        handler: Callable[[BaseRequest], Awaitable[StreamResponse]],
        fast_path: FastPathHandler | None = None,
    ) -> None:
        # A client that leaves ends its handler, wherever that waits; downloads are not its own.
        super().__init__(handler, handler_cancellation=True)
        self._fast_path = fast_path
        self._malformed_count = 0
        self._minute_start = 0.0
        self.all_closed = asyncio.Event()
        self._open_connections: set[_Connection] = set()
        self._drain_timeout: float | None = None

    def close_gracefully(self, drain_timeout: float) -> None:
        """Answer what is asked now, or begins to be asked within so many seconds; `over` is set when all have left."""
        if self._drain_timeout is not None:
            return
        self._drain_timeout = drain_timeout
        for connection in list(self._open_connections):
            if connection.transport:
                connection.close_gracefully(drain_timeout)
        if not self._open_connections:
            self.all_closed.set()

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Note that a connection can be spoken on."""
        super().connection_made(handler, transport)
        assert isinstance(handler, _Connection)
        if self._drain_timeout is not None:
            # It was accepted before the last call.
            asyncio.get_running_loop().call_soon(handler.close_gracefully, self._drain_timeout)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Count a connection less."""
        super().connection_lost(handler, exc)
        self.discard(handler)

    def discard(self, handler: RequestHandler) -> None:
        """Count a connection less, be it one that never came about."""
        assert isinstance(handler, _Connection)
        self._open_connections.discard(handler)
        if self._drain_timeout is not None and not self._open_connections:
            self.all_closed.set()

    def __call__(self, slot: ConnectionSlot | None = None) -> RequestHandler:
        """Return the protocol of a new connection; without a place nobody's patience ends."""
        is_refused = slot is not None and slot.is_rejected
        connection = _Connection(
            self,
            slot,
            self._fast_path,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=REJECTED_TIMEOUT if is_refused else KEEPALIVE_TIMEOUT,
            lingering_time=LINGERING_TIME,
            access_log=None,
            read_bufsize=READ_BUFFER_SIZE,
        )
        self._open_connections.add(connection)
        return connection

    def log_malformed(self, client: str | None, status: int) -> None:
        """Log a request that did not parse, unless there are too many of them."""
        now = asyncio.get_running_loop().time()
        if now - self._minute_start >= 60:
            left_out = max(0, self._malformed_count - MAX_MALFORMED_LOGS_PER_MINUTE)
            if left_out:
                log.info("malformed_requests_suppressed", left_out=left_out)
            self._minute_start, self._malformed_count = now, 0
        self._malformed_count += 1
        if self._malformed_count <= MAX_MALFORMED_LOGS_PER_MINUTE:
            log.info("malformed_request_rejected", client=client, status=status)


async def _reject(_: BaseRequest) -> StreamResponse:
    """Tell a client that there are too many, in the way that makes docker ask elsewhere at once."""
    response = _closing_error_response(
        429, "TOOMANYREQUESTS", "too many connections to this cache; try again soon"
    )
    response.headers[hdrs.RETRY_AFTER] = str(RETRY_AFTER)
    return response


def _closing_error_response(status: int, code: str, message: str) -> Response:
    document = {"errors": [{"code": code, "message": message}]}
    response: Response = json_response(document, status=status)
    response.force_close()
    return response
