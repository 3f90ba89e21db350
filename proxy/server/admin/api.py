"""The admin API: a table of routes, what their handlers are given, and what becomes of their answers.

Every operation exists once, as a handler here; the commands are its clients (`proxy/cli/api.py`).

To add an operation:

1. A module `proxy/server/api_<feature>.py` with a function `routes(...) -> list[Route]` that takes what the handlers
   need. A path is `/api/v1/<noun>` with `{named}` parts. Image references hold slashes and colons: they go into the
   query or the body.
2. A handler is given a `Call`: `call.query(Kind)`, `await call.document(Kind)` with a `Kind` derived from `Input`,
   `call.names["part"]`, or `call.chunks()` for the body as it comes. What does not fit becomes a 400 that names the field.
3. It is an `async def` that returns a document (anything msgspec encodes; None is 204) or a `Download`; or an async
   generator of documents, the events of a long operation, each of which is sent at once as a line of JSON. It raises the classes
   of `proxy/errors.py`: before the first event they become a status (`OUTCOMES`), after it the last event,
   `{"error": {"code", "message"}}`. A client that leaves cancels its handler, and the generator is closed.
4. Put the routes into `open_cache` (`proxy/app.py`), and paths and schemas into `openapi.json`: a test compares.
5. The command, in `proxy/cli/<feature>.py`: `with admin_api(load_config(path, store)) as api:` and then
   `api.get("/api/v1/…", key=value)`, `api.post(path, document)`, `for event in api.stream("POST", path, document)`,
   `api.stream("POST", path, upload=file)`, `api.download(path, document, file)`. Errors arrive as the classes that
   the handler raised, so exit codes hold; `main.add_command` and a section in docs/commands.md finish it.
"""

import asyncio
import os
import re
import socket
import struct
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any, TypeVar
from urllib.parse import unquote

import msgspec
from aiohttp import hdrs
from aiohttp.web import BaseRequest, Response, StreamResponse

from proxy import errors
from proxy.errors import InvalidRequestError, ProxyError, error_code, error_outcome
from proxy.log import LogWriter, get_logger, request_id
from proxy.metrics import Metrics

# A document in a request has at most so many bytes; what is larger is an upload, and streams.
MAX_DOCUMENT_SIZE = 4 << 20

_UCRED = struct.Struct("=iII")  # Linux's struct ucred: process, user, group
_HEADERS = {hdrs.CACHE_CONTROL: "no-store", "X-Content-Type-Options": "nosniff"}
_NDJSON = "application/x-ndjson"

T = TypeVar("T")

log = get_logger(__name__)


class RequestModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request holds, in its body or its query; a field that is not known is an error."""


@dataclass(frozen=True, slots=True)
class ByteStream:
    """An answer that is bytes. A failure among them cuts the connection: the body stays short."""

    chunks: AsyncGenerator[bytes, None]
    content_type: str


class AdminRequest:
    """A request to a handler. `names` are the named parts of its path."""

    def __init__(self, request: BaseRequest, path_params: Mapping[str, str]) -> None:
        self.path_params = path_params
        self._request = request

    def parse_query(self, model: type[T]) -> T:
        """Return the query as a `kind`, numbers and booleans read from their text."""
        values = self._request.query
        if repeated := [name for name in values if len(values.getall(name)) > 1]:
            raise InvalidRequestError(f"the query has {repeated[0]!r} more than once")
        with _map_decode_errors("query"):
            return msgspec.convert(dict(values), model, strict=False)

    async def read_json(self, model: type[T]) -> T:
        """Return the JSON body as a `kind`. Raises `InvalidRequestError`."""
        if self._request.content_type != "application/json":
            raise InvalidRequestError("the body is not said to be JSON (Content-Type)")
        content = bytearray()
        async for chunk in self.iter_chunks():
            content += chunk
            if len(content) > MAX_DOCUMENT_SIZE:
                raise InvalidRequestError(f"the body has more than {MAX_DOCUMENT_SIZE} bytes")
        with _map_decode_errors("body"):
            return msgspec.json.decode(content, type=model)

    @property
    def is_trusted_local(self) -> bool:
        """Whether it came by a Unix socket, from the daemon's user or root: who may open what the daemon may."""
        transport = self._request.transport
        connection = transport and transport.get_extra_info("socket")
        if not connection or connection.family != socket.AF_UNIX:
            return False
        told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _, user, _ = _UCRED.unpack(told)
        return user in (0, os.geteuid())

    async def iter_chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes. Raises `ConnectionError` if the client leaves in its midst."""
        async for chunk in self._request.content.iter_any():
            yield chunk


Handler = Callable[[AdminRequest], Awaitable[object] | AsyncGenerator[Any, None]]


@dataclass(frozen=True, slots=True)
class Route:
    """What answers a method on a path; a part of the path in braces has any value: `{digest}`."""

    method: str
    path: str
    handler: Handler

    def match(self, path: str) -> dict[str, str] | None:
        """Return the named parts of `path`, as it came on the wire, if it is this route's."""
        found = _compile_path(self.path).fullmatch(path)
        return {name: unquote(text) for name, text in found.groupdict().items()} if found else None


class AdminApiHandler:
    """Answers what is under `/api/`. `close` ends what still runs."""

    def __init__(
        self, routes: Iterable[Route], metrics: Metrics, access_log: LogWriter | None
    ) -> None:
        # Replaced by a reload; an operation goes on with what it began with.
        self.routes = tuple(routes)
        self._metrics = metrics
        self._access_log = access_log
        self._request_ids = count(1)
        self._running: set[asyncio.Task[object]] = set()

    async def handle(self, request: BaseRequest) -> StreamResponse:
        """Answer any request; never raise anything but `ConnectionError`."""
        request_id.set(f"admin-{next(self._request_ids)}")
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        status = 499
        try:
            response = await self._respond(request)
            status = response.status
        finally:
            self._running.discard(task)
            if self._access_log:
                path = request.raw_path[:300]
                self._access_log.log_request(
                    "admin_request",
                    client=request.remote or "admin.sock",
                    method=request.method,
                    path=path,
                    status=status,
                )
        return response

    async def close(self) -> None:
        """Cancel the operations that run, and wait until they are over."""
        running = self._running - {asyncio.current_task()}
        for task in running:
            task.cancel("the daemon stops")
        if running:
            await asyncio.wait(running)

    async def _respond(self, request: BaseRequest) -> StreamResponse:
        try:
            route, names = self._match_route(request)
            result = route.handler(AdminRequest(request, names))
            if isinstance(result, AsyncGenerator):
                return await self._send_events(request, result)
            document = await result
            if isinstance(document, ByteStream):
                return await self._send_stream(request, document)
        except _MethodNotAllowedError as error:
            response = api_error_response(InvalidRequestError(str(error)), 405)
            response.headers[hdrs.ALLOW] = error.allowed
            return response
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 (what nobody foresaw is logged and counted)
            return api_error_response(self._to_proxy_error(error))
        return _json_response(document)

    def _match_route(self, request: BaseRequest) -> tuple[Route, dict[str, str]]:
        path = request.raw_path.partition("?")[0]
        found = [(one, names) for one in self.routes if (names := one.match(path)) is not None]
        if not found:
            raise errors.NotFoundError(
                "there is nothing here; /api/v1/openapi.json says what there is"
            )
        for route, names in found:
            if route.method == request.method:
                return route, names
        raise _MethodNotAllowedError(", ".join(sorted({route.method for route, _ in found})))

    def _to_proxy_error(self, error: Exception) -> ProxyError:
        """Return `error` if it is one of ours; anything else is a bug."""
        if isinstance(error, ProxyError):
            return error
        self._metrics.count_internal_error()
        log.error("admin_request_failed", exc_info=error)
        return ProxyError("the cache failed inside; its log says how")

    async def _send_events(
        self, request: BaseRequest, events: AsyncGenerator[object, None]
    ) -> StreamResponse:
        async with aclosing(events):
            # Until there is an event, an error can still be a status.
            event = await anext(events, None)
            response = StreamResponse(headers={**_HEADERS, hdrs.CONTENT_TYPE: _NDJSON})
            await response.prepare(request)
            try:
                while event is not None:
                    await response.write(msgspec.json.encode(event) + b"\n")
                    event = await anext(events, None)
            except ConnectionError:
                raise
            except Exception as error:  # noqa: BLE001 (see _answer)
                last = _error_document(self._to_proxy_error(error))
                await response.write(msgspec.json.encode(last) + b"\n")
        await response.write_eof()
        return response

    async def _send_stream(self, request: BaseRequest, stream: ByteStream) -> StreamResponse:
        response = StreamResponse(headers={**_HEADERS, hdrs.CONTENT_TYPE: stream.content_type})
        async with aclosing(stream.chunks) as chunks:
            chunk = await anext(chunks, None)
            await response.prepare(request)
            try:
                while chunk is not None:
                    await response.write(chunk)
                    chunk = await anext(chunks, None)
            except ConnectionError:
                raise
            except Exception as error:
                reason = str(self._to_proxy_error(error))
                log.warning("admin_response_truncated", path=request.raw_path[:200], reason=reason)
                # As a `ConnectionError` it makes aiohttp close the connection without a word more.
                raise ConnectionError(reason) from error
        await response.write_eof()
        return response


class _MethodNotAllowedError(Exception):
    """The path is there, the method is not. `allowed` is the Allow header's value."""

    def __init__(self, allowed: str) -> None:
        super().__init__(f"this path takes {allowed}")
        self.allowed = allowed


@contextmanager
def _map_decode_errors(location: str) -> Iterator[None]:
    """Turn what msgspec raises inside into an `InvalidRequestError` that names the field."""
    try:
        yield
    except msgspec.DecodeError as error:  # a ValidationError is one
        reason, _, field = str(error).replace("`", "").partition(" - at $")
        where = f"{location}: {field.lstrip('.')}" if field else location
        raise InvalidRequestError(f"{where}: {reason[:1].lower()}{reason[1:]}") from error


@cache
def _compile_path(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(path)))


def api_error_response(error: ProxyError, status: int | None = None) -> Response:
    """Return the answer that says `error`."""
    if status is None:
        status = error_outcome(error).admin_status
    return _json_response(_error_document(error), status)


def _error_document(error: ProxyError) -> dict[str, dict[str, str]]:
    return {"error": {"code": error_code(error), "message": str(error)}}


def _json_response(document: object, status: int = 200) -> Response:
    if document is None:
        return Response(status=204, headers=_HEADERS)
    body = msgspec.json.encode(document)
    return Response(body=body, status=status, headers=_HEADERS, content_type="application/json")
