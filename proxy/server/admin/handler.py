"""Dispatch requests of the admin API to their routes, and send what the handlers return."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from itertools import count

import msgspec
from aiohttp import hdrs
from aiohttp.web import BaseRequest, Response, StreamResponse

from proxy.errors import (
    InvalidRequestError,
    NotFoundError,
    ProxyError,
    error_code,
    error_outcome,
)
from proxy.log import LogWriter, get_logger, request_id
from proxy.metrics import Metrics
from proxy.server.admin.actor import Actor
from proxy.server.admin.api import AdminRequest, ByteStream, Route

COMMON_HEADERS = {hdrs.CACHE_CONTROL: "no-store", "X-Content-Type-Options": "nosniff"}
_NDJSON = "application/x-ndjson"
# nginx's status for a client that disconnected; it appears only in the log.
_CLIENT_CLOSED_REQUEST = 499

log = get_logger(__name__)


class AdminApiHandler:
    """The handler of everything under `/api/`. A reload replaces `routes`."""

    def __init__(
        self, routes: Iterable[Route], metrics: Metrics, access_log: LogWriter | None
    ) -> None:
        self.routes = tuple(routes)
        self._metrics = metrics
        self._access_log = access_log
        self._request_ids = count(1)
        self._running: set[asyncio.Task[object]] = set()

    async def handle(self, request: BaseRequest, actor: Actor) -> StreamResponse:
        """Respond to a request of `actor`. Raises only `ConnectionError`, if the client disconnects."""
        request_id.set(f"admin-{next(self._request_ids)}")
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        status = _CLIENT_CLOSED_REQUEST
        try:
            response = await self._respond(request, actor)
            status = response.status
        finally:
            self._running.discard(task)
            if self._access_log:
                self._access_log.log_request(
                    "admin_request",
                    client=request.remote or "admin.sock",
                    actor=str(actor),
                    method=request.method,
                    path=request.raw_path[:300],
                    status=status,
                )
        return response

    async def close(self) -> None:
        """Cancel the running operations, and wait until they have ended."""
        running = self._running - {asyncio.current_task()}
        for task in running:
            task.cancel("the daemon is shutting down")
        if running:
            await asyncio.wait(running)

    async def _respond(self, request: BaseRequest, actor: Actor) -> StreamResponse:
        try:
            path = request.raw_path.partition("?")[0]
            route, path_params = self.find_route(request.method, path)
            route.check_role(actor)
            result = route.handler(AdminRequest(request, path_params, actor))
            if isinstance(result, AsyncGenerator):
                return await self._send_events(request, result)
            document = await result
            if isinstance(document, ByteStream):
                return await self._send_stream(request, document)
        except MethodNotAllowedError as error:
            response = api_error_response(InvalidRequestError(str(error)), 405)
            response.headers[hdrs.ALLOW] = error.allowed
            return response
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 (unexpected errors are logged and counted)
            return api_error_response(self.to_proxy_error(error))
        return _json_response(document)

    def find_route(self, method: str, path: str) -> tuple[Route, dict[str, str]]:
        """Return the route of a path, still percent-encoded, and the parameters in it.

        Raises `NotFoundError`, and `MethodNotAllowedError` if the path has other methods only.
        """
        matches = [
            (route, path_params)
            for route in self.routes
            if (path_params := route.match(path)) is not None
        ]
        if not matches:
            raise NotFoundError("not found; /api/v1/openapi.json lists the paths")
        for route, path_params in matches:
            if route.method == method:
                return route, path_params
        raise MethodNotAllowedError(", ".join(sorted({route.method for route, _ in matches})))

    def to_proxy_error(self, error: Exception) -> ProxyError:
        """Return a `ProxyError` as it is; log and count any other error, and hide its message."""
        if isinstance(error, ProxyError):
            return error
        self._metrics.count_internal_error()
        log.error("admin_request_failed", exc_info=error)
        return ProxyError("internal error; see the daemon's log")

    async def _send_events(
        self, request: BaseRequest, events: AsyncGenerator[object, None]
    ) -> StreamResponse:
        async with aclosing(events):
            # The headers wait for the first event: an error before it still becomes a status.
            event = await anext(events, None)
            response = StreamResponse(headers={**COMMON_HEADERS, hdrs.CONTENT_TYPE: _NDJSON})
            await response.prepare(request)
            try:
                while event is not None:
                    await response.write(msgspec.json.encode(event) + b"\n")
                    event = await anext(events, None)
            except ConnectionError:
                raise
            except Exception as error:  # noqa: BLE001 (as in `_respond`)
                last_event = _error_document(self.to_proxy_error(error))
                await response.write(msgspec.json.encode(last_event) + b"\n")
        await response.write_eof()
        return response

    async def _send_stream(self, request: BaseRequest, stream: ByteStream) -> StreamResponse:
        response = StreamResponse(
            headers={**COMMON_HEADERS, hdrs.CONTENT_TYPE: stream.content_type}
        )
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
                reason = str(self.to_proxy_error(error))
                log.warning("admin_response_truncated", path=request.raw_path[:200], reason=reason)
                # Makes aiohttp close the connection, so that the body is incomplete for the client.
                raise ConnectionError(reason) from error
        await response.write_eof()
        return response


class MethodNotAllowedError(Exception):
    """The path exists, but not with this method. `allowed` is the value of the Allow header."""

    def __init__(self, allowed: str) -> None:
        super().__init__(f"method not allowed; this path supports {allowed}")
        self.allowed = allowed


def api_error_response(error: ProxyError, status: int | None = None) -> Response:
    """Return the response for `error`, by default with the status of its class."""
    if status is None:
        status = error_outcome(error).admin_status
    return _json_response(_error_document(error), status)


def _error_document(error: ProxyError) -> dict[str, dict[str, str]]:
    return {"error": {"code": error_code(error), "message": str(error)}}


def _json_response(document: object, status: int = 200) -> Response:
    if document is None:
        return Response(status=204, headers=COMMON_HEADERS)
    body = msgspec.json.encode(document)
    return Response(
        body=body, status=status, headers=COMMON_HEADERS, content_type="application/json"
    )
