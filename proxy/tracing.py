"""Traces: what a client's request had to wait for. They cost nothing, and import nothing, unless they are wanted.

The spans of a request hang together by its context, which the tasks that it starts inherit: a download, what
that asks upstream, its commit. What no traced request has begun is not noted.
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from aiohttp import ClientHandlerType, ClientRequest, ClientResponse

from proxy.errors import ConfigError
from proxy.log import request_id

if TYPE_CHECKING:
    from proxy.otel import OtelTracer

# Takes the server's request and returns its response, when all of it is sent. The server's types are
# of a layer above.
HttpHandler = Callable[[Any], Awaitable[Any]]

_PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_REGISTRY_ROUTE = re.compile(r"/v2/.+/(manifests|blobs|tags|referrers)/[^/]+")
# Who watches over the daemon asks for these all the time.
_UNTRACED_PATHS = ("/healthz", "/readyz", "/metrics")

_tracer: ContextVar["OtelTracer | None"] = ContextVar("spans", default=None)


def check_tracing(*, is_on: bool) -> None:
    """Raise `ConfigError` if traces are wanted and cannot be sent. Blocks."""
    if is_on:
        _load_tracer()


@asynccontextmanager
async def open_tracing(
    version: str, *, is_on: bool
) -> AsyncIterator[Callable[[HttpHandler], HttpHandler] | None]:
    """Yield what makes a handler one whose requests are traced; None if not `is_on`.

    Raises `ConfigError`.
    """
    if not is_on:
        yield None
        return
    spans = await asyncio.to_thread(_create_tracer, version)
    try:
        yield lambda handler: _trace_requests(handler, spans)
    finally:
        await asyncio.to_thread(spans.close)


def _load_tracer() -> "type[OtelTracer]":
    try:
        from proxy.otel import OtelTracer  # noqa: PLC0415 - brings an extra, which few have
    except ImportError as error:
        raise ConfigError(
            "server.tracing: OpenTelemetry is not installed (pip install 'pullcache[opentelemetry]')"
        ) from error
    protocol = next(filter(None, map(os.environ.get, _PROTOCOL_VARIABLES)), "http/protobuf")
    if protocol != "http/protobuf":
        raise ConfigError(
            f"server.tracing: traces go by http/protobuf, not by {protocol} (change "
            "OTEL_EXPORTER_OTLP_PROTOCOL; collectors take it at port 4318)"
        )
    return OtelTracer


def _create_tracer(version: str) -> "OtelTracer":
    spans = _load_tracer()
    try:
        return spans(version)
    except (OSError, ValueError) as error:
        raise ConfigError(f"server.tracing: a variable OTEL_* cannot be used: {error}") from error


def span(name: str) -> AbstractContextManager[dict[str, Any]]:
    """Note how long the block takes, and what it puts into the dictionary that it is given."""
    spans = _tracer.get()
    return spans.internal_span(name) if spans else nullcontext({})


def record_span(name: str, seconds: float) -> None:
    """Note what took so many seconds in all and has just ended."""
    if spans := _tracer.get():
        spans.record_span(name, seconds)


async def trace_upstream_request(
    request: ClientRequest, handler: ClientHandlerType
) -> ClientResponse:
    """Note what upstream is asked, until its answer begins, and tell it of the trace.

    What follows `?` is not noted, since signed URLs are secrets. Only `traceparent` is told: it names nobody.
    """
    spans = _tracer.get()
    if spans is None:
        return await handler(request)
    attributes = {
        "http.request.method": request.method,
        "url.full": str(request.url.with_user(None).with_query(None)),
        "server.address": request.url.host or "",
        "server.port": request.url.port or 0,
    }
    with spans.client_span(request.method, attributes) as more:
        request.headers["traceparent"] = spans.traceparent()
        response = await handler(request)
        more["http.response.status_code"] = response.status
    return response


def _trace_requests(handler: HttpHandler, tracer: "OtelTracer") -> HttpHandler:
    """Return a handler whose requests are spans, in the trace of a client that sends `traceparent`."""

    async def handle(request: Any) -> Any:
        path = request.path
        if path in _UNTRACED_PATHS:
            return await handler(request)
        _tracer.set(tracer)
        match = _REGISTRY_ROUTE.fullmatch(path)
        route = f"/v2/{{name}}/{match[1]}/{{reference}}" if match else "/"
        attributes = {
            "http.request.method": request.method,
            "http.route": route,
            "url.scheme": request.scheme,
            "url.path": path[:300],
            "client.address": request.client or "",
            "user_agent.original": request.headers.get("user-agent", "")[:200],
        }
        with tracer.server_span(f"{request.method} {route}", attributes, request.headers) as more:
            try:
                response = await handler(request)
            finally:
                more["pullcache.request"] = request_id.get()
            more["http.response.status_code"] = response.status
            more["pullcache.cache_status"] = response.headers.get("Cache-Status", "")
        return response

    return handle
