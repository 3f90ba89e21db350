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

from proxy.cache.blobs import BlobCache
from proxy.errors import ProxyError
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository
from proxy.server.registry.manifests import (
    ManifestHandler,
    RequestHeaders,
    accept_values,
    build_manifest_response,
)
from proxy.server.registry.router import ResourceKind, Router
from proxy.server.request_context import RequestContext, blob_headers
from proxy.server.responses import serialize_head
from proxy.server.sendfile import BlobResponse
from proxy.storage.blobs import OpenBlob

# Heads of requests that are kept, and the length of one: more than any client sends, unless it has a token.
MAX_PARSED_REQUESTS = 4096
MAX_HEAD_SIZE = 2048
# A longer manifest goes the usual way, in pieces that readers share: here each gets a copy.
MAX_MANIFEST_SIZE = 32 << 10
# A blob up to this size is sent with its head.
INLINE_BLOB_SIZE = 64 << 10

_METHODS_BY_KIND = {"manifest": (hdrs.METH_GET, hdrs.METH_HEAD), "blob": (hdrs.METH_GET,)}
# With one of these a body follows, or may; or the answer is not all of a blob.
_BODY_HEADERS = (hdrs.CONTENT_LENGTH, hdrs.TRANSFER_ENCODING, hdrs.EXPECT)
_RANGE_HEADERS = (hdrs.RANGE, hdrs.IF_RANGE, hdrs.IF_NONE_MATCH)

SendCallback = Callable[[int, Exception | None], None]


@dataclass(slots=True)
class CachedHead:
    """The head of an answer, and the facts that it was made of. It holds no content: there may be thousands."""

    key: tuple[object, ...]
    status: int
    head: bytes


@dataclass(slots=True)
class ParsedRequest:
    """What a request's bytes mean, and what was answered last."""

    method: str
    path: str
    kind: ResourceKind
    repository: Repository
    reference: Reference
    headers: RequestHeaders
    accept: tuple[str, ...]
    cached_head: CachedHead | None = None


class FastPath:
    """Answers requests that came before."""

    def __init__(
        self,
        router: Router,
        blobs: BlobCache,
        manifest_handler: ManifestHandler,
        threads: Executor,
    ) -> None:
        self._router = router
        self._blobs = blobs
        self._manifest_handler = manifest_handler
        self._threads = threads
        self._parsed_requests: dict[bytes, ParsedRequest] = {}

    def remember(self, head: bytes, message: RawRequestMessage) -> None:
        """Keep what `head`, the whole of a request, was found to mean, if `manifest` or `blob` can answer it."""
        if (
            len(head) > MAX_HEAD_SIZE
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
        if target.reference is None or message.method not in _METHODS_BY_KIND.get(target.kind, ()):
            return
        if target.kind == "blob" and any(name in message.headers for name in _RANGE_HEADERS):
            return
        if len(self._parsed_requests) >= MAX_PARSED_REQUESTS:
            self._parsed_requests.clear()
        self._parsed_requests[head] = ParsedRequest(
            message.method,
            message.path,
            target.kind,
            target.repository,
            target.reference,
            message.headers,
            accept_values(message.headers),
        )

    def find(self, head: bytes) -> ParsedRequest | None:
        """Return what these bytes are known to mean."""
        return self._parsed_requests.get(head)

    def try_manifest(
        self, parsed_request: ParsedRequest, context: RequestContext
    ) -> tuple[int, bytes] | None:
        """Return status and answer to a request for a manifest; None if that takes waiting, or asking upstream."""
        answer = self._manifest_handler.lookup_cached(
            parsed_request.repository,
            parsed_request.reference,
            parsed_request.accept,
            parsed_request.method,
        )
        if answer is None or len(answer.manifest.content) > MAX_MANIFEST_SIZE:
            return None
        context.cache_state = answer.cache_state
        held = answer.manifest
        # What a header says of time changes with the second.
        facts = (held.digest, answer.ttl, int(answer.age), int(time.time()))
        ready = parsed_request.cached_head
        if ready is None or ready.key != facts:
            response = build_manifest_response(parsed_request.headers, context, answer)
            head = serialize_head(response, len(held.content))
            ready = parsed_request.cached_head = CachedHead(facts, response.status, head)
        if parsed_request.method == hdrs.METH_HEAD or ready.status == 304:
            return ready.status, ready.head
        context.bytes_sent = len(held.content)
        return ready.status, ready.head + held.content

    def open_blob(self, parsed_request: ParsedRequest, context: RequestContext) -> OpenBlob | None:
        """Return the blob that a request asks for, to be closed; None if it is not here, or nobody knows for whom."""
        assert isinstance(parsed_request.reference, Digest)
        blob = self._blobs.lookup_cached_blob(parsed_request.repository, parsed_request.reference)
        if blob:
            context.cache_state = "hit"
        return blob

    def build_blob_response(
        self,
        parsed_request: ParsedRequest,
        context: RequestContext,
        blob: OpenBlob,
        on_end: SendCallback,
    ) -> BlobResponse | bytes:
        """Return the answer with this blob, which it closes: all of a small one, or what sends a large one."""
        assert isinstance(parsed_request.reference, Digest)
        facts = (blob.size, int(time.time()))
        ready = parsed_request.cached_head
        if ready is None or ready.key != facts:
            response = Response(headers=blob_headers(context, parsed_request.reference))
            ready = parsed_request.cached_head = CachedHead(
                facts, 200, serialize_head(response, blob.size)
            )
        content = _read_small(blob)
        if content is None:
            return BlobResponse(ready.head, blob, self._threads, on_end)
        blob.close()
        on_end(blob.size, None)
        return ready.head + content


def _read_small(blob: OpenBlob) -> bytearray | None:
    """Return all of a blob, if it is small and in memory."""
    if blob.size > INLINE_BLOB_SIZE:
        return None
    content = bytearray(blob.size)
    try:
        count = os.preadv(blob.fd, (content,), 0, os.RWF_NOWAIT) if content else 0
    except OSError:
        return None
    return content if count == blob.size else None
