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
from proxy.upstream.errors import translated
from proxy.upstream.health import Health
from proxy.upstream.offline import Offline
from proxy.upstream.retry import Hold, Quota

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 5

# A question is answered, or has failed, within so many seconds: token, redirects and retries together.
# Clients wait 15 s for whatever we say, and some of it takes two questions.
QUESTION_TIMEOUT = 12.0
# A mirror that takes longer is no help.
MIRROR_TIMEOUT = 3.0

T = TypeVar("T")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked for: `path` is what follows the repository's name, or, without one, the root."""

    method: Literal["GET", "HEAD"]
    repository: str
    path: str
    kind: str
    headers: Mapping[str, str] = field(default_factory=dict)
    follow: bool = True

    @property
    def target(self) -> str:
        """What follows the root of the registry."""
        return f"v2/{self.repository}/{self.path}" if self.repository else self.path

    @property
    def is_pull(self) -> bool:
        """Whether it counts against a limit of pulls."""
        return self.kind == "manifest" and self.method == "GET"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a registry is waited for, in seconds: `stall` for the next bytes of a blob.

    An `answer` has begun within so many once connected. Short of a `question`, so that a connection
    that a firewall has forgotten leaves time for a new one.
    """

    connect: float
    stall: float
    answer: float = 8.0
    question: float = QUESTION_TIMEOUT

    def of_mirror(self, count: int) -> "Timeouts":
        """Return how long one of `count` mirrors is waited for: a fair share, and never long."""
        share = min(MIRROR_TIMEOUT, self.question / (count + 1))
        return replace(self, connect=min(self.connect, share / 2), answer=share, question=share)


@dataclass(frozen=True, slots=True)
class _Patience:
    """How long one attempt may take: `deadline` ends the wait for a good answer's headers."""

    deadline: float
    timeout: ClientTimeout
    read_bufsize: int


class Exchange:
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
        offline: Offline,
        timeouts: Timeouts,
        attempts: int,
        clock: Callable[[], float],
        is_mirror: bool = False,
    ) -> None:
        self.name = name
        self.is_mirror = is_mirror
        self.quota = Quota()
        self._root = URL(url)
        self.peer = f"{name}'s mirror {self._root.authority}" if is_mirror else name
        self._session = session
        self._authenticator = authenticator
        self._metrics = metrics
        self._offline = offline
        self.timeouts = timeouts
        self._attempts = attempts
        self._clock = clock
        self.health = Health(self.peer, clock)
        self._now = asyncio.get_running_loop().time

    async def ask(
        self,
        question: Question,
        read: Callable[[ClientResponse], Awaitable[T]],
        deadline: float = math.inf,
    ) -> T:
        """Return what `read` makes of a good answer; ask again, a few times, if it fails in passing.

        Not beyond `deadline`, a time of the loop.
        Raises `UnknownError` and `UpstreamError`, and what `read` raises.
        """
        deadline = min(deadline, self._now() + self.timeouts.question)
        pauses = retry.delays(self._attempts, iter(random.random, None))
        timeout = ClientTimeout(
            total=None, sock_connect=self.timeouts.connect, sock_read=self.timeouts.answer
        )
        patience = _Patience(deadline, timeout, 1 << 16)
        while True:
            try:
                async with self._answer(question, patience) as response:
                    with translated(self.peer):
                        async with asyncio.timeout_at(deadline):
                            return await read(response)
            except (OfflineError, UpstreamDownError):
                raise
            except UpstreamUnavailableError as error:
                pause = next(pauses, None)
                if pause is None or self._now() + pause >= deadline or not self.health.is_up:
                    raise
                self._metrics.upstream_retry(self.name, "question")
                log.info("retrying", upstream=self.name, path=question.path, reason=str(error))
            await asyncio.sleep(pause)

    @asynccontextmanager
    async def opened(self, question: Question) -> AsyncIterator[ClientResponse]:
        """Yield a good answer whose body may take as long as it does not stand still.

        Raises `UnknownError` and `UpstreamError`.
        """
        timeout = ClientTimeout(
            total=None, sock_connect=self.timeouts.connect, sock_read=self.timeouts.stall
        )
        deadline = self._now() + self.timeouts.connect + self.timeouts.answer
        # One read of the kernel's buffer is one step of a download.
        async with self._answer(question, _Patience(deadline, timeout, 1 << 17)) as response:
            yield response

    @asynccontextmanager
    async def _answer(
        self, question: Question, patience: _Patience
    ) -> AsyncIterator[ClientResponse]:
        self._offline.check()
        now = self._clock()
        if hold := self.quota.hold(now, is_pull=question.is_pull):
            raise self._limited(hold, now)
        with nullcontext() if self.is_mirror else self.health.admitted():
            response = await self._asked(question, patience)
        try:
            yield response
        finally:
            _end(response)

    async def _asked(self, question: Question, patience: _Patience) -> ClientResponse:
        """Ask, log in if told to, follow redirects; return what is then a good answer."""
        url = URL(f"{str(self._root).rstrip('/')}/{question.target}", encoded=True)
        repository, deadline = question.repository, patience.deadline
        login = self._authenticator
        authorization = await self._in_time(deadline, login.authorization(repository))
        response = await self._send(question, url, patience, authorization)
        try:
            if response.status == 401:
                challenges = challenge.parse(response.headers.getall(hdrs.WWW_AUTHENTICATE, ()))
                renewed = await self._in_time(
                    deadline, login.answer(challenges, repository, authorization)
                )
                if renewed:
                    response.release()
                    response = await self._send(question, url, patience, renewed)
                    authorization = renewed
            for _ in range(MAX_REDIRECTS):
                if response.status not in REDIRECTS or not question.follow:
                    break
                target = _redirect_target(url, response.headers.get(hdrs.LOCATION, ""))
                response.release()
                # Credentials do not leave their origin: CDNs refuse them, and strangers keep them.
                if target.origin() != url.origin():
                    authorization = None
                url = target
                response = await self._send(question, url, patience, authorization)
            await self._check(response, question, authorization)
        except BaseException:
            _end(response)
            raise
        return response

    async def _send(
        self, question: Question, url: URL, patience: _Patience, authorization: str | None
    ) -> ClientResponse:
        kind = question.kind
        headers = dict(question.headers)
        if authorization:
            headers[hdrs.AUTHORIZATION] = authorization
        is_registry = url.origin() == self._root.origin() and not self.is_mirror
        began = self._now()
        try:
            with translated(self.peer, lambda status: self._observe(kind, status)):
                async with asyncio.timeout_at(patience.deadline):
                    response = await self._session.request(
                        question.method,
                        url,
                        headers=headers,
                        allow_redirects=False,
                        timeout=patience.timeout,
                        read_bufsize=patience.read_bufsize,
                    )
        except UpstreamUnavailableError as error:
            if is_registry:
                self.health.failed(error)
            raise
        self._observe(kind, response.status)
        self._metrics.upstream_first_byte(self.name, kind, self._now() - began)
        if is_registry:
            self._learn(question, response)
        return response

    def _learn(self, question: Question, response: ClientResponse) -> None:
        """Take from an answer of the registry what it says beside its content."""
        status = response.status
        if status >= 500:
            self.health.failed(UpstreamUnavailableError(f"{self.peer} answered {status}"))
        else:
            self.health.succeeded()
        limit = retry.parse_ratelimit(response.headers.get("RateLimit-Limit"))
        remaining = retry.parse_ratelimit(response.headers.get("RateLimit-Remaining"))
        if limit is not None and remaining is not None:
            self._metrics.ratelimit(self.name, limit, remaining)
            self.quota.counted(limit, remaining)
        elif question.kind == "manifest" and status == 200:
            # An account without limits is not told any.
            self.quota.counted(None, None)

    def _limited(self, hold: Hold, now: float) -> RateLimitedError:
        left = max(1.0, hold.left(now))
        return RateLimitedError(f"{hold.reason}; next attempt in {left:.0f} s", retry_after=left)

    async def _in_time(self, deadline: float, login: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout_at(deadline):
                return await login
        except TimeoutError as error:
            raise UpstreamTimeoutError(
                f"{self.peer}'s token server did not answer in time"
            ) from error

    # What it said.

    def _observe(self, kind: str, status: int | Literal["error"]) -> None:
        self._metrics.upstream_request(self.name, kind, status)

    async def _check(
        self, response: ClientResponse, question: Question, authorization: str | None
    ) -> None:
        """Raise what a status other than success means."""
        status = response.status
        if status in (200, 206):
            if self.is_mirror and response.content_type == "text/html":
                raise UpstreamError(f"{self.peer} sent a page where content was due")
            return
        if status in REDIRECTS and not question.follow:
            return
        reason = await errors.reason(response)
        if status == 401 and authorization and authorization.startswith("Basic "):
            raise errors.login_refusal(self.peer, reason)
        if status != 429:
            raise errors.refusal(self.peer, status, question.kind, reason)
        now = self._clock()
        seconds = retry.parse_retry_after(response.headers.get(hdrs.RETRY_AFTER), now)
        hold = Hold(now, seconds, f"{self.peer} limits its rate{reason}")
        if response.url.origin() == self._root.origin():
            self.quota.limited(hold, is_pull=question.is_pull)
        raise self._limited(hold, now)


def _end(response: ClientResponse) -> None:
    # Closed, not released: what is left of a body is not worth the wait for it.
    response.close() if not response.content.at_eof() else response.release()


def _redirect_target(url: URL, location: str) -> URL:
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
