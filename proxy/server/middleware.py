"""Around every request: an id, a clock, the error table, one log line, the counts."""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count

from aiohttp import HttpVersion10, hdrs
from aiohttp.http_parser import RawRequestMessage
from aiohttp.web import BaseRequest, Response, StreamResponse

from proxy import errors
from proxy.log import LogWriter, get_logger, request_id
from proxy.metrics import Metrics, RequestKind
from proxy.server.access import AccessControl
from proxy.server.fast_path import ParsedRequest
from proxy.server.health import HealthEndpoints
from proxy.server.registry.handlers import RegistryHandler
from proxy.server.request_context import RequestContext
from proxy.server.responses import TruncatedBodyError, json_response
from proxy.server.sendfile import BlobResponse

# Class -> (status, code of the specification). A client retries what has a code it does not know as if
# it were a 5xx, so only registered codes are here. The first class that fits decides.
_ERROR_TABLE: tuple[tuple[type[Exception], int, str], ...] = (
    (errors.InvalidDigestError, 400, "DIGEST_INVALID"),
    (errors.InvalidTagError, 400, "TAG_INVALID"),
    (errors.InvalidReferenceError, 400, "NAME_INVALID"),
    (errors.UnauthorizedError, 401, "UNAUTHORIZED"),
    (errors.DeniedError, 403, "DENIED"),
    (errors.TooManyRequestsError, 429, "TOOMANYREQUESTS"),
    (errors.UnknownNameError, 404, "NAME_UNKNOWN"),
    (errors.UnknownBlobError, 404, "BLOB_UNKNOWN"),
    (errors.NotFoundError, 404, "MANIFEST_UNKNOWN"),
    # Docker Hub says 401 of what does not exist; a client that is challenged sends its password.
    (errors.UpstreamUnauthorizedError, 404, "NAME_UNKNOWN"),
    (errors.RateLimitedError, 429, "TOOMANYREQUESTS"),
    (errors.UpstreamTimeoutError, 504, "UNAVAILABLE"),
    (errors.UpstreamUnavailableError, 503, "UNAVAILABLE"),
    (errors.UpstreamError, 502, "UNKNOWN"),
    (errors.DigestMismatchError, 502, "DIGEST_INVALID"),
    (errors.StorageError, 500, "UNKNOWN"),
)

# Seconds after which a client may ask again what cannot be had now.
_RETRY_AFTER_BY_STATUS: Mapping[int, str] = {429: "5", 502: "10", 503: "10", 504: "10"}

_MAX_MESSAGE_LENGTH = 200
_CHALLENGE = 'Basic realm="pullcache"'

log = get_logger(__name__)


class Middleware:
    """The handler of the HTTP server."""

    def __init__(
        self,
        access: AccessControl,
        registry_handler: RegistryHandler,
        health: HealthEndpoints,
        metrics: Metrics,
        access_log: LogWriter | None,
    ) -> None:
        self._access = access
        # Replaced by a reload; a request goes on with the one that it began with.
        self.registry_handler = registry_handler
        self._health = health
        self._metrics = metrics
        self._access_log = access_log
        self._request_ids = count(1)
        self.in_flight = 0
        self._request_ended = asyncio.Event()

    async def __call__(self, request: BaseRequest) -> StreamResponse:
        """Answer any request; never raise anything but `ConnectionError`."""
        began = time.perf_counter()
        request_id.set(str(next(self._request_ids)))
        exchange = RequestContext()
        # As nginx has it: the client has left.
        status = 499
        self.in_flight += 1
        try:
            response = await self._respond(request, exchange)
            status = response.status
            if isinstance(response, Response) and request.method != "HEAD":
                exchange.bytes_sent = len(response.body or b"")  # type: ignore[arg-type]
        except ConnectionError as error:
            if isinstance(error, TruncatedBodyError):
                status = 502
            exchange.problem = str(error)
            raise
        finally:
            self._end_request()
            asked = (request.remote, request.method, request.raw_path)
            self._record(asked, exchange, status, time.perf_counter() - began)
        return response

    def try_respond(self, head: bytes, client: str | None) -> bytes | BlobResponse | None:
        """Answer a request of these bytes if that takes no waiting; None lets it go the usual way.

        A large blob is a `Delivery`.
        """
        began = time.perf_counter()
        at_once = self.registry_handler.fast_path
        known = at_once.find(head)
        if known is None or not self._access.is_anonymous_allowed:
            return None
        exchange = RequestContext(kind=known.kind, upstream=known.repository.upstream)
        number = str(next(self._request_ids))

        def note(status: int) -> None:
            request_id.set(number)
            asked = (client, known.method, known.path)
            self._record(asked, exchange, status, time.perf_counter() - began)

        try:
            if known.kind == "manifest":
                found = at_once.try_manifest(known, exchange)
                if found is None:
                    return None
                status, answer = found
                note(status)
                return answer
            return self._try_respond_blob(known, exchange, note)
        except Exception:  # noqa: BLE001 (whatever it is: the usual way meets it too, and tells)
            return None

    def _try_respond_blob(
        self, parsed_request: ParsedRequest, context: RequestContext, record: Callable[[int], None]
    ) -> bytes | BlobResponse | None:
        at_once = self.registry_handler.fast_path
        blob = at_once.open_blob(parsed_request, context)
        if blob is None:
            return None

        def ended(sent: int, problem: Exception | None) -> None:
            self._end_request()
            context.bytes_sent = sent
            context.problem = str(problem) if problem else ""
            status = 502 if isinstance(problem, errors.ProxyError) else 499
            record(status if problem else 200)

        self.in_flight += 1
        try:
            return at_once.build_blob_response(parsed_request, context, blob, ended)
        except BaseException:
            self._end_request()
            blob.close()
            raise

    def remember(self, head: bytes, message: RawRequestMessage) -> None:
        """Take note of what these bytes mean, for `at_once`."""
        self.registry_handler.fast_path.remember(head, message)

    def _end_request(self) -> None:
        self.in_flight -= 1
        self._request_ended.set()

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 (it is no error to run into it)
        """Wait until no answer is being sent, at most `timeout` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.in_flight:
                    self._request_ended.clear()
                    await self._request_ended.wait()

    async def _respond(self, request: BaseRequest, context: RequestContext) -> StreamResponse:
        try:
            if request.version < HttpVersion10:
                return _build_error_response(400, "UNSUPPORTED", "the request is not valid HTTP")
            await self._access.check(request)
            if not request.raw_path.startswith(("/v1/", "/v2")):
                return await self._health.handle(request)
            if request.method not in ("GET", "HEAD"):
                return _reject_push(request)
            return await self.registry_handler.handle(request, context)
        except errors.ProxyError as error:
            context.problem = str(error)
            response = oci_error_response(error, context.kind)
            if request.body_exists:
                # Whatever the client has to upload, it is not read.
                response.force_close()
            return response
        except ConnectionError:
            raise
        except Exception:
            self._metrics.count_internal_error()
            log.exception("request_failed", path=request.raw_path[:200])
            context.problem = "a bug"
            message = "the cache failed inside; its log says how"
            return _build_error_response(500, "UNKNOWN", message)

    def _record(
        self,
        request_line: tuple[str | None, str, str],
        context: RequestContext,
        status: int,
        seconds: float,
    ) -> None:
        self._metrics.count_request(
            upstream=context.upstream,
            kind=context.kind,
            status=status,
            cache=context.cache_state,
            seconds=seconds,
            sent=context.bytes_sent,
        )
        if self._access_log is None:
            return
        client, method, path = request_line
        fields: dict[str, object] = {
            "client": client,
            "method": method,
            "path": path[:300],
            "status": status,
            "kind": context.kind,
            "cache": context.cache_state,
            "upstream": context.upstream,
            "bytes": context.bytes_sent,
            "seconds": round(seconds, 6),
        }
        if context.problem:
            fields["problem"] = context.problem
        self._access_log.log_request("request", **fields)


def oci_error_response(error: errors.ProxyError, kind: RequestKind = "other") -> Response:
    """Return the OCI error body for `error` (distribution-spec, "Error Codes")."""
    status, code = next((row[1], row[2]) for row in _ERROR_TABLE if isinstance(error, row[0]))
    if kind == "blob" and status >= 500:
        # A 5xx makes docker stall for a minute a blob, 404 makes it fall back at once.
        status, code = 404, "BLOB_UNKNOWN"
    elif kind == "blob" and isinstance(error, errors.UpstreamUnauthorizedError):
        code = "BLOB_UNKNOWN"
    response = _build_error_response(status, code, str(error))
    if isinstance(error, errors.RateLimitedError):
        response.headers[hdrs.RETRY_AFTER] = f"{error.retry_after:.0f}"
    elif status in _RETRY_AFTER_BY_STATUS:
        response.headers[hdrs.RETRY_AFTER] = _RETRY_AFTER_BY_STATUS[status]
    if status == 401:
        response.headers[hdrs.WWW_AUTHENTICATE] = _CHALLENGE
    return response


def _build_error_response(status: int, code: str, message: str) -> Response:
    document = {
        "errors": [{"code": code, "message": message[:_MAX_MESSAGE_LENGTH], "detail": None}]
    }
    headers = {"Cache-Status": "pullcache; fwd=miss" if status >= 404 else "pullcache; fwd=bypass"}
    return json_response(document, status=status, headers=headers)


def _reject_push(request: BaseRequest) -> Response:
    """Refuse a push as a read-only registry does."""
    message = "this is a read-only cache: push to the registry itself"
    response = _build_error_response(405, "UNSUPPORTED", message)
    response.headers[hdrs.ALLOW] = "GET, HEAD"
    if request.body_exists:
        # Whatever the client has to upload, it is not read.
        response.force_close()
    return response
