"""Requests to one registry or mirror: authentication, redirects, retries, limits.

An API request (`request`) is small and is retried after transient failures. A blob (`stream`) is
opened once, because its download decides how to resume. Each ends within a bounded time in a
successful response or an error of `proxy.errors`.
"""

import asyncio
import math
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal, TypeVar

from aiohttp import ClientResponse, ClientSession, ClientTimeout, hdrs
from yarl import URL

from proxy.errors import (
    OfflineError,
    RateLimitedError,
    UpstreamDownError,
    UpstreamError,
    UpstreamTimeoutError,
    UpstreamUnauthorizedError,
    UpstreamUnavailableError,
    UpstreamUnreachableError,
)
from proxy.fleet.directory import Directory
from proxy.hops import via_header
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.upstream import errors
from proxy.upstream.auth import challenge
from proxy.upstream.auth.tokens import Authenticator
from proxy.upstream.errors import map_errors
from proxy.upstream.features import RegistryFeatures
from proxy.upstream.health import RegistryHealth
from proxy.upstream.network import retry
from proxy.upstream.network.redirects import MAX_REDIRECTS, REDIRECT_STATUSES, redirect_target
from proxy.upstream.offline import OfflineSwitch
from proxy.upstream.quota import (
    INITIAL_PAUSE,
    Cooldown,
    Quota,
    RequestClass,
    parse_ratelimit,
    parse_ratelimit_window,
    parse_retry_after,
)

# A CDN sends these for a signed URL that has expired, or that its clock does not accept.
EXPIRED_URL_STATUSES = frozenset({400, 401, 403, 410})

# Repositories of other registries, reached by redirects, whose anonymous tokens are kept.
MAX_REDIRECT_TOKENS = 100

# Docker Hub sends one of these with its limit on pulls.
_ACCOUNT_LIMIT_HEADERS = ("RateLimit-Limit", "Docker-RateLimit-Source")
# Registries without these lists may answer 5xx for them: that says nothing about their content.
_LIST_KINDS = frozenset({"tags", "referrers"})

# Seconds for one API request with its token, redirects and retries. Clients wait 15 s for a
# response, and some responses need two such requests.
REQUEST_TIMEOUT = 12.0
# The same for a mirror: asking the next one is better than a longer wait.
MIRROR_TIMEOUT = 3.0

# Bytes that aiohttp buffers of a body. For a blob, one read of the kernel's buffer is then one
# chunk.
API_READ_BUFFER_SIZE = 64 << 10
BLOB_READ_BUFFER_SIZE = 128 << 10

# Larger bodies, and those of unknown size, are read few at a time: each is in memory as a whole.
LARGE_RESPONSE = 64 << 10
MAX_LARGE_RESPONSES = 8
# Kinds of requests whose bodies are read as a whole.
_DOCUMENT_KINDS = frozenset({"manifest", "tags", "referrers", "search", "facts"})

T = TypeVar("T")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """One request. `path` is relative to the repository or, if that is empty, to the root."""

    method: Literal["GET", "HEAD"]
    repository: str
    path: str
    kind: str
    headers: Mapping[str, str] = field(default_factory=dict)
    follow_redirects: bool = True

    @property
    def target(self) -> str:
        """The path relative to the registry's root."""
        return f"v2/{self.repository}/{self.path}" if self.repository else self.path

    @property
    def is_pull(self) -> bool:
        """Whether the request counts against a limit on pulls."""
        return self.kind == "manifest" and self.method == "GET"

    @property
    def request_class(self) -> RequestClass:
        """The requests that a 429 to this one pauses."""
        return RequestClass(self.method, self.kind, self.repository)


@dataclass(frozen=True, slots=True)
class RegistryTimeouts:
    """Timeouts of one registry in seconds.

    `connect` is for connecting, `response` for the first byte of a response after that, `stall` for
    the next bytes of a blob, `request` for an API request as a whole. `response` is shorter than
    `request`, so that a connection that a firewall has dropped silently leaves time for a new one.
    """

    connect: float
    stall: float
    response: float = 8.0
    request: float = REQUEST_TIMEOUT

    def for_mirror(self, mirror_count: int) -> "RegistryTimeouts":
        """Return the timeouts of one of `mirror_count` mirrors, which share the time."""
        share = min(MIRROR_TIMEOUT, self.request / (mirror_count + 1))
        return replace(self, connect=min(self.connect, share / 2), response=share, request=share)


@dataclass(frozen=True, slots=True)
class _AttemptLimits:
    """Limits of one attempt; `deadline` (loop time) is for the headers of the final response."""

    deadline: float
    timeout: ClientTimeout
    read_buffer_size: int


class RegistryClient:
    """A client of one registry or mirror, with its health and its quota.

    `url` is its root, `url/v2/` its API. `name` is the name of the upstream; `label` names the
    registry in errors, a mirror with its address.

    A registry's health depends on its own responses only: failures of a token server or CDN do not
    count. A mirror's health is recorded by `MirrorSet` for the operation as a whole, because there
    is an alternative.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        session: ClientSession,
        authenticator: Authenticator,
        metrics: Metrics,
        offline: OfflineSwitch,
        timeouts: RegistryTimeouts,
        attempts: int,
        clock: Callable[[], float],
        daemon_id: str,
        is_mirror: bool = False,
        directory: Directory | None = None,
    ) -> None:
        self.name = name
        self._daemon_id = daemon_id
        self.is_mirror = is_mirror
        self._directory = directory
        self._quota = Quota()
        self.features = RegistryFeatures(clock)
        self._base_url = URL(url)
        self.label = f"{name}'s mirror {self._base_url.authority}" if is_mirror else name
        self._session = session
        self._authenticator = authenticator
        self._redirect_authenticators: dict[tuple[URL, str], Authenticator] = {}
        self._metrics = metrics
        self._offline = offline
        self.timeouts = timeouts
        self._attempts = attempts
        self._clock = clock
        self.health = RegistryHealth(self.label, clock)
        self.credentials_problem = ""
        self._large_responses = asyncio.Semaphore(MAX_LARGE_RESPONSES)
        self._now = asyncio.get_running_loop().time

    @property
    def pulls_renewed_at(self) -> float | None:
        """When pulls are allowed again, after a 429 or at the end of the window; None if unknown."""
        quota = self.quota
        return quota.cooldown_end(self._clock()) or quota.renewed_at

    @property
    def url(self) -> str:
        """The root of the registry."""
        return str(self._base_url)

    def active_pauses(self) -> list[tuple[RequestClass, Cooldown]]:
        """Return the requests that the registry limits now, those that are paused for longest first."""
        return self._quota.active_cooldowns(self._clock())

    @property
    def quota(self) -> Quota:
        """The rate limits of now."""
        self._quota.renew(self._clock())
        return self._quota

    async def request(
        self,
        request: ApiRequest,
        read_response: Callable[[ClientResponse], Awaitable[T]],
        deadline: float = math.inf,
        max_attempts: int = sys.maxsize,
    ) -> T:
        """Return the result of `read_response` for a successful response; retry transient failures.

        It takes no longer than `timeouts.request`, and not beyond `deadline` (loop time).
        Raises `NotFoundError`, `UpstreamError`, and what `read_response` raises.
        """
        deadline = min(deadline, self._now() + self.timeouts.request)
        delays = retry.backoff_delays(self._attempts, iter(random.random, None))
        timeout = ClientTimeout(
            total=None, sock_connect=self.timeouts.connect, sock_read=self.timeouts.response
        )
        limits = _AttemptLimits(deadline, timeout, API_READ_BUFFER_SIZE)
        for attempt in count(1):
            try:
                async with self._open_response(request, limits) as response:
                    with map_errors(self.label):
                        async with asyncio.timeout_at(deadline), self._reading(request, response):
                            return await read_response(response)
            except (OfflineError, UpstreamDownError):
                raise
            except UpstreamUnavailableError as error:
                delay = next(delays, None)
                if delay is None or self._now() + delay >= deadline or not self.health.is_up:
                    raise
                # A connection that fails says nothing about the request.
                if attempt >= max_attempts and not isinstance(error, UpstreamUnreachableError):
                    raise
                self._metrics.count_upstream_retry(self.name, "request")
                log.info(
                    "request_retried", upstream=self.name, path=request.path, reason=str(error)
                )
            await asyncio.sleep(delay)
        raise AssertionError("unreachable")

    def _reading(
        self, request: ApiRequest, response: ClientResponse
    ) -> AbstractAsyncContextManager[None]:
        """Return a context in which the body may be read; it waits if that is large."""
        size = response.content_length
        is_document = request.method == "GET" and request.kind in _DOCUMENT_KINDS
        if is_document and (size is None or size > LARGE_RESPONSE):
            return self._large_responses
        return nullcontext()

    @asynccontextmanager
    async def stream(self, request: ApiRequest) -> AsyncIterator[ClientResponse]:
        """Yield a successful response; its body has a stall timeout, but no total one.

        Raises `NotFoundError` and `UpstreamError`.
        """
        timeout = ClientTimeout(
            total=None, sock_connect=self.timeouts.connect, sock_read=self.timeouts.stall
        )
        deadline = self._now() + self.timeouts.connect + self.timeouts.response
        limits = _AttemptLimits(deadline, timeout, BLOB_READ_BUFFER_SIZE)
        async with self._open_response(request, limits) as response:
            yield response

    @asynccontextmanager
    async def _open_response(
        self, request: ApiRequest, limits: _AttemptLimits
    ) -> AsyncIterator[ClientResponse]:
        self._offline.check_online()
        now = self._clock()
        if cooldown := self.quota.active_cooldown(request.request_class, now):
            raise _rate_limited_error(cooldown, now)
        if self._directory:
            await self._check_shared_limits(request, self._directory)
        with nullcontext() if self.is_mirror else self.health.admit():
            try:
                response = await self._send_authenticated(request, limits)
            except UpstreamUnauthorizedError as error:
                if error.rejects_credentials:
                    self.credentials_problem = str(error)
                raise
        self.credentials_problem = ""
        try:
            yield response
        finally:
            _close_response(response)

    def is_rate_limited(self, repository: str) -> bool:
        """Tell whether the registry allows no pulls of the repository now."""
        pulls = RequestClass("GET", "manifest", repository)
        return (
            self.quota.remaining == 0
            or self.quota.active_cooldown(pulls, self._clock()) is not None
        )

    async def _send_authenticated(
        self, request: ApiRequest, limits: _AttemptLimits
    ) -> ClientResponse:
        """Send the request, authenticate if challenged, and follow redirects.

        Returns a successful response, or a redirect if the request does not follow redirects.
        """
        url = URL(f"{str(self._base_url).rstrip('/')}/{request.target}", encoded=True)
        authorization = await self._get_authorization(request, url, limits)
        response, authorization = await self._send_and_renew(request, url, limits, authorization)
        try:
            for _ in range(MAX_REDIRECTS):
                if response.status not in REDIRECT_STATUSES or not request.follow_redirects:
                    break
                target = redirect_target(url, response.headers.get(hdrs.LOCATION, ""))
                response.release()
                # Credentials stay at their origin: CDNs reject them, and others could keep them.
                if target.origin() != url.origin():
                    authorization = await self._get_authorization(request, target, limits)
                url = target
                response, authorization = await self._send_and_renew(
                    request, url, limits, authorization
                )
            await self._raise_for_status(response, request, authorization)
        except BaseException:
            _close_response(response)
            raise
        return response

    async def _get_authorization(
        self, request: ApiRequest, url: URL, limits: _AttemptLimits
    ) -> str | None:
        """Return what the registry at this URL, or one that it redirected to, has asked for before."""
        authenticator = self._redirect_authenticators.get((url.origin(), request.repository))
        if url.origin() == self._base_url.origin():
            authenticator = self._authenticator
        if authenticator is None:
            return None
        return await self._await_authorization(
            authenticator.get_authorization(request.repository), limits.deadline
        )

    async def _send_and_renew(
        self, request: ApiRequest, url: URL, limits: _AttemptLimits, authorization: str | None
    ) -> tuple[ClientResponse, str | None]:
        """Send the request, and once more if it is challenged; return the authorization used."""
        response = await self._send(request, url, limits, authorization)
        if response.status != 401:
            return response, authorization
        try:
            challenges = challenge.parse(response.headers.getall(hdrs.WWW_AUTHENTICATE, ()))
            authenticator = self._find_authenticator(url.origin(), request.repository)
            renewed = await self._await_authorization(
                authenticator.handle_challenges(challenges, request.repository, authorization),
                limits.deadline,
            )
        except BaseException:
            _close_response(response)
            raise
        if renewed is None:
            return response, authorization
        response.release()
        return await self._send(request, url, limits, renewed), renewed

    def _find_authenticator(self, origin: URL, repository: str) -> Authenticator:
        """Return the authenticator of the registry, or of another one that it has redirected to.

        The other one gets no credentials.
        """
        if origin == self._base_url.origin():
            return self._authenticator
        others = self._redirect_authenticators
        other = others.pop((origin, repository), None)
        others[origin, repository] = other or self._authenticator.create_anonymous(origin)
        if len(others) > MAX_REDIRECT_TOKENS:
            del others[next(iter(others))]
        return others[origin, repository]

    async def _await_authorization(self, authorization: Awaitable[T], deadline: float) -> T:
        try:
            async with asyncio.timeout_at(deadline):
                return await authorization
        except TimeoutError as error:
            raise UpstreamTimeoutError(
                f"{self.label}'s token server did not respond in time"
            ) from error

    async def _send(
        self, request: ApiRequest, url: URL, limits: _AttemptLimits, authorization: str | None
    ) -> ClientResponse:
        """Send one HTTP request; record status and latency, and the registry's health and quota."""
        kind = request.kind
        headers = dict(request.headers)
        if authorization:
            headers[hdrs.AUTHORIZATION] = authorization
        is_same_origin = url.origin() == self._base_url.origin()
        if is_same_origin:
            headers[hdrs.VIA] = via_header(self._daemon_id)
        # Responses of CDNs and mirrors do not count: see the class.
        targets_registry = is_same_origin and not self.is_mirror
        began = self._now()
        try:
            with map_errors(self.label, lambda status: self._record_status(kind, status)):
                async with asyncio.timeout_at(limits.deadline):
                    response = await self._session.request(
                        request.method,
                        url,
                        headers=headers,
                        allow_redirects=False,
                        timeout=limits.timeout,
                        read_bufsize=limits.read_buffer_size,
                    )
        except UpstreamUnavailableError as error:
            if targets_registry:
                self.health.record_failure(error)
            raise
        self._record_status(kind, response.status)
        self._metrics.observe_upstream_first_byte(self.name, kind, self._now() - began)
        if targets_registry:
            self._record_health(request, response.status)
            self._record_quota(request, response)
        return response

    def _record_status(self, kind: str, status: int | Literal["error"]) -> None:
        self._metrics.count_upstream_request(self.name, kind, status)

    def _record_health(self, request: ApiRequest, status: int) -> None:
        if status < 500 or status in retry.REFUSAL_STATUSES:
            self.health.record_success()
        elif status != errors.LOOP_DETECTED and request.kind not in _LIST_KINDS:
            message = f"{self.label} responded with status {status}"
            self.health.record_failure(UpstreamUnavailableError(message))

    def _record_quota(self, request: ApiRequest, response: ClientResponse) -> None:
        limit = parse_ratelimit(response.headers.get("RateLimit-Limit"))
        remaining = parse_ratelimit(response.headers.get("RateLimit-Remaining"))
        if limit is not None and remaining is not None:
            window = parse_ratelimit_window(response.headers.get("RateLimit-Remaining"))
            renewed_at = self._clock() + window if window else None
            self._quota.update(limit, remaining, renewed_at=renewed_at)
            self._metrics.set_ratelimit(self.name, limit, lambda: self.quota.remaining or 0)
        elif request.kind == "manifest" and response.status == 200:
            # Docker Hub sends no limits to an account that has none.
            self.quota.update(None, None)
        if response.status != 429:
            self.quota.end_cooldown(request.request_class, self._clock())

    async def _raise_for_status(
        self, response: ClientResponse, request: ApiRequest, authorization: str | None
    ) -> None:
        """Raise the error for the status, unless it is a success or an expected redirect."""
        status = response.status
        if status in (200, 206):
            if self.is_mirror and response.content_type == "text/html":
                raise UpstreamError(f"{self.label} sent an HTML page instead of content")
            return
        if status in REDIRECT_STATUSES and not request.follow_redirects:
            return
        error = await errors.read_error(response)
        is_redirected = response.url.origin() != self._base_url.origin()
        if is_redirected and request.kind == "blob" and status in EXPIRED_URL_STATUSES:
            # The registry has the blob: it may redirect to another URL next time.
            raise UpstreamUnavailableError(
                f"{self.label} redirected to {response.url.host}, which responded with status {status}"
            )
        if status == 401 and authorization and authorization.startswith("Basic "):
            raise errors.invalid_credentials_error(self.label, error.reason)
        if status != 429:
            raise errors.error_from_status(self.label, status, request.kind, error)
        raise await self._start_cooldown(response, request, error.reason)

    async def _check_shared_limits(self, request: ApiRequest, directory: Directory) -> None:
        """Raise `RateLimitedError` if another node was told not to send such requests now."""
        requests = request.request_class
        classes = (requests, requests.of_account()) if request.is_pull else (requests,)
        for one in classes:
            if seconds := await directory.limited_for(self.name, " ".join(one)):
                now = self._clock()
                text = f"{self.label} rate limit exceeded, as another node was told"
                raise _rate_limited_error(self.quota.start_cooldown(one, now, seconds, text), now)

    async def _start_cooldown(
        self, response: ClientResponse, request: ApiRequest, reason: str
    ) -> RateLimitedError:
        """Pause the requests that a 429 forbids, and return the error for this one."""
        now = self._clock()
        seconds = parse_retry_after(response.headers.get(hdrs.RETRY_AFTER), now)
        text = f"{self.label} rate limit exceeded{reason}"
        if response.url.origin() != self._base_url.origin():
            # A CDN's limit: the next request may be redirected to another one.
            return _rate_limited_error(Cooldown(now, seconds or INITIAL_PAUSE, text), now)
        requests = request.request_class
        if request.is_pull and any(name in response.headers for name in _ACCOUNT_LIMIT_HEADERS):
            requests = requests.of_account()
        cooldown = self.quota.start_cooldown(requests, now, seconds, text)
        if self._directory:
            left = cooldown.seconds_left(now)
            await self._directory.limit(self.name, " ".join(requests), left)
        return _rate_limited_error(cooldown, now)


def _rate_limited_error(cooldown: Cooldown, now: float) -> RateLimitedError:
    left = max(1.0, cooldown.seconds_left(now))
    return RateLimitedError(
        f"{cooldown.reason.rstrip('.')}; next attempt in {left:.0f} s", retry_after=left
    )


def _close_response(response: ClientResponse) -> None:
    # Not `release` while bytes are left: that would wait for them to keep the connection.
    response.close() if not response.content.at_eof() else response.release()
