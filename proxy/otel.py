"""Export of spans by OpenTelemetry.

OpenTelemetry is an optional dependency; `tracing.py` imports this module only if tracing is on.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

# Seconds that `close` waits for the collector to accept the remaining spans.
FLUSH_TIMEOUT = 2.0

# The SDK's name for a service that the environment does not name.
_DEFAULT_SERVICE_NAME = "unknown_service"

OpenSpan = AbstractContextManager[dict[str, Any]]
"""A running span. What the block puts into the dictionary becomes attributes of the span.

Of an exception only the class is recorded: its message and its traceback may contain secrets."""


class OtelTracer:
    """Records spans and exports them in a thread, as the environment variables OTEL_* say."""

    def __init__(self, version: str) -> None:
        """Raise `ValueError` or `OSError` if a variable OTEL_* is invalid. Blocks."""
        resource = Resource.create({"service.version": version})
        if str(resource.attributes["service.name"]).startswith(_DEFAULT_SERVICE_NAME):
            resource = resource.merge(Resource({"service.name": "pullcache"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter()
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("pullcache", version)
        self._propagator = TraceContextTextMapPropagator()

    def close(self) -> None:
        """Export the remaining spans, for two seconds at most. Blocks."""
        # A daemon thread, because it may hang in a connection when the process exits.
        shutdown = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        shutdown.start()
        shutdown.join(FLUSH_TIMEOUT)
        if shutdown.is_alive():
            # Otherwise the thread would keep retrying.
            self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def server_span(
        self, name: str, attributes: Mapping[str, Any], headers: Mapping[str, str]
    ) -> OpenSpan:
        """Record a client's request, in the trace that its headers name."""
        return self._start_span(
            name, SpanKind.SERVER, attributes, self._propagator.extract(headers)
        )

    def client_span(self, name: str, attributes: Mapping[str, Any]) -> OpenSpan:
        """Record a request to upstream."""
        return self._start_span(name, SpanKind.CLIENT, attributes)

    def internal_span(self, name: str) -> OpenSpan:
        """Record a step inside the daemon."""
        return self._start_span(name, SpanKind.INTERNAL, {})

    @contextmanager
    def _start_span(
        self,
        name: str,
        kind: SpanKind,
        attributes: Mapping[str, Any],
        parent: Context | None = None,
    ) -> Iterator[dict[str, Any]]:
        with self._tracer.start_as_current_span(
            name,
            parent,
            kind,
            attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            added: dict[str, Any] = {}
            try:
                yield added
            except BaseException as error:
                added["error.type"] = type(error).__qualname__
                raise
            finally:
                if "error.type" in added or added.get("http.response.status_code", 0) >= 500:
                    span.set_status(Status(StatusCode.ERROR))
                span.set_attributes(added)

    def record_span(self, name: str, seconds: float) -> None:
        """Record a step that took `seconds` and has just ended."""
        end = time.time_ns()
        start = end - int(seconds * 1e9)
        self._tracer.start_span(name, start_time=start).end(end)

    def traceparent(self) -> str:
        """Return the header that names the current span (W3C Trace Context)."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return carrier["traceparent"]
