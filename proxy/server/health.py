"""For the operator: health, readiness, metrics."""

from collections.abc import Awaitable, Callable
from concurrent.futures import Executor

from proxy.concurrency import run_in_thread
from proxy.errors import StorageError, UnknownNameError
from proxy.metrics import Metrics
from proxy.server.responses import Response, text_response

_PATHS = ("/healthz", "/readyz", "/metrics")


class HealthEndpoints:
    """Answers health, readiness and metrics, on the registry's addresses and on the admin API's."""

    def __init__(
        self, metrics: Metrics, check_store: Callable[[], Awaitable[None]], threads: Executor
    ) -> None:
        self._metrics = metrics
        self._check_store = check_store
        self._threads = threads
        self.is_stopping = False

    def has_path(self, path: str) -> bool:
        """Tell whether `path`, without its query, is answered here."""
        return path in _PATHS

    async def handle(self, method: str, path: str) -> Response:
        """Answer `/healthz`, `/readyz` and `/metrics`. Raises `UnknownNameError` for other paths."""
        if path not in _PATHS:
            raise UnknownNameError(
                "there is nothing here; images are under /v2/, the rest is /healthz, /readyz, /metrics"
            )
        if method not in ("GET", "HEAD"):
            return Response(405, {"Allow": "GET, HEAD"})
        if path == "/metrics":
            body = await run_in_thread(self._threads, self._metrics.render)
            return Response(200, {"Content-Type": self._metrics.content_type}, body)
        if path == "/readyz":
            return await self._check_readiness()
        return text_response("ok\n")

    async def _check_readiness(self) -> Response:
        """Say whether the store works. Upstream is not asked: cached content is served without it."""
        if self.is_stopping:
            return text_response("the daemon stops\n", 503)
        try:
            await self._check_store()
        except StorageError as error:
            return text_response(f"{error}\n", 503)
        return text_response("ready\n")
