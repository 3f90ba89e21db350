"""Manifests on `/v2/`; one that can be answered without waiting is answered where its request arrives.

The nodes of a fleet ask for a manifest by the same bytes, again and again. What such bytes mean is kept
once they were parsed. When they come again and the answer is in memory, it is written at once: no
parsing, no task, which are most of what an answer costs. Everything that decides is asked each time.
"""

import time
from dataclasses import dataclass

from aiohttp import HttpVersion11, hdrs
from aiohttp.http_parser import RawRequestMessage
from aiohttp.web import BaseRequest, Response
from multidict import CIMultiDictProxy

from proxy.cache.answers import ManifestAnswer
from proxy.cache.prefetch import Prefetch
from proxy.cache.pull_through import PullThrough
from proxy.errors import ProxyError
from proxy.oci.reference import Reference
from proxy.server import ranges
from proxy.server.exchange import IMMUTABLE, Exchange, digest_headers
from proxy.server.responses import in_bytes
from proxy.server.routing import Router, Target
from proxy.storage.tables import Repository

# Heads of requests that are kept, and the length of one: more than any client sends, unless it has a token.
MAX_KNOWN = 4096
MAX_HEAD = 2048

Headers = CIMultiDictProxy[str]

_METHODS = (hdrs.METH_GET, hdrs.METH_HEAD)
# With one of these a body follows, or may.
_BODY_HEADERS = (hdrs.CONTENT_LENGTH, hdrs.TRANSFER_ENCODING, hdrs.EXPECT)


@dataclass(slots=True)
class Ready:
    """An answer in bytes, and the facts that it was made of. `sent` are the bytes of its body."""

    facts: tuple[object, ...]
    status: int
    content: bytes
    sent: int


@dataclass(slots=True)
class Known:
    """What a request's bytes mean, and what was answered last."""

    method: str
    path: str
    target: Target
    reference: Reference
    headers: Headers
    accept: tuple[str, ...]
    ready: Ready | None = None


class Manifests:
    """Answers requests for manifests."""

    def __init__(self, router: Router, cache: PullThrough, prefetch: Prefetch | None) -> None:
        self._router = router
        self._cache = cache
        self._prefetch = prefetch
        self._known: dict[bytes, Known] = {}

    async def answer(
        self, request: BaseRequest, exchange: Exchange, repository: Repository, reference: Reference
    ) -> Response:
        """Answer a GET or HEAD. Raises `ProxyError`."""
        accept = _accept(request.headers)
        answer = await self._cache.manifest(repository, reference, accept)
        exchange.cache = answer.state
        self._announce(repository, answer, request.method)
        return _response(request.headers, exchange, answer)

    def learn(self, head: bytes, message: RawRequestMessage) -> None:
        """Keep what `head`, the whole of a request, was found to mean, if `at_once` can make use of it."""
        if (
            len(head) > MAX_HEAD
            or head.count(b"\r\n\r\n") != 1
            or not head.endswith(b"\r\n\r\n")
            or message.method not in _METHODS
            or message.version != HttpVersion11
            or message.should_close
            or message.upgrade
            or not message.path.startswith("/v2/")
            or "?" in message.path
            or any(name in message.headers for name in _BODY_HEADERS)
        ):
            return
        try:
            target = self._router.parse(message.path, None, message.headers.get(hdrs.HOST))
        except ProxyError:
            return
        if target.kind != "manifest" or target.reference is None:
            return
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[head] = Known(
            message.method,
            message.path,
            target,
            target.reference,
            message.headers,
            _accept(message.headers),
        )

    def known(self, head: bytes) -> Known | None:
        """Return what these bytes are known to mean."""
        return self._known.get(head)

    def at_once(self, known: Known, exchange: Exchange) -> Ready | None:
        """Answer a request that is known; None if that takes waiting, or asking upstream."""
        repository = known.target.repository
        answer = self._cache.at_hand(repository, known.reference, known.accept)
        if answer is None:
            return None
        exchange.kind = "manifest"
        exchange.upstream = repository.upstream
        exchange.cache = answer.state
        self._announce(repository, answer, known.method)
        # What a header says of time changes with the second.
        facts = (answer.held, answer.ttl, int(answer.age), int(time.time()))
        ready = known.ready
        if ready is None or ready.facts != facts:
            response = _response(known.headers, exchange, answer)
            content, sent = in_bytes(response, known.method)
            ready = known.ready = Ready(facts, response.status, content, sent)
        exchange.sent = ready.sent
        return ready

    def _announce(self, repository: Repository, answer: ManifestAnswer, method: str) -> None:
        if self._prefetch and method == hdrs.METH_GET:
            self._prefetch.announce(repository, answer.held)


def _accept(headers: Headers) -> tuple[str, ...]:
    return tuple(headers.getall(hdrs.ACCEPT, ()))


def _response(asked: Headers, exchange: Exchange, answer: ManifestAnswer) -> Response:
    held = answer.held
    headers = digest_headers(exchange, held.digest)
    if answer.ttl is None:
        headers["Cache-Control"] = IMMUTABLE
    else:
        headers["Cache-Control"] = f"public, max-age={answer.ttl:.0f}"
        headers["Age"] = f"{answer.age:.0f}"
    if answer.warning:
        # distribution-spec, "Warnings": this form exactly, and clients print it.
        text = answer.warning.replace("\\", "").replace('"', "'")
        headers["Warning"] = f'299 - "{_printable(text)}"'
    if ranges.is_match(asked.get(hdrs.IF_NONE_MATCH), headers["ETag"]):
        return Response(status=304, headers=headers)
    headers["Content-Type"] = held.media_type
    return Response(body=held.content, headers=headers)


def _printable(text: str) -> str:
    return "".join(character if " " <= character <= "~" else "?" for character in text)[:400]
