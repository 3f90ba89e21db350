"""The steps of every request: an id, the login, errors as responses, one log line, and metrics."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import count

from proxy.errors import ProxyError, TooManyRequestsError
from proxy.hops import enter_hop
from proxy.log import LogWriter, get_logger, request_id
from proxy.metrics import Metrics
from proxy.server.admin.fleet import FleetHandlers
from proxy.server.body_memory import MIN_COUNTED_BODY, BodyMemory
from proxy.server.clients.access_control import AccessControl
from proxy.server.clients.peer_gate import PeerGate
from proxy.server.clients.user_agent import parse_user_agent
from proxy.server.errors import error_response, oci_error_response
from proxy.server.health import HealthEndpoints
from proxy.server.pages.front import front_page, is_browser
from proxy.server.pulls import PullTracker
from proxy.server.registry.handlers import RegistryHandler
from proxy.server.request import Request
from proxy.server.request_context import RequestContext
from proxy.server.responses import Response
from proxy.upstream.peers import CALL_PATH

# The status in log and metrics if the client disconnects before the end (nginx's code).
CLIENT_CLOSED_REQUEST = 499

log = get_logger(__name__)


def _do_nothing() -> None:
    """Give nothing back."""


class Middleware:
    """The request handler of the HTTP server: checks logins, routes requests, and records them."""

    def __init__(
        self,
        access: AccessControl,
        registry_handler: RegistryHandler,
        health: HealthEndpoints,
        metrics: Metrics,
        access_log: LogWriter | None,
        daemon_id: str,
        pulls: PullTracker,
        page_addresses: Sequence[str] = (),
        peer_gate: PeerGate | None = None,
    ) -> None:
        self._access = access
        self._peer_gate = peer_gate
        self._daemon_id = daemon_id
        self._pulls = pulls
        # A reload replaces it; a running request keeps the old handler.
        self.registry_handler = registry_handler
        # A reload replaces them too.
        self.fleet_handlers: FleetHandlers | None = None
        self._health = health
        self._metrics = metrics
        self._access_log = access_log
        self._page_addresses = page_addresses
        self._request_ids = count(1)
        self._bodies = BodyMemory()
        self.in_flight = 0
        self._request_ended = asyncio.Event()

    def __call__(self, request: Request) -> Response | Awaitable[Response]:
        """Return the response, or an awaitable of it if it must wait. Neither raises an `Exception`."""
        context = RequestContext(request, time.perf_counter(), str(next(self._request_ids)))
        request_id.set(context.request_id)
        try:
            if self._peer_gate and self._peer_gate.admits(request):
                return self._answer_later(context, self._answer_peer(context))
            self._access.check_address(request)
            if self._access.needs_login(request):
                return self._answer_later(context, self._check_login_and_route(context))
            answer = self._route(context)
        except Exception as error:  # noqa: BLE001 (bugs are logged and counted)
            answer = self._to_response(error, context)
        if not isinstance(answer, Response):
            return self._answer_later(context, answer)
        if not isinstance(answer.body, bytes) or len(answer.body) > MIN_COUNTED_BODY:
            return self._record_at_end(context, answer)
        if request.method != "HEAD":
            context.bytes_sent = len(answer.body) or context.promised_bytes or 0
        self._record_client(context, answer.status)
        return answer

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 (a timeout is not an error here)
        """Wait until no response is being sent, at most `timeout` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.in_flight:
                    self._request_ended.clear()
                    await self._request_ended.wait()

    async def _answer_later(
        self, context: RequestContext, pending: Awaitable[Response]
    ) -> Response:
        self.in_flight += 1
        try:
            response = await pending
        except Exception as error:  # noqa: BLE001 (bugs are logged and counted)
            response = self._to_response(error, context)
        except BaseException:
            # The client has disconnected, and its connection has cancelled the request.
            self._record(context, CLIENT_CLOSED_REQUEST)
            raise
        finally:
            self._end_request()
        return self._record_at_end(context, response)

    async def _check_login_and_route(self, context: RequestContext) -> Response:
        context.user = await self._access.check(context.request)
        answer = self._route(context)
        return answer if isinstance(answer, Response) else await answer

    async def _answer_peer(self, context: RequestContext) -> Response:
        """Answer another node of the fleet: what concerns clients does not concern it."""
        request = context.request
        request.is_peer = context.is_peer = True
        enter_hop(request.headers.get("via"), self._daemon_id)
        if request.path == CALL_PATH and self.fleet_handlers:
            call = request.query.get("call", "")
            answer = await self.fleet_handlers.answer(call, request.client)
            return Response(headers={"Content-Type": "application/json"}, body=answer)
        return await self.registry_handler.handle_peer(request, context)

    def _route(self, context: RequestContext) -> Response | Awaitable[Response]:
        request = context.request
        if not request.path.startswith(("/v2", "/v1/")):
            if is_browser(request.method, request.path, request.headers.get("accept", "")):
                return front_page(self._page_addresses)
            return self._health.handle(request.method, request.path)
        if request.method not in ("GET", "HEAD"):
            response = error_response(
                405, "UNSUPPORTED", "this is a read-only cache: push to the registry itself"
            )
            response.headers["Allow"] = "GET, HEAD"
            return response
        enter_hop(request.headers.get("via"), self._daemon_id)
        return self.registry_handler.handle(request, context)

    def _to_response(self, error: Exception, context: RequestContext) -> Response:
        context.problem = str(error)
        if isinstance(error, ProxyError):
            return oci_error_response(error, context.kind)
        self._metrics.count_internal_error()
        log.error("request_failed", path=context.request.target[:200], exc_info=error)
        context.problem = "a bug"
        return error_response(500, "UNKNOWN", "internal error; see the daemon's log")

    def _record_at_end(self, context: RequestContext, response: Response) -> Response:
        """Record the request when the whole response is sent, or the client has disconnected.

        Returns the response, or an error if the client lets too many large bodies wait.
        """
        release = self._hold_body(context, response)
        if release is None:
            error = TooManyRequestsError(
                "too many large documents wait to be received; take those first, then try again"
            )
            response = self._to_response(error, context)
        self.in_flight += 1

        def on_end(sent: int, error: Exception | None) -> None:
            if release:
                release()
            self._end_request()
            context.bytes_sent = sent or context.promised_bytes or 0
            status = response.status
            if error:
                context.problem = str(error)
                status = 502 if isinstance(error, ProxyError) else CLIENT_CLOSED_REQUEST
            # The caller may run in the context of another request.
            request_id.set(context.request_id)
            self._record(context, status)

        response.on_end = on_end
        return response

    def _hold_body(
        self, context: RequestContext, response: Response
    ) -> Callable[[], object] | None:
        """Count the memory of a body; return what gives it back, or None if it is too much."""
        body = response.body
        if (
            not isinstance(body, bytes)
            or len(body) <= MIN_COUNTED_BODY
            or context.is_peer
            or context.request.method == "HEAD"
        ):
            return _do_nothing
        return self._bodies.hold(context.request.client or "", body)

    def _end_request(self) -> None:
        self.in_flight -= 1
        self._request_ended.set()

    def _record(self, context: RequestContext, status: int) -> None:
        if context.is_peer:
            self._record_peer(context, status)
        else:
            self._record_client(context, status)

    def _record_client(self, context: RequestContext, status: int) -> None:
        request = context.request
        seconds = time.perf_counter() - context.started_at
        self._metrics.count_request(
            upstream=context.upstream,
            kind=context.kind,
            status=status,
            cache=context.cache_state,
            seconds=seconds,
            sent=context.bytes_sent,
        )
        if context.promised_bytes:
            self._metrics.count_promised(context.upstream, context.promised_bytes)
        target = context.target
        if target is not None and (status < 400 or status == CLIENT_CLOSED_REQUEST):
            self._pulls.record(context, target)
        if status >= 400:
            self._pulls.record_failure(context, target, status)
        access_log = self._access_log
        if access_log is None or not access_log.is_info_enabled:
            return
        # One literal: arguments by name and `round` would cost as much as the rest of the record.
        line: dict[str, object] = {
            "time": time.time_ns(),
            "level": "info",
            "event": "request",
            "request": context.request_id,
            "client": request.client,
            "method": request.method,
            "path": request.target[:300],
            "status": status,
            "kind": context.kind,
            "cache": context.cache_state,
            "upstream": context.upstream,
            "bytes": context.bytes_sent,
            "seconds": int(seconds * 1e6) / 1e6,
        }
        if target is not None:
            line["repository"] = target.repository.name
            line["reference"] = target.reference_text
        if agent := request.headers.get("user-agent"):
            line["agent"], platform = parse_user_agent(agent)
            if platform:
                line["platform"] = platform
        _add_outcome(line, context)
        access_log.enqueue(line)

    def _record_peer(self, context: RequestContext, status: int) -> None:
        """Record the request of a peer: it is no client's, and counts only as bytes to the fleet."""
        self._metrics.count_peer_bytes("out", context.bytes_sent)
        if self._access_log is None or not self._access_log.is_info_enabled:
            return
        line: dict[str, object] = {
            "time": time.time_ns(),
            "level": "info",
            "event": "peer_request",
            "request": context.request_id,
            "peer": context.request.client,
            "path": context.request.target[:300],
            "status": status,
            "bytes": context.bytes_sent,
            "seconds": int((time.perf_counter() - context.started_at) * 1e6) / 1e6,
        }
        if context.problem:
            line["problem"] = context.problem
        self._access_log.enqueue(line)


def _add_outcome(line: dict[str, object], context: RequestContext) -> None:
    if context.promised_bytes is not None:
        line["promised"] = True
    if context.problem:
        line["problem"] = context.problem
