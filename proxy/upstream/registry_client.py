"""Asking one registry: logging in, following redirects, and knowing when not to ask.

A *question* is small and is asked again while it fails in passing; a blob is *opened*, once, because
its download knows better how to go on. Either ends in a good answer or an error of ours, in time.
"""

import asyncio
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from aiohttp import ClientResponse, ClientSession, ClientTimeout, hdrs
from yarl import URL

from proxy.errors import (
    OfflineError,
    RateLimitedError,
    UpstreamDownError,
    UpstreamError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
)
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.upstream import challenge, errors, retry
from proxy.upstream.auth import Authenticator
from proxy.upstream.errors import map_errors
from proxy.upstream.health import RegistryHealth
from proxy.upstream.offline import OfflineSwitch
from proxy.upstream.retry import Cooldown, Quota

REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 5

# A question is answered, or has failed, within so many seconds: token, redirects and retries together.
# Clients wait 15 s for whatever we say, and some of it takes two questions.
REQUEST_TIMEOUT = 12.0
# A mirror that takes longer is no help.
MIRROR_TIMEOUT = 3.0

T = TypeVar("T")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """What is asked for: `path` is what follows the repository's name, or, without one, the root."""

    method: Literal["GET", "HEAD"]
    repository: str
    path: str
    kind: str
    headers: Mapping[str, str] = field(default_factory=dict)
    follow_redirects: bool = True

    @property
    def target(self) -> str:
        """What follows the root of the registry."""
        return f"v2/{self.repository}/{self.path}" if self.repository else self.path

    @property
    def is_pull(self) -> bool:
        """Whether it counts against a limit of pulls."""
        return self.kind == "manifest" and self.method == "GET"


@dataclass(frozen=True, slots=True)
class RegistryTimeouts:
    """How long a registry is waited for, in seconds: `stall` for the next bytes of a blob.

    An `answer` has begun within so many once connected. Short of a `question`, so that a connection
    that a firewall has forgotten leaves time for a new one.
    """

    connect: float
    stall: float
    response: float = 8.0
    request: float = REQUEST_TIMEOUT

    def for_mirror(self, mirror_count: int) -> "RegistryTimeouts":
        """Return how long one of `count` mirrors is waited for: a fair share, and never long."""
        share = min(MIRROR_TIMEOUT, self.request / (mirror_count + 1))
        return replace(self, connect=min(self.connect, share / 2), response=share, request=share)


@dataclass(frozen=True, slots=True)
class _AttemptLimits:
    """How long one attempt may take: `deadline` ends the wait for a good answer's headers."""

    deadline: float
    timeout: ClientTimeout
    read_bufsize: int


class RegistryClient:
    """One registry, its health and its limits. `url` is its root; `url/v2/` is its API.

    `name` is the upstream's; `peer` is what errors call who is asked, of a mirror with its address.
    The registry is judged by its own answers alone: a token server or a CDN that fails is not its fault.
    Whoever asks a mirror judges it, by the whole: there is another way.
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
        is_mirror: bool = False,
    ) -> None:
        self.name = name
        self.is_mirror = is_mirror
        self.quota = Quota()
        self._base_url = URL(url)
        self.label = f"{name}'s mirror {self._base_url.authority}" if is_mirror else name
        self._session = session
        self._authenticator = authenticator
        self._metrics = metrics
        self._offline = offline
        self.timeouts = timeouts
        self._attempts = attempts
        self._clock = clock
        self.health = RegistryHealth(self.label, clock)
        self._now = asyncio.get_running_loop().time

    async def request(
        self,
        request: ApiRequest,
        read_response: Callable[[ClientResponse], Awaitable[T]],
        deadline: float = math.inf,
    ) -> T:
        """Return what `read` makes of a good answer; ask again, a few times, if it fails in passing.

        Not beyond `deadline`, a time of the loop.
        Raises `UnknownError` and `UpstreamError`, and what `read` raises.
        """
        deadline = min(deadline, self._now() + self.timeouts.request)
        pauses = retry.backoff_delays(self._attempts, iter(random.random, None))
        timeout = ClientTimeout(
            total=None, sock_connect=self.timeouts.connect, sock_read=self.timeouts.response
        )
        patience = _AttemptLimits(deadline, timeout, 1 << 16)
        while True:
            try:
                async with self._open_response(request, patience) as response:
                    with map_errors(self.label):
                        async with asyncio.timeout_at(deadline):
                            return await read_response(response)
            except (OfflineError, UpstreamDownError):
                raise
            except UpstreamUnavailableError as error:
                pause = next(pauses, None)
                if pause is None or self._now() + pause >= deadline or not self.health.is_up:
                    raise
                self._metrics.count_upstream_retry(self.name, "request")
                log.info(
                    "request_retried", upstream=self.name, path=request.path, reason=str(error)
                )
            await asyncio.sleep(pause)

    @asynccontextmanager
    async def stream(self, request: ApiRequest) -> AsyncIterator[ClientResponse]:
        """Yield a good answer whose body may take as long as it does not stand still.

        Raises `UnknownError` and `UpstreamError`.
        """
        timeout = ClientTimeout(
            total=None, sock_connect=self.timeouts.connect, sock_read=self.timeouts.stall
        )
        deadline = self._now() + self.timeouts.connect + self.timeouts.response
        # One read of the kernel's buffer is one step of a download.
        async with self._open_response(
            request, _AttemptLimits(deadline, timeout, 1 << 17)
        ) as response:
            yield response

    @asynccontextmanager
    async def _open_response(
        self, request: ApiRequest, limits: _AttemptLimits
    ) -> AsyncIterator[ClientResponse]:
        self._offline.check_online()
        now = self._clock()
        if hold := self.quota.active_cooldown(now, is_pull=request.is_pull):
            raise self._rate_limit_error(hold, now)
        with nullcontext() if self.is_mirror else self.health.admit():
            response = await self._send_authenticated(request, limits)
        try:
            yield response
        finally:
            _close_response(response)

    async def _send_authenticated(
        self, request: ApiRequest, limits: _AttemptLimits
    ) -> ClientResponse:
        """Ask, log in if told to, follow redirects; return what is then a good answer."""
        url = URL(f"{str(self._base_url).rstrip('/')}/{request.target}", encoded=True)
        repository, deadline = request.repository, limits.deadline
        login = self._authenticator
        authorization = await self._await_authorization(
            deadline, login.get_authorization(repository)
        )
        response = await self._send(request, url, limits, authorization)
        try:
            if response.status == 401:
                challenges = challenge.parse(response.headers.getall(hdrs.WWW_AUTHENTICATE, ()))
                renewed = await self._await_authorization(
                    deadline, login.handle_challenges(challenges, repository, authorization)
                )
                if renewed:
                    response.release()
                    response = await self._send(request, url, limits, renewed)
                    authorization = renewed
            for _ in range(MAX_REDIRECTS):
                if response.status not in REDIRECT_STATUSES or not request.follow_redirects:
                    break
                target = _redirect_url(url, response.headers.get(hdrs.LOCATION, ""))
                response.release()
                # Credentials do not leave their origin: CDNs refuse them, and strangers keep them.
                if target.origin() != url.origin():
                    authorization = None
                url = target
                response = await self._send(request, url, limits, authorization)
            await self._check_status(response, request, authorization)
        except BaseException:
            _close_response(response)
            raise
        return response

    async def _send(
        self, request: ApiRequest, url: URL, limits: _AttemptLimits, authorization: str | None
    ) -> ClientResponse:
        kind = request.kind
        headers = dict(request.headers)
        if authorization:
            headers[hdrs.AUTHORIZATION] = authorization
        is_registry = url.origin() == self._base_url.origin() and not self.is_mirror
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
                        read_bufsize=limits.read_bufsize,
                    )
        except UpstreamUnavailableError as error:
            if is_registry:
                self.health.record_failure(error)
            raise
        self._record_status(kind, response.status)
        self._metrics.observe_upstream_first_byte(self.name, kind, self._now() - began)
        if is_registry:
            self._record_response(request, response)
        return response

    def _record_response(self, request: ApiRequest, response: ClientResponse) -> None:
        """Take from an answer of the registry what it says beside its content."""
        status = response.status
        if status >= 500:
            self.health.record_failure(UpstreamUnavailableError(f"{self.label} answered {status}"))
        else:
            self.health.record_success()
        limit = retry.parse_ratelimit(response.headers.get("RateLimit-Limit"))
        remaining = retry.parse_ratelimit(response.headers.get("RateLimit-Remaining"))
        if limit is not None and remaining is not None:
            self._metrics.set_ratelimit(self.name, limit, remaining)
            self.quota.update(limit, remaining)
        elif request.kind == "manifest" and status == 200:
            # An account without limits is not told any.
            self.quota.update(None, None)

    def _rate_limit_error(self, cooldown: Cooldown, now: float) -> RateLimitedError:
        left = max(1.0, cooldown.seconds_left(now))
        return RateLimitedError(
            f"{cooldown.reason}; next attempt in {left:.0f} s", retry_after=left
        )

    async def _await_authorization(self, deadline: float, authorization: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout_at(deadline):
                return await authorization
        except TimeoutError as error:
            raise UpstreamTimeoutError(
                f"{self.label}'s token server did not answer in time"
            ) from error

    # What it said.

    def _record_status(self, kind: str, status: int | Literal["error"]) -> None:
        self._metrics.count_upstream_request(self.name, kind, status)

    async def _check_status(
        self, response: ClientResponse, request: ApiRequest, authorization: str | None
    ) -> None:
        """Raise what a status other than success means."""
        status = response.status
        if status in (200, 206):
            if self.is_mirror and response.content_type == "text/html":
                raise UpstreamError(f"{self.label} sent a page where content was due")
            return
        if status in REDIRECT_STATUSES and not request.follow_redirects:
            return
        reason = await errors.read_error_reason(response)
        if status == 401 and authorization and authorization.startswith("Basic "):
            raise errors.invalid_credentials_error(self.label, reason)
        if status != 429:
            raise errors.error_from_status(self.label, status, request.kind, reason)
        now = self._clock()
        seconds = retry.parse_retry_after(response.headers.get(hdrs.RETRY_AFTER), now)
        hold = Cooldown(now, seconds, f"{self.label} limits its rate{reason}")
        if response.url.origin() == self._base_url.origin():
            self.quota.start_cooldown(hold, is_pull=request.is_pull)
        raise self._rate_limit_error(hold, now)


def _close_response(response: ClientResponse) -> None:
    # Closed, not released: what is left of a body is not worth the wait for it.
    response.close() if not response.content.at_eof() else response.release()


def _redirect_url(url: URL, location: str) -> URL:
    """Return where `location` leads, byte for byte: a signed query does not survive requoting."""
    try:
        target = url.join(URL(location, encoded=True))
    except ValueError as error:
        raise UpstreamError("upstream redirects to what is no address") from error
    if not location or target.scheme not in ("http", "https") or not target.host:
        raise UpstreamError("upstream redirects to what is no http(s) address")
    if url.scheme == "https" and target.scheme == "http":
        raise UpstreamError("upstream redirects from https to http, which is refused")
    return target
