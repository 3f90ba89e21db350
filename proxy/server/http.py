"""HTTP/1.1 (RFC 9112) for `server.listen`: one protocol object per connection; llhttp parses the requests.

A connection answers its requests in order, one at a time. A request that is invalid, or that two parsers
could understand differently, gets an error in the form of the distribution specification, and its
connection is closed.
"""

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Executor
from functools import partial
from typing import Any, cast

import httptools

from proxy.errors import ProxyError
from proxy.log import get_logger
from proxy.server import sendfile
from proxy.server.clients.address import Networks, resolve_client
from proxy.server.clients.connection_limit import ConnectionSlot
from proxy.server.clients.proxied_connection import TrustedProxies
from proxy.server.clients.proxy_protocol import is_header_start
from proxy.server.repeated_requests import BODY_HEADERS, RepeatedRequests
from proxy.server.request import Request
from proxy.server.responses import Body, FileBody, Response, json_response, serialize_head
from proxy.server.send_turns import SENDFILE_SPEEDUP, SendTurns
from proxy.server.sendfile import BodySender, SocketWriter

# How long a connection may be idle, before its first request and between requests, in seconds.
KEEPALIVE_TIMEOUT = 75.0
# Time limits for reading a request, and for the request of a rejected connection, in seconds.
HEAD_TIMEOUT = 30.0
REJECTED_TIMEOUT = 5.0
# How long the server keeps reading after its last response, so that the client gets no reset, in seconds.
LINGERING_TIME = 2.0
# The size limit of request line and headers, in bytes, and the limit on the number of headers.
MAX_HEAD_SIZE = 64 << 10
MAX_HEADERS = 1024
# The body of a GET or HEAD is read and discarded up to this size, in bytes.
MAX_DISCARDED_BODY = 64 << 10
# The size limit of a request, including the framing and the trailer of its body, in bytes.
MAX_REQUEST_SIZE = 256 << 10
# Bytes that a client may send ahead during a response before the server stops reading.
MAX_PIPELINED_SIZE = 64 << 10
# Bytes parsed at a time: a parsed request takes many times as much memory as its bytes.
PARSE_SIZE = 16 << 10
# A body up to this size, in bytes, is sent with its head; a longer one in pieces, as the client reads it.
INLINE_BODY_SIZE = 64 << 10
# Further malformed requests are counted, but not logged.
MAX_MALFORMED_LOGS_PER_MINUTE = 10
# Seconds after which a rejected client may try again.
RETRY_AFTER = 5

_METHODS = {b"GET": "GET", b"HEAD": "HEAD"}
# The headers that the cache uses; all others are dropped during parsing.
_HEADERS: Mapping[bytes, str] = {
    spelling: name.decode()
    for name in (
        b"accept",
        b"authorization",
        b"connection",
        b"content-length",
        b"expect",
        b"forwarded",
        b"host",
        b"if-none-match",
        b"if-range",
        b"pullcache-fleet",
        b"pullcache-insist",
        b"pullcache-proven",
        b"range",
        b"traceparent",
        b"tracestate",
        b"transfer-encoding",
        b"user-agent",
        b"via",
        b"x-forwarded-for",
        b"x-sendfile-type",
    )
    for spelling in (name, name.title())
}
_HEAD_END = b"\r\n\r\n"
_BLANKS = frozenset(" \t")
_CLOSE = re.compile(r"(?:^|,)[ \t]*close[ \t]*(?:,|$)", re.IGNORECASE)
# uri-host [":" port], RFC 9112 section 3.2. It is empty if the target has no host.
_HOST = re.compile(r"(?:\[[\w.:~%-]+\]|[\w.~!$&'()*+,;=%-]*)(?::\d*)?", re.ASCII)
_NOT_HTTP = "the request is not valid HTTP"
_NOT_TLS = "the request is not valid HTTP but TLS; this port speaks plain HTTP"
_NOT_TRUSTED = (
    "the request is not valid HTTP but a PROXY header, by a proxy that server.trusted_proxies "
    "does not name"
)
# The type of the record that opens a TLS connection (RFC 8446 section 5.1).
_TLS_HANDSHAKE = b"\x16"

log = get_logger(__name__)


# Returns the response, or an awaitable of it if the handler must wait.
RequestHandler = Callable[[Request], Response | Awaitable[Response]]
AsyncHandler = Callable[[Request], Awaitable[Response]]


class _RefusedError(Exception):
    """Raised in a callback of the parser to end the parsing of a connection."""


class HttpConnection(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self, server: "HttpServer", slot: ConnectionSlot | None) -> None:
        self.transport: asyncio.Transport | None = None
        self._server = server
        self._slot = slot
        self._handler: RequestHandler = server.handler
        self._find_repeated = server.repeated.find
        self._keepalive_timeout = KEEPALIVE_TIMEOUT
        if slot and slot.is_rejected:
            self._handler = _reject
            self._keepalive_timeout = REJECTED_TIMEOUT
        self._loop = asyncio.get_running_loop()
        self._client = slot.address or None if slot else None
        # The proxies to believe, if this is the connection of one.
        self._proxies = server.proxies_before(self._client)
        self._scheme = "http"
        self._parser = httptools.HttpRequestParser(self)
        # The request that is being parsed.
        self._is_reading_request = False
        self._is_head_complete = False
        self._is_http_1_0 = False
        self._target = b""
        self._headers: dict[str, str] = {}
        self._header_count = self._body_size = self._head_size = self._request_size = 0
        self._head_tail = b""
        # Once set, nothing more is parsed.
        self._is_parsing_over = False
        self._error_status = 0
        self._is_tls_hello = self._is_proxy_header = False
        # Requests parsed but not answered, and bytes received but not parsed.
        self._requests: deque[Request] = deque()
        self._unparsed = bytearray()
        self._is_reading_paused = False
        # The response that is being sent.
        self._task: asyncio.Task[None] | None = None
        self._has_task_begun = self._is_cancelled = False
        self._is_queued = False
        # Opened for the first body that the kernel sends.
        self._writer: SocketWriter | None = None
        self._stall_timer: sendfile.StallTimer | None = None
        self._drained: asyncio.Future[None] | None = None
        self._is_writing_paused = False
        self._is_last = False
        self._is_draining = False
        self._is_lingering = False
        # The time at which an idle connection is closed; the timer fires then or earlier.
        self._deadline = self._timer_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    # Called by the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first request."""
        transport = cast("asyncio.Transport", transport)  # uvloop's class is not registered as one
        self.transport = transport
        if transport.get_extra_info("sslcontext"):
            self._scheme = "https"
        self._set_deadline(self._keepalive_timeout)
        self._server.on_connected(self)
        if self._slot and self._slot.received:
            self.data_received(self._slot.received)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio's name)
        """Stop everything that runs for this connection, and release its slot."""
        self.transport = None
        self._cancel_task()
        if self._timer:
            self._timer.cancel()
        if self._stall_timer:
            self._stall_timer.cancel()
        if self._drained and not self._drained.done():
            self._drained.set_exception(ConnectionResetError(sendfile.CLIENT_DISCONNECTED))
        self._end_parsing()
        self._requests.clear()
        if not self._task:
            self._close_writer()
        # They refer to this object: without them it is freed now, and not by the garbage collector.
        del self._parser
        self._timer = None
        self._server.discard(self)
        if self._slot:
            self._slot.release()

    def data_received(self, data: bytes) -> None:
        """Parse and answer the received bytes, or keep them until earlier requests are answered."""
        if self._is_parsing_over:
            return
        if self._unparsed or self._is_busy or len(data) > PARSE_SIZE:
            self._unparsed += data
            self._continue()
            return
        if self._is_reading_request or self._requests:
            self._parse(data)
        elif repeated := self._find_repeated(data, self._client, self._scheme, self._proxies):
            self._answer(repeated)
            return
        else:
            self._parse(data)
            self._remember(data)
        self._answer_parsed()

    def pause_writing(self) -> None:
        """Start the stall timer: the client reads more slowly than the server sends."""
        self._is_writing_paused = True
        if self._stall_timer:
            self._stall_timer.restart()
        elif self._slot and self.transport:
            self._stall_timer = sendfile.StallTimer(self.transport, self._abort_stalled)

    def resume_writing(self) -> None:
        """Continue. The stall timer goes on, as the next pause is near: over TLS, one follows each piece."""
        self._is_writing_paused = False
        if self._drained and not self._drained.done():
            self._drained.set_result(None)
        elif not self._is_busy:
            # Later, because the transport is still inside this callback.
            self._loop.call_soon(self._continue)

    # The end of a connection.

    def _close_writer(self) -> None:
        """Close the duplicate of the socket, so that the kernel closes the connection."""
        if self._writer:
            self._writer.close()
            self._writer = None

    def close_gracefully(self, drain_timeout: float) -> None:
        """Close after the current request, or after one that begins within `drain_timeout` seconds.

        A connection that was just accepted may have a request in flight.
        """
        self._is_draining = True
        if not self._is_busy:
            self._set_deadline(drain_timeout)

    def abort(self) -> None:
        """Close now; a response that is being sent is cut short."""
        self._cancel_task()
        if self.transport:
            self.transport.close()

    def _close_lingering(self) -> None:
        """End the connection, but keep reading for `LINGERING_TIME`.

        Unread data would make the kernel reset the connection, and clients do not resume after a reset.
        """
        transport = self.transport
        if transport is None:
            return
        self._is_lingering = True
        self._requests.clear()
        self._unparsed.clear()
        if not transport.can_write_eof():  # TLS
            transport.close()
            return
        transport.write_eof()
        self._resume_reading()
        self._set_deadline(LINGERING_TIME)

    def _abort_stalled(self) -> None:
        self._stall_timer = None
        if self.transport and self._is_writing_paused:
            log.info("client_stalled", client=self._client)
            self.transport.abort()

    # Time.

    def _set_deadline(self, seconds: float) -> None:
        """Close the connection in `seconds`. The timer is moved lazily, as most deadlines are extended."""
        self._deadline = deadline = self._loop.time() + seconds
        if self._timer is None or self._timer_at > deadline:
            self._start_timer()

    def _start_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer_at = self._deadline
        self._timer = self._loop.call_at(self._deadline, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self.transport is None:
            return
        if self._is_busy and not self._is_lingering:
            self._set_deadline(self._keepalive_timeout)
        elif self._loop.time() < self._deadline - 0.001:
            self._start_timer()
        else:
            self.transport.close()

    # Reading.

    @property
    def _is_busy(self) -> bool:
        """Whether a response is being sent, so that the next request has to wait."""
        return self._task is not None or self._is_writing_paused or self._is_queued

    def _pause_reading(self) -> None:
        if self.transport and not self._is_reading_paused:
            self._is_reading_paused = True
            self.transport.pause_reading()

    def _resume_reading(self) -> None:
        if self.transport and self._is_reading_paused:
            self._is_reading_paused = False
            self.transport.resume_reading()

    def _continue(self) -> None:
        """Answer parsed requests and parse more bytes, until a response must wait."""
        self._answer_parsed()
        while self._unparsed and not (self._is_busy or self._is_parsing_over):
            data = bytes(self._unparsed[:PARSE_SIZE])
            del self._unparsed[:PARSE_SIZE]
            self._parse(data)
            self._answer_parsed()
        if len(self._unparsed) < MAX_PIPELINED_SIZE:
            self._resume_reading()
        else:
            self._pause_reading()

    def _parse(self, data: bytes) -> None:
        was_reading = self._is_reading_request
        if was_reading and (status := self._check_size(data)):
            self._end_parsing(status)
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The server supports no upgrade; the bytes after the request are not HTTP/1.1.
            self._end_parsing()
        except httptools.HttpParserError as error:
            self._is_tls_hello = not was_reading and data.startswith(_TLS_HANDSHAKE)
            self._is_proxy_header = not was_reading and is_header_start(data)
            self._on_parser_error(error)
        if self._is_reading_request and not was_reading:
            # The head begins after the end of the previous request.
            self._head_size = len(data) - (data.rfind(_HEAD_END) + 4 if _HEAD_END in data else 0)
            self._request_size = self._head_size
            self._head_tail = data[-3:]
            self._set_deadline(min(HEAD_TIMEOUT, self._keepalive_timeout))

    def _remember(self, data: bytes) -> None:
        is_alone = len(self._requests) == 1
        if is_alone and not (self._is_reading_request or self._error_status):
            self._server.repeated.remember(data, self._requests[0])

    def _on_parser_error(self, error: httptools.HttpParserError) -> None:
        if self._is_parsing_over:
            return  # the parser rejects bytes after the last request of a connection
        is_bug = isinstance(error, httptools.HttpParserCallbackError) and not self._error_status
        if is_bug:
            log.error("request_failed", exc_info=error.__context__)
        self._end_parsing(self._error_status or (500 if is_bug else 400))

    def _check_size(self, data: bytes) -> int:
        """Count bytes that continue a request; return an error status if it is too long, else 0.

        A request that arrives in a single read is shorter than any limit.
        """
        self._request_size += len(data)
        if self._is_head_complete:
            return 413 if self._request_size > MAX_REQUEST_SIZE else 0
        joined = self._head_tail + data
        end = joined.find(_HEAD_END)
        self._head_size += len(data) if end < 0 else end + 4 - len(self._head_tail)
        self._head_tail = joined[-3:]
        return 431 if self._head_size > MAX_HEAD_SIZE else 0

    def _end_parsing(self, error_status: int = 0) -> None:
        self._is_parsing_over = True
        self._error_status = error_status
        self._unparsed.clear()

    def _refuse(self, status: int) -> None:
        self._error_status = status
        raise _RefusedError

    # Called by the parser.

    def on_message_begin(self) -> None:
        """Start a request."""
        self._is_reading_request = True

    def on_url(self, url: bytes) -> None:
        """Append a piece of the target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header of the head; headers of a trailer are ignored."""
        self._header_count += 1
        known = _HEADERS.get(name)
        if known is None:
            known = _HEADERS.get(name.lower())
            if known is None:
                return
        headers = self._headers
        text = value.decode("latin-1")
        if text[-1:] in _BLANKS:
            text = text.rstrip(" \t")
        if known not in headers:
            headers[known] = text
        elif known == "host":
            self._refuse(400)
        elif not self._is_head_complete:
            headers[known] += f", {text}"

    def on_headers_complete(self) -> None:
        """Check a complete head for errors that the parser accepts.

        See RFC 9112 sections 2.3, 3.2, 6.1 and 6.3.
        """
        headers = self._headers
        if self._header_count > MAX_HEADERS:
            self._refuse(431)
        if "connection" in headers or not self._parser.should_keep_alive():
            # All other requests are HTTP/1.1.
            version = self._parser.get_http_version()
            self._is_http_1_0 = version == "1.0"
            if version not in ("1.1", "1.0"):
                self._refuse(400)
        host = headers.get("host")
        is_valid = self._is_http_1_0 if host is None else _HOST.fullmatch(host)
        if not is_valid:
            self._refuse(400)
        if not BODY_HEADERS.isdisjoint(headers):
            self._begin_body(headers)

    def _begin_body(self, headers: Mapping[str, str]) -> None:
        self._is_head_complete = True
        coding = headers.get("transfer-encoding")
        length = headers.get("content-length", "0")
        if coding is not None and (self._is_http_1_0 or coding.lower() != "chunked"):
            self._refuse(400)
        is_discarded = (
            self._parser.get_method() in _METHODS
            and "expect" not in headers
            and not self._parser.should_upgrade()
            and int(length) <= MAX_DISCARDED_BODY
        )
        if (coding is not None or int(length)) and not is_discarded:
            # Respond without reading the body, which the client may still be sending.
            self._add_request(keep_alive=False, has_unread_body=True)
            self._end_parsing()
            raise _RefusedError

    def on_body(self, body: bytes) -> None:
        """Discard the body of a GET or HEAD."""
        self._body_size += len(body)
        if self._body_size > MAX_DISCARDED_BODY:
            self._refuse(413)

    def on_message_complete(self) -> None:
        """End a request."""
        parser = self._parser
        keep_alive = parser.should_keep_alive() and not parser.should_upgrade()
        if "connection" in self._headers:
            # RFC 9112 section 9.3: `close` wins. With HTTP/1.0, the parser lets keep-alive win.
            keep_alive &= _CLOSE.search(self._headers["connection"]) is None
        self._add_request(keep_alive)
        if not keep_alive:
            self._end_parsing()

    def _add_request(self, keep_alive: bool, has_unread_body: bool = False) -> None:
        method = self._parser.get_method()
        request = Request(
            _METHODS.get(method) or method.decode("ascii"),
            self._target.decode("ascii"),
            self._headers,
            self._find_client(),
            self._scheme,
            self._is_http_1_0,
            keep_alive,
            has_unread_body,
            self._proxies is not None,
        )
        self._requests.append(request)
        self._is_reading_request = self._is_head_complete = self._is_http_1_0 = False
        self._target = b""
        self._headers = {}
        self._header_count = self._body_size = 0

    def _find_client(self) -> str | None:
        if self._proxies is None or self._client is None:
            return self._client
        return resolve_client(self._client, self._headers, self._proxies)

    # Responses.

    def _answer_parsed(self) -> None:
        """Answer parsed requests until a response must wait."""
        requests = self._requests
        while requests and not self._is_busy:
            self._answer(requests.popleft())
        if self._error_status and not (requests or self._is_busy):
            self._send_parse_error()

    def _answer(self, request: Request) -> None:
        server = self._server
        if server.trace_requests and self._handler is server.handler:
            traced = server.trace_requests(self._respond)
            self._start_task(request, traced(request))
            return
        answer = self._handler(request)
        if request.is_peer and self._slot:
            self._slot.leave_client()
        if type(answer) is not Response or self.transport is None:
            self._start_task(request, self._respond(request, answer))
            return
        body = answer.body
        if type(body) is bytes and len(body) <= INLINE_BODY_SIZE:
            head, is_last = self._serialize_head(request, answer)
            self.transport.write(head if request.method == "HEAD" else head + body)
            if answer.on_end:
                answer.end(len(body), None)
            self._end_request(request, is_last=is_last)
        elif type(body) is FileBody:
            self._answer_with_file(request, answer, body, self._make_sender(self.transport))
        else:
            self._start_task(request, self._respond(request, answer))

    def _answer_with_file(
        self, request: Request, response: Response, body: FileBody, sender: BodySender
    ) -> None:
        """Send a file: without a task, which would take three times as long, if the kernel may take all of it."""
        turns, cost = self._server.turns, body.length // SENDFILE_SPEEDUP
        if not sender.can_send_now(body):
            self._start_task(request, self._respond(request, response, sender))
        elif turns.try_take(cost):
            self._send_file(request, response, body, sender)
        else:
            self._is_queued = True
            send = partial(self._send_queued_file, request, response, body, sender)
            turns.call_later(cost, send)

    def _send_file(
        self, request: Request, response: Response, body: FileBody, sender: BodySender
    ) -> None:
        head, is_last = self._serialize_head(request, response)
        if sender.send_now(head, body):
            body.blob.close()
            response.end(sender.bytes_sent, None)
            self._end_request(request, is_last=is_last)
        else:
            self._start_task(request, self._respond(request, response, sender))

    def _send_queued_file(
        self, request: Request, response: Response, body: FileBody, sender: BodySender
    ) -> None:
        self._is_queued = False
        if self.transport is None:
            body.blob.close()
            response.end(0, ConnectionResetError(sendfile.CLIENT_DISCONNECTED))
            return
        self._send_file(request, response, body, sender)
        self._continue()

    def _serialize_head(self, request: Request, response: Response) -> tuple[bytes, bool]:
        """Return the head of a response, and whether the connection is closed after it."""
        is_last = not request.keep_alive or response.should_close or self._is_draining
        return serialize_head(request, response, is_last=is_last), is_last

    def _end_request(self, request: Request, *, is_last: bool) -> None:
        """Wait for the next request, or close the connection."""
        if not is_last:
            self._set_deadline(self._keepalive_timeout)
            return
        self._end_parsing()
        self._requests.clear()
        if request.has_unread_body:
            self._close_lingering()
        elif self.transport:
            self.transport.close()

    # Responses that must wait, each in its own task.

    def _start_task(self, request: Request, responding: Awaitable[Response]) -> None:
        self._has_task_begun = False
        self._task = self._server.start_task(self._run(request, responding))

    def _cancel_task(self) -> None:
        """Cancel the response: if its task has not begun, as soon as it does, so that it frees everything."""
        self._is_cancelled = True
        if self._task and self._has_task_begun:
            self._task.cancel()

    async def _run(self, request: Request, responding: Awaitable[Response]) -> None:
        """Send a response and continue with the next request. A body cut short ends the connection."""
        is_complete = False
        self._has_task_begun = True
        if self._is_cancelled and self._task:
            self._task.cancel()
        try:
            await responding
            is_complete = True
        except (ConnectionError, ProxyError):
            pass  # `Response.end` reports them
        except Exception:
            log.exception("request_failed", path=request.target[:200])
        finally:
            self._task = None
            if self.transport is None:
                self._close_writer()
        if self.transport is None:
            return
        if not is_complete:
            self._end_parsing()
            self._close_lingering()
            return
        is_last = self._is_last or self._is_draining
        self._end_request(request, is_last=is_last)
        self._continue()

    def _make_sender(self, transport: asyncio.Transport) -> BodySender:
        if self._writer is None:
            self._writer = SocketWriter.open(transport)
        server = self._server
        return BodySender(transport, self._writer, self._drain, server.threads, server.turns)

    async def _respond(
        self,
        request: Request,
        answer: Response | Awaitable[Response] | None = None,
        sender: BodySender | None = None,
    ) -> Response:
        """Answer a request; return the response when it is sent completely.

        `sender` may have sent the beginning of it. Raises `ConnectionError` and `ProxyError` if the body was cut short.
        """
        answer = answer or self._handler(request)
        response = answer if isinstance(answer, Response) else await answer
        body = response.body
        sent = 0
        gone = ConnectionResetError(sendfile.CLIENT_DISCONNECTED)
        error: Exception | None = gone
        try:
            head, self._is_last = self._serialize_head(request, response)
            transport = self.transport
            if transport is None:
                raise gone
            sender = sender or self._make_sender(transport)
            try:
                if request.method == "HEAD":
                    transport.write(head)
                elif isinstance(body, bytes):
                    await sender.send_copied(head, body)
                else:
                    await sender.send(head, body)
                error = None
            finally:
                sent = sender.bytes_sent
        except (ConnectionError, ProxyError) as cause:
            error = cause
            raise
        finally:
            response.end(sent, error)
            if isinstance(body, Body):
                await body.resources.aclose()
            elif isinstance(body, FileBody):
                body.blob.close()
        return response

    async def _drain(self) -> None:
        """Wait until the transport takes more. Raises `ConnectionError` if the client has disconnected."""
        if self.transport is None or self.transport.is_closing():
            raise ConnectionResetError(sendfile.CLIENT_DISCONNECTED)
        if self._is_writing_paused:
            self._drained = self._loop.create_future()
            try:
                await self._drained
            finally:
                self._drained = None

    def _send_parse_error(self) -> None:
        status, self._error_status = self._error_status, 0
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if self._is_tls_hello:
            # podman and skopeo try TLS first wherever plain HTTP is allowed.
            log.debug("tls_on_plain_port", client=self._client)
            message = _NOT_TLS
        else:
            message = _NOT_TRUSTED if self._is_proxy_header else _NOT_HTTP
            self._server.log_malformed(self._client, status, message)
        response = closing_error_response(status, "UNSUPPORTED", message)
        head = serialize_head(None, response, is_last=True)
        assert isinstance(response.body, bytes)
        transport.write(head + response.body)
        self._close_lingering()


class HttpServer:
    """Creates the protocol of each connection, and closes all connections."""

    def __init__(
        self,
        handler: RequestHandler,
        threads: Executor,
        group: asyncio.TaskGroup,
        trace_requests: Callable[[AsyncHandler], AsyncHandler] | None = None,
        proxies: TrustedProxies | None = None,
    ) -> None:
        """Initialize the server.

        `threads` read bytes that are not in memory; `group` owns the tasks of responses that must wait.
        `trace_requests` wraps the handling of each request in a span. The headers of trusted `proxies` say
        which client a request is from.
        """
        self.handler = handler
        self._proxies = proxies
        self.threads = threads
        self.trace_requests = trace_requests
        self.turns = SendTurns()
        self.all_closed = asyncio.Event()
        self._group = group
        self._open_connections: set[HttpConnection] = set()
        self._drain_timeout: float | None = None
        self._malformed_count = 0
        self._minute_start = 0.0
        self.repeated = RepeatedRequests()

    def proxies_before(self, address: str | None) -> Networks | None:
        """Return the trusted proxies if `address` is one of them."""
        networks = self._proxies.networks if self._proxies else None
        return networks if networks and address and address in networks else None

    def __call__(self, slot: ConnectionSlot | None = None) -> HttpConnection:
        """Return the protocol of a new connection."""
        connection = HttpConnection(self, slot)
        self._open_connections.add(connection)
        return connection

    def start_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a response in a task of the group."""
        return self._group.create_task(work)

    def on_connected(self, connection: HttpConnection) -> None:
        """Close a new connection gracefully if the drain has already begun."""
        if self._drain_timeout is not None:
            connection.close_gracefully(self._drain_timeout)

    def discard(self, connection: asyncio.BaseProtocol) -> None:
        """Remove a connection, including one that was never established."""
        assert isinstance(connection, HttpConnection)
        self._open_connections.discard(connection)
        if self._drain_timeout is not None and not self._open_connections:
            self.all_closed.set()

    def close_gracefully(self, drain_timeout: float) -> None:
        """Close each connection after its current request, or one begun within `drain_timeout` seconds.

        `all_closed` is set when all connections are closed. A second call does nothing.
        """
        if self._drain_timeout is not None:
            return
        self._drain_timeout = drain_timeout
        for connection in list(self._open_connections):
            connection.close_gracefully(drain_timeout)
        if not self._open_connections:
            self.all_closed.set()

    async def close(self) -> None:
        """Close all connections now; responses that are being sent are cut short."""
        for connection in list(self._open_connections):
            connection.abort()

    def log_malformed(self, client: str | None, status: int, reason: str) -> None:
        """Log a malformed request, unless there were too many in this minute."""
        now = asyncio.get_running_loop().time()
        if now - self._minute_start >= 60:
            left_out = max(0, self._malformed_count - MAX_MALFORMED_LOGS_PER_MINUTE)
            if left_out:
                log.info("malformed_requests_suppressed", left_out=left_out)
            self._minute_start, self._malformed_count = now, 0
        self._malformed_count += 1
        if self._malformed_count <= MAX_MALFORMED_LOGS_PER_MINUTE:
            log.info("malformed_request_rejected", client=client, status=status, reason=reason)


def closing_error_response(status: int, code: str, message: str) -> Response:
    """Return an error in the form of the specification that closes the connection."""
    document = {"errors": [{"code": code, "message": message}]}
    response = json_response(document, status=status)
    response.should_close = True
    return response


def _reject(_: Request) -> Response:
    """Answer 429 to a connection over the limit, so that docker turns to another host at once."""
    response = closing_error_response(
        429, "TOOMANYREQUESTS", "too many connections to this cache; try again soon"
    )
    response.headers["Retry-After"] = str(RETRY_AFTER)
    return response
