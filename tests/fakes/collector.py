"""A collector of OpenTelemetry traces, which receives them by OTLP/HTTP."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """Everything that was exported to `url`: raw bodies, and the spans in them."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[bytes] = []
        self.encodings: set[str] = set()
        self.services: set[str] = set()
        self.spans: list[Span] = []

    async def handle_export(self, request: web.BaseRequest) -> web.Response:
        """Respond to an export."""
        body = await request.read()
        assert request.path == "/v1/traces"
        assert request.content_type == "application/x-protobuf"
        self.encodings.add(request.headers.get("Content-Encoding", "identity"))
        self.bodies.append(body)
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services.add(attributes(group.resource)["service.name"])
            self.spans += [span for scope in group.scope_spans for span in scope.spans]
        return web.Response(content_type="application/x-protobuf")

    def roots(self) -> list[Span]:
        """Return the spans whose parents were not exported."""
        known = {span.span_id for span in self.spans}
        return self._in_order(span for span in self.spans if span.parent_span_id not in known)

    def tree(self, span: Span) -> Any:
        """Return the name of a span and the trees of its children, in the order of their starts."""
        children = [one for one in self.spans if one.parent_span_id == span.span_id]
        assert all(one.trace_id == span.trace_id for one in children)
        return [span.name, *map(self.tree, self._in_order(children))]

    def named(self, name: str) -> list[Span]:
        """Return the spans of this name, in the order of their starts."""
        return self._in_order(span for span in self.spans if span.name == name)

    @staticmethod
    def _in_order(spans: Any) -> list[Span]:
        return sorted(spans, key=lambda span: span.start_time_unix_nano)


def attributes(thing: Any) -> dict[str, Any]:
    """Return the attributes of a span or a resource."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in thing.attributes}


@asynccontextmanager
async def run_collector() -> AsyncIterator[Collector]:
    """Yield a collector that listens on loopback."""
    collector = Collector()
    runner = web.ServerRunner(web.Server(collector.handle_export))
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert runner.addresses
        collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield collector
    finally:
        await runner.cleanup()
