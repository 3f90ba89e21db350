"""Tracing: spans for the steps that each client's request waits for. If off, it imports nothing.

The spans of a request are connected by its context, which its tasks inherit: a download, its
upstream requests, its commit. Work that no traced request started has no span.
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

# Takes the server's request and returns its response, once it is sent completely. The server's
# types belong to a layer above.
HttpHandler = Callable[[Any], Awaitable[Any]]

_PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_REGISTRY_ROUTE = re.compile(r"/v2/.+/(manifests|blobs|tags|referrers)/[^/]+")
# Monitoring systems request these every few seconds.
_UNTRACED_PATHS = ("/healthz", "/readyz", "/metrics")

_tracer: ContextVar["OtelTracer | None"] = ContextVar("tracer", default=None)


def check_tracing(*, is_on: bool) -> None:
    """Raise `ConfigError` if tracing is on but cannot work. Blocks."""
    if is_on:
        _load_tracer_class()


@asynccontextmanager
async def open_tracing(
    version: str, *, is_on: bool
) -> AsyncIterator[Callable[[HttpHandler], HttpHandler] | None]:
    """Yield a function that wraps a handler to trace its requests; None if not `is_on`.

    Raises `ConfigError`.
    """
    if not is_on:
        yield None
        return
    tracer = await asyncio.to_thread(_create_tracer, version)
    try:
        yield lambda handler: _trace_requests(handler, tracer)
    finally:
        await asyncio.to_thread(tracer.close)


def _load_tracer_class() -> "type[OtelTracer]":
    try:
        from proxy.otel import OtelTracer  # noqa: PLC0415 (an optional dependency)
    except ImportError as error:
        raise ConfigError(
            "server.tracing: OpenTelemetry is not installed "
            "(pip install 'pullcache[opentelemetry]')"
        ) from error
    protocol = next(filter(None, map(os.environ.get, _PROTOCOL_VARIABLES)), "http/protobuf")
    if protocol != "http/protobuf":
        raise ConfigError(
            f"server.tracing: traces are exported by http/protobuf, not by {protocol} (set "
            "OTEL_EXPORTER_OTLP_PROTOCOL; collectors accept it on port 4318)"
        )
    return OtelTracer


def _create_tracer(version: str) -> "OtelTracer":
    tracer_class = _load_tracer_class()
    try:
        return tracer_class(version)
    except (OSError, ValueError) as error:
        raise ConfigError(f"server.tracing: a variable OTEL_* is invalid: {error}") from error


def span(name: str) -> AbstractContextManager[dict[str, Any]]:
    """Record the block as a span, with the attributes that it puts into the dictionary."""
    tracer = _tracer.get()
    return tracer.internal_span(name) if tracer else nullcontext({})


def record_span(name: str, seconds: float) -> None:
    """Record a span of `seconds` that has just ended."""
    if tracer := _tracer.get():
        tracer.record_span(name, seconds)


async def trace_upstream_request(
    request: ClientRequest, handler: ClientHandlerType
) -> ClientResponse:
    """Record an upstream request until its response begins; a middleware of aiohttp's client.

    The query is left out, since signed URLs are secrets. Only `traceparent` is sent upstream,
    because it does not identify the client.
    """
    tracer = _tracer.get()
    if tracer is None:
        return await handler(request)
    attributes = {
        "http.request.method": request.method,
        "url.full": str(request.url.with_user(None).with_query(None)),
        "server.address": request.url.host or "",
        "server.port": request.url.port or 0,
    }
    with tracer.client_span(request.method, attributes) as added:
        request.headers["traceparent"] = tracer.traceparent()
        response = await handler(request)
        added["http.response.status_code"] = response.status
    return response


def _trace_requests(handler: HttpHandler, tracer: "OtelTracer") -> HttpHandler:
    """Return a handler that records each request, as part of the trace that its client names."""

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
        with tracer.server_span(f"{request.method} {route}", attributes, request.headers) as added:
            try:
                response = await handler(request)
            finally:
                added["pullcache.request"] = request_id.get()
            added["http.response.status_code"] = response.status
            added["pullcache.cache_status"] = response.headers.get("Cache-Status", "")
        return response

    return handle
