"""Spans as OpenTelemetry has them. It is an extra: `tracing.py` imports this module when it is wanted."""

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

# How long the end waits for the spans that the collector has not taken yet, in seconds.
FLUSH_TIMEOUT = 2.0

_DEFAULT_SERVICE_NAME = "unknown_service"


OpenSpan = AbstractContextManager[dict[str, Any]]
"""What is put into the dictionary that it gives is noted at its end; of an exception the class alone, since
its words, and what its traceback quotes, may be secrets."""


class OtelTracer:
    """Makes spans and sends them, in a thread, to where the variables OTEL_* say."""

    def __init__(self, version: str) -> None:
        """Raise `ValueError` or `OSError` if a variable cannot be used. Blocks."""
        resource = Resource.create({"service.version": version})
        if str(resource.attributes["service.name"]).startswith(_DEFAULT_SERVICE_NAME):
            resource = resource.merge(Resource({"service.name": "pullcache"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter()
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("pullcache", version)
        self._propagator = TraceContextTextMapPropagator()

    def close(self) -> None:
        """Send what waits, for two seconds at most. Blocks."""
        # A thread that nobody waits for at the exit: it may be stuck in a connection.
        ending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        ending.start()
        ending.join(FLUSH_TIMEOUT)
        if ending.is_alive():
            # Or it would try again and again.
            self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def server_span(
        self, name: str, attributes: Mapping[str, Any], headers: Mapping[str, str]
    ) -> OpenSpan:
        """Hold a request open that belongs to the trace that its headers name."""
        return self._start_span(
            name, SpanKind.SERVER, attributes, self._propagator.extract(headers)
        )

    def client_span(self, name: str, attributes: Mapping[str, Any]) -> OpenSpan:
        """Hold a request to somebody else open."""
        return self._start_span(name, SpanKind.CLIENT, attributes)

    def internal_span(self, name: str) -> OpenSpan:
        """Hold something open that is done here."""
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
            more: dict[str, Any] = {}
            try:
                yield more
            except BaseException as error:
                more["error.type"] = type(error).__qualname__
                raise
            finally:
                if "error.type" in more or more.get("http.response.status_code", 0) >= 500:
                    span.set_status(Status(StatusCode.ERROR))
                span.set_attributes(more)

    def record_span(self, name: str, seconds: float) -> None:
        """Make a span of what took so many seconds and has just ended."""
        now = time.time_ns()
        began = now - int(seconds * 1e9)
        self._tracer.start_span(name, start_time=began).end(now)

    def traceparent(self) -> str:
        """Return the header that tells others of the span that is open here (W3C Trace Context)."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return carrier["traceparent"]
