"""aiohttp's server with limits of ours, and errors of malformed requests in OCI form."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from aiohttp import hdrs
from aiohttp.http_parser import RawRequestMessage
from aiohttp.web import BaseRequest, RequestHandler, Response, Server, StreamResponse

from proxy.log import get_logger
from proxy.server import sendfile
from proxy.server.connection_limit import Place
from proxy.server.responses import json_response
from proxy.server.sendfile import Delivery

# How long a connection may say nothing, before its first request and between two, in seconds.
KEEPALIVE_TIMEOUT = 75.0
# How long a request's head may take, and how long who is one too many is listened to.
HEAD_TIMEOUT = 30.0
REFUSAL_TIMEOUT = 5.0
# How long the rest of a body that nobody reads is waited for.
LINGERING_TIME = 2.0
# What a client may send ahead while it is sent a file, in bytes, before it has to wait.
EARLY = 64 << 10
# After so many lines about malformed requests the rest of a minute is only counted.
LINES_PER_MINUTE = 10
# Seconds after which who is one too many may come again.
RETRY_AFTER = 5

# A bundle that is imported comes in bodies; of requests the next one is not read before its turn.
READ_BUFFER = 1 << 20

log = get_logger(__name__)


class Express(Protocol):
    """Answers requests where they arrive, if they came before, byte for byte."""

    def at_once(self, head: bytes, client: str | None) -> bytes | Delivery | None:
        """Return the whole answer to a request of these bytes; None lets it go the usual way."""

    def learn(self, head: bytes, message: RawRequestMessage) -> None:
        """Take note of what these bytes, which hold one request, mean."""


class _Connection(RequestHandler):
    """Answers what aiohttp cannot parse without repeating a byte of it, and waits for nobody for ever."""

    __slots__ = (
        "_client",
        "_delivery",
        "_early",
        "_express",
        "_head_began",
        "_patience",
        "_place",
        "_server",
        "_watch",
    )

    def __init__(
        self, server: "HttpServer", place: Place | None, express: Express | None, **options: Any
    ) -> None:
        super().__init__(server, **options)
        self._express = express
        self._client: str | None = None
        # A file that is being sent, and what came meanwhile.
        self._delivery: Delivery | None = None
        self._early = b""
        self._patience: float | None = None
        self._server = server
        self._place = place
        self._head_began = False
        self._watch: sendfile.Watch | None = None
        if place and place.is_refused:
            self._request_handler = _refuse
            self._express = None

    def last_call(self, seconds: float) -> None:
        """Close the connection after what it asks now, or begins to ask within so many seconds."""
        self._express = None
        if self._delivery:
            self._patience = seconds
            return
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

    def connection_lost(self, exc: BaseException | None) -> None:
        """Give the place free."""
        super().connection_lost(exc)
        if self._delivery:
            self._delivery.cancel()
        if self._watch:
            self._watch.cancel()
        if self._place:
            self._place.leave()

    def data_received(self, data: bytes) -> None:
        """Take what has come, and do not wait long for the rest of a head."""
        if self._delivery:
            self._keep(data)
            return
        express = self._express
        is_idle = self._awaits_request and not (self._head_began or self._paused)
        if express and is_idle and self._answer_at_once(express, data):
            return
        super().data_received(data)
        if express and is_idle and len(self._messages) == 1:
            message, _ = self._messages[0]
            if isinstance(message, RawRequestMessage):
                express.learn(data, message)
        waits = bool(data) and self._awaits_request
        if waits and not self._head_began and self._keepalive_handle:
            self._keepalive_handle.cancel()
            timeout = min(HEAD_TIMEOUT, self.keepalive_timeout)
            self._next_keepalive_close_time = self._loop.time() + timeout
            self._keepalive_handle = self._loop.call_later(timeout, self._process_keepalive)
        self._head_began = waits

    @property
    def _awaits_request(self) -> bool:
        """Tell whether all that was asked is answered; so it is before the first request, which may come early."""
        waiter = self._waiter
        return not self._request_count if waiter is None else not waiter.done()

    def _answer_at_once(self, express: Express, head: bytes) -> bool:
        transport = self.transport
        if transport is None or transport.is_closing():
            return False
        if self._client is None and isinstance(self.peername, tuple):
            self._client = self.peername[0]
        answer = express.at_once(head, self._client)
        if answer is None:
            return False
        self._next_keepalive_close_time = self._loop.time() + self.keepalive_timeout
        if isinstance(answer, bytes):
            transport.write(answer)
        else:
            self._delivery = answer
            answer.start(transport, self._is_paused, self._delivered)
        return True

    def _is_paused(self) -> bool:
        return self._paused

    def _keep(self, data: bytes) -> None:
        """Keep what a client sends while it is sent a file, until that has ended."""
        self._early += data
        if len(self._early) >= EARLY and self.transport:
            self.transport.pause_reading()

    def _delivered(self, is_whole: bool) -> None:
        self._delivery = None
        if not is_whole:
            # With FIN: clients resume what stays short.
            self.force_close()
            return
        self._next_keepalive_close_time = self._loop.time() + self.keepalive_timeout
        if self._patience is not None:
            self.last_call(self._patience)
        early, self._early = self._early, b""
        if len(early) >= EARLY and self.transport:
            self.transport.resume_reading()
        if early:
            self.data_received(early)

    def _process_keepalive(self) -> None:
        if self._delivery:
            self._next_keepalive_close_time = self._loop.time() + self.keepalive_timeout
        super()._process_keepalive()

    def pause_writing(self) -> None:
        """Begin to watch a client that has not taken what is there for it."""
        super().pause_writing()
        if self._place and self.transport:
            self._watch = sendfile.Watch(self.transport, self._drop)

    def resume_writing(self) -> None:
        """End that."""
        super().resume_writing()
        if self._watch:
            self._watch.cancel()
        if self._delivery:
            self._delivery.resume()

    def _drop(self) -> None:
        if self.transport:
            log.info("client_reads_nothing", client=str(self.peername))
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
            self._server.note_malformed(request.remote, status)
        code = "UNKNOWN" if status >= 500 else "UNSUPPORTED"
        return _error(status, code, "the request is not valid HTTP")


class HttpServer(Server):
    """Makes a `_Connection` for each client."""

    def __init__(
        self,
        handler: Callable[[BaseRequest], Awaitable[StreamResponse]],
        express: Express | None = None,
    ) -> None:
        # A client that leaves ends its handler, wherever that waits; downloads are not its own.
        super().__init__(handler, handler_cancellation=True)
        self._express = express
        self._malformed = 0
        self._minute = 0.0
        self.over = asyncio.Event()
        self._alive: set[_Connection] = set()
        self._patience: float | None = None

    def last_call(self, seconds: float) -> None:
        """Answer what is asked now, or begins to be asked within so many seconds; `over` is set when all have left."""
        if self._patience is not None:
            return
        self._patience = seconds
        for connection in list(self._alive):
            if connection.transport:
                connection.last_call(seconds)
        if not self._alive:
            self.over.set()

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Note that a connection can be spoken on."""
        super().connection_made(handler, transport)
        assert isinstance(handler, _Connection)
        if self._patience is not None:
            # It was accepted before the last call.
            asyncio.get_running_loop().call_soon(handler.last_call, self._patience)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Count a connection less."""
        super().connection_lost(handler, exc)
        self.forget(handler)

    def forget(self, handler: RequestHandler) -> None:
        """Count a connection less, be it one that never came about."""
        assert isinstance(handler, _Connection)
        self._alive.discard(handler)
        if self._patience is not None and not self._alive:
            self.over.set()

    def __call__(self, place: Place | None = None) -> RequestHandler:
        """Return the protocol of a new connection; without a place nobody's patience ends."""
        is_refused = place is not None and place.is_refused
        connection = _Connection(
            self,
            place,
            self._express,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=REFUSAL_TIMEOUT if is_refused else KEEPALIVE_TIMEOUT,
            lingering_time=LINGERING_TIME,
            access_log=None,
            read_bufsize=READ_BUFFER,
        )
        self._alive.add(connection)
        return connection

    def note_malformed(self, client: str | None, status: int) -> None:
        """Log a request that did not parse, unless there are too many of them."""
        now = asyncio.get_running_loop().time()
        if now - self._minute >= 60:
            left_out = max(0, self._malformed - LINES_PER_MINUTE)
            if left_out:
                log.info("malformed_requests", left_out=left_out)
            self._minute, self._malformed = now, 0
        self._malformed += 1
        if self._malformed <= LINES_PER_MINUTE:
            log.info("malformed_request", client=client, status=status)


async def _refuse(_: BaseRequest) -> StreamResponse:
    """Tell a client that there are too many, in the way that makes docker ask elsewhere at once."""
    response = _error(429, "TOOMANYREQUESTS", "too many connections to this cache; try again soon")
    response.headers[hdrs.RETRY_AFTER] = str(RETRY_AFTER)
    return response


def _error(status: int, code: str, message: str) -> Response:
    document = {"errors": [{"code": code, "message": message}]}
    response: Response = json_response(document, status=status)
    response.force_close()
    return response
