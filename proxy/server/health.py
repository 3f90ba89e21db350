"""The endpoints for monitoring: `/healthz`, `/readyz` and `/metrics`."""

from collections.abc import Awaitable, Callable
from concurrent.futures import Executor

from proxy.concurrency import run_in_thread
from proxy.errors import StorageError, UnknownNameError
from proxy.metrics import Metrics
from proxy.server.responses import Response, text_response

_PATHS = ("/healthz", "/readyz", "/metrics")


class HealthEndpoints:
    """Health, readiness and metrics, on the addresses of the registry and of the admin API."""

    def __init__(
        self, metrics: Metrics, check_store: Callable[[], Awaitable[None]], threads: Executor
    ) -> None:
        self._metrics = metrics
        self._check_store = check_store
        self._threads = threads
        self.is_stopping = False

    def has_path(self, path: str) -> bool:
        """Tell whether `path` (without a query) is one of these endpoints."""
        return path in _PATHS

    async def handle(self, method: str, path: str) -> Response:
        """Respond to a request. Raises `UnknownNameError` for other paths."""
        if path not in _PATHS:
            raise UnknownNameError(
                "not found; images are under /v2/, other paths are /healthz, /readyz and /metrics"
            )
        if method not in ("GET", "HEAD"):
            return Response(405, {"Allow": "GET, HEAD"})
        if path == "/metrics":
            self._metrics.read_gauges()
            body = await run_in_thread(self._threads, self._metrics.render)
            return Response(200, {"Content-Type": self._metrics.content_type}, body)
        if path == "/readyz":
            return await self._check_readiness()
        return text_response("ok\n")

    async def _check_readiness(self) -> Response:
        """Return whether the store works; upstream is not needed to serve cached content."""
        if self.is_stopping:
            return text_response("the daemon is shutting down\n", 503)
        try:
            await self._check_store()
        except StorageError as error:
            return text_response(f"{error}\n", 503)
        return text_response("ready\n")
