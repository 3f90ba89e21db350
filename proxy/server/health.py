"""For the operator: health, readiness, metrics."""

from collections.abc import Awaitable, Callable
from concurrent.futures import Executor

from aiohttp import hdrs
from aiohttp.web import BaseRequest, Response

from proxy.concurrency import run_in_thread
from proxy.errors import StorageError, UnknownNameError
from proxy.metrics import Metrics

_PATHS = ("/healthz", "/readyz", "/metrics")


class HealthEndpoints:
    """Answers everything that is not under `/v2/`."""

    def __init__(
        self, metrics: Metrics, check_store: Callable[[], Awaitable[None]], threads: Executor
    ) -> None:
        self._metrics = metrics
        self._check_store = check_store
        self._threads = threads
        self.is_stopping = False

    def has_path(self, request: BaseRequest) -> bool:
        """Tell whether the path is one of these."""
        return request.raw_path.partition("?")[0] in _PATHS

    async def handle(self, request: BaseRequest) -> Response:
        """Answer `/healthz`, `/readyz` and `/metrics`. Raises `UnknownNameError` for the rest."""
        path = request.raw_path.partition("?")[0]
        if path not in _PATHS:
            raise UnknownNameError(
                "there is nothing here; images are under /v2/, the rest is /healthz, /readyz, /metrics"
            )
        if request.method not in ("GET", "HEAD"):
            return Response(status=405, headers={hdrs.ALLOW: "GET, HEAD"})
        if path == "/metrics":
            body = await run_in_thread(self._threads, self._metrics.render)
            return Response(body=body, headers={hdrs.CONTENT_TYPE: self._metrics.content_type})
        if path == "/readyz":
            return await self._check_readiness()
        return Response(text="ok\n")

    async def _check_readiness(self) -> Response:
        """Say whether the store answers. Upstream is not asked: cached content is served without it."""
        if self.is_stopping:
            return Response(status=503, text="the daemon stops\n")
        try:
            await self._check_store()
        except StorageError as error:
            return Response(status=503, text=f"{error}\n")
        return Response(text="ready\n")
