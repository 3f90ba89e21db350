"""What can be answered without waiting is answered where its request arrives.

The nodes of a fleet ask for an image by the same bytes, again and again. What such bytes mean is kept once
they were parsed. When they come again and the answer is here, it is sent at once: no parsing, no task,
which are most of what an answer costs. Everything that decides is asked each time.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from aiohttp import HttpVersion11, hdrs
from aiohttp.http_parser import RawRequestMessage
from aiohttp.web import Response

from proxy.cache.pull_through import PullThrough
from proxy.errors import ProxyError
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository
from proxy.server.registry.manifests import Headers, Manifests, accept_of, response_to
from proxy.server.registry.router import Kind, Router
from proxy.server.request_context import Exchange, blob_headers
from proxy.server.responses import head_of
from proxy.server.sendfile import Delivery
from proxy.storage.blobs import OpenBlob

# Heads of requests that are kept, and the length of one: more than any client sends, unless it has a token.
MAX_KNOWN = 4096
MAX_HEAD = 2048
# A longer manifest goes the usual way, in pieces that readers share: here each gets a copy.
MAX_MANIFEST = 32 << 10
# A blob up to this size is sent with its head.
SMALL = 64 << 10

_METHODS = {"manifest": (hdrs.METH_GET, hdrs.METH_HEAD), "blob": (hdrs.METH_GET,)}
# With one of these a body follows, or may; or the answer is not all of a blob.
_BODY_HEADERS = (hdrs.CONTENT_LENGTH, hdrs.TRANSFER_ENCODING, hdrs.EXPECT)
_PART_HEADERS = (hdrs.RANGE, hdrs.IF_RANGE, hdrs.IF_NONE_MATCH)

Note = Callable[[int, Exception | None], None]


@dataclass(slots=True)
class Ready:
    """The head of an answer, and the facts that it was made of. It holds no content: there may be thousands."""

    facts: tuple[object, ...]
    status: int
    head: bytes


@dataclass(slots=True)
class Known:
    """What a request's bytes mean, and what was answered last."""

    method: str
    path: str
    kind: Kind
    repository: Repository
    reference: Reference
    headers: Headers
    accept: tuple[str, ...]
    ready: Ready | None = None


class AtOnce:
    """Answers requests that came before."""

    def __init__(
        self, router: Router, cache: PullThrough, manifests: Manifests, threads: Executor
    ) -> None:
        self._router = router
        self._cache = cache
        self._manifests = manifests
        self._threads = threads
        self._known: dict[bytes, Known] = {}

    def learn(self, head: bytes, message: RawRequestMessage) -> None:
        """Keep what `head`, the whole of a request, was found to mean, if `manifest` or `blob` can answer it."""
        if (
            len(head) > MAX_HEAD
            or head.count(b"\r\n\r\n") != 1
            or not head.endswith(b"\r\n\r\n")
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
        if target.reference is None or message.method not in _METHODS.get(target.kind, ()):
            return
        if target.kind == "blob" and any(name in message.headers for name in _PART_HEADERS):
            return
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[head] = Known(
            message.method,
            message.path,
            target.kind,
            target.repository,
            target.reference,
            message.headers,
            accept_of(message.headers),
        )

    def known(self, head: bytes) -> Known | None:
        """Return what these bytes are known to mean."""
        return self._known.get(head)

    def manifest(self, known: Known, exchange: Exchange) -> tuple[int, bytes] | None:
        """Return status and answer to a request for a manifest; None if that takes waiting, or asking upstream."""
        answer = self._manifests.at_hand(
            known.repository, known.reference, known.accept, known.method
        )
        if answer is None or len(answer.held.content) > MAX_MANIFEST:
            return None
        exchange.cache = answer.state
        held = answer.held
        # What a header says of time changes with the second.
        facts = (held.digest, answer.ttl, int(answer.age), int(time.time()))
        ready = known.ready
        if ready is None or ready.facts != facts:
            response = response_to(known.headers, exchange, answer)
            head = head_of(response, len(held.content))
            ready = known.ready = Ready(facts, response.status, head)
        if known.method == hdrs.METH_HEAD or ready.status == 304:
            return ready.status, ready.head
        exchange.sent = len(held.content)
        return ready.status, ready.head + held.content

    def blob(self, known: Known, exchange: Exchange) -> OpenBlob | None:
        """Return the blob that a request asks for, to be closed; None if it is not here, or nobody knows for whom."""
        assert isinstance(known.reference, Digest)
        blob = self._cache.blob_at_hand(known.repository, known.reference)
        if blob:
            exchange.cache = "hit"
        return blob

    def deliver(
        self, known: Known, exchange: Exchange, blob: OpenBlob, note: Note
    ) -> Delivery | bytes:
        """Return the answer with this blob, which it closes: all of a small one, or what sends a large one."""
        assert isinstance(known.reference, Digest)
        facts = (blob.size, int(time.time()))
        ready = known.ready
        if ready is None or ready.facts != facts:
            response = Response(headers=blob_headers(exchange, known.reference))
            ready = known.ready = Ready(facts, 200, head_of(response, blob.size))
        content = _small(blob)
        if content is None:
            return Delivery(ready.head, blob, self._threads, note)
        blob.close()
        note(blob.size, None)
        return ready.head + content


def _small(blob: OpenBlob) -> bytearray | None:
    """Return all of a blob, if it is small and in memory."""
    if blob.size > SMALL:
        return None
    content = bytearray(blob.size)
    try:
        count = os.preadv(blob.fd, (content,), 0, os.RWF_NOWAIT) if content else 0
    except OSError:
        return None
    return content if count == blob.size else None
