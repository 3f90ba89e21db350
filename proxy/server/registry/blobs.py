"""Blobs on `/v2/`, whole or in ranges, from the store or from a running download."""

import asyncio
import os
import secrets
import sys
from collections.abc import Awaitable
from contextlib import AsyncExitStack, suppress

from proxy.cache.blobs import BlobCache, BlobResult
from proxy.concurrency import RESPONSE_TIMEOUT
from proxy.download.reader import DownloadReader
from proxy.errors import TooManyRequestsError, UpstreamTimeoutError
from proxy.fleet.transfers import PeerTransfers
from proxy.log import get_logger
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.server import ranges
from proxy.server.ranges import ByteRange, RangeNotSatisfiableError
from proxy.server.request_context import (
    CACHE_STATUS,
    RequestContext,
    blob_headers,
    hit_headers,
    redirect_headers,
)
from proxy.server.responses import Body, BodySource, FileBody, Response
from proxy.storage.blobs import FileRange, OpenBlob
from proxy.upstream.peers import INSIST_HEADER, PATH_HEADER

# Seconds that another node waits for the first bytes of a download here; then it asks again.
PEER_WAIT = 5.0
# A stored blob up to this size, in bytes, is sent with its head if it is in memory.
INLINE_BLOB_SIZE = 64 << 10


# A trusted proxy that sends files itself says so in this header (the convention of Rack).
SENDFILE_TYPE = "X-Accel-Redirect"

log = get_logger(__name__)


class BlobHandler:
    """Answers requests for blobs.

    `accel_redirect` is the location of the store's blobs in nginx; empty if nginx does not send them.
    """

    def __init__(
        self, blobs: BlobCache, peer_transfers: PeerTransfers, accel_redirect: str = ""
    ) -> None:
        self._blobs = blobs
        self._peer_transfers = peer_transfers
        self._accel_redirect = accel_redirect

    def handle(
        self, context: RequestContext, repository: Repository, digest: Digest
    ) -> Response | Awaitable[Response]:
        """Answer a GET or HEAD, at once if the blob is stored and needs no request to upstream.

        Raises `ProxyError`, also from the awaitable.
        """
        request = context.request
        if request.method == "HEAD" or "if-none-match" in request.headers:
            return self._answer_without_body(context, repository, digest)
        if self._is_sent_by_nginx(context):
            size = self._blobs.lookup_cached_size(repository, digest)
            if size is None:
                return self._answer_later(context, repository, digest)
            context.cache_state = "hit"
            return self._redirect(context, digest, size)
        blob = self._blobs.lookup_cached_blob(repository, digest)
        if blob is None:
            return self._answer_later(context, repository, digest)
        context.cache_state = "hit"
        try:
            response = _respond_stored(context, digest, blob)
        except BaseException:
            blob.close()
            raise
        if isinstance(response.body, bytes):
            blob.close()
        return response

    async def handle_peer(
        self, context: RequestContext, repository: Repository, digest: Digest, *, is_proven: bool
    ) -> Response:
        """Answer another node of the fleet.

        Raises `ProxyError`: `TooManyRequestsError` if as many nodes as may be are sent the blob now.
        """
        blob = await self._blobs.open_for_peer(repository, digest, is_proven=is_proven)
        if blob and (content := _read_small(context, blob)) is not None:
            blob.close()
            context.cache_state = "hit"
            return Response(200, hit_headers(context.namespace, digest), content)
        peer = f"peer {context.request.client or ''}"
        async with AsyncExitStack() as stack:
            if blob:
                stack.callback(blob.close)
                self._begin_transfer(context, digest, stack)
                context.cache_state = "hit"
                return _respond(context, digest, blob.size, _StoredBlob(blob.fd), stack.pop_all())
            reader = await stack.enter_async_context(
                self._blobs.join_for_peer(repository, digest, peer, is_proven=is_proven)
            )
            self._begin_transfer(context, digest, stack)
            context.cache_state = "collapsed"
            reader.require_stored()
            deadline = asyncio.get_running_loop().time() + PEER_WAIT
            await _wait_for_start(reader, deadline)
            response = _respond(context, digest, reader.size, reader, stack.pop_all())
            response.headers[PATH_HEADER] = ", ".join(reader.path)
            return response

    def _begin_transfer(
        self, context: RequestContext, digest: Digest, stack: AsyncExitStack
    ) -> None:
        """Count a transfer to another node until the stack is closed. Raises `TooManyRequestsError`."""
        if self._peer_transfers.is_full(digest):
            if INSIST_HEADER.lower() not in context.request.headers:
                raise TooManyRequestsError("this node sends the blob to fleet.children others now")
            log.info("peer_limit_exceeded", digest=str(digest), peer=context.request.client)
        self._peer_transfers.begin(digest)
        stack.callback(self._peer_transfers.end, digest)

    async def _answer_without_body(
        self, context: RequestContext, repository: Repository, digest: Digest
    ) -> Response:
        headers = context.request.headers
        is_match = ranges.is_not_modified(headers.get("if-none-match"), f'"{digest}"')
        if context.request.method != "HEAD" and not is_match:
            return await self._answer_later(context, repository, digest)
        size, context.cache_state = await self._blobs.get_blob_size(repository, digest)
        response = Response(304 if is_match else 200, blob_headers(context, digest))
        if size is not None and not is_match:
            response.headers["Content-Length"] = str(size)
        return response

    async def _answer_later(
        self, context: RequestContext, repository: Repository, digest: Digest
    ) -> Response:
        deadline = asyncio.get_running_loop().time() + RESPONSE_TIMEOUT
        async with AsyncExitStack() as stack:
            result: BlobResult = await stack.enter_async_context(
                self._blobs.open_blob(repository, digest, client=context.request.client or "")
            )
            context.cache_state = result.cache_state
            source = result.source
            if isinstance(source, OpenBlob):
                if self._is_sent_by_nginx(context):
                    return self._redirect(context, digest, source.size)
                content = _read_small(context, source)
                if content is not None:
                    return Response(200, blob_headers(context, digest), content)
                stored = _StoredBlob(source.fd)
                return _respond(context, digest, source.size, stored, stack.pop_all())
            await _wait_for_start(source, deadline)
            if source.size is None and context.request.is_http_1_0:
                # HTTP/1.0 has no chunks: a client could not tell a body cut short from a whole one.
                await source.wait_verified()
            if source.is_uncached:
                context.cache_state = "bypass"
            elif source.is_from_peer:
                context.cache_state = "peer"
            return _respond(context, digest, source.size, source, stack.pop_all())

    def _is_sent_by_nginx(self, context: RequestContext) -> bool:
        request = context.request
        return (
            bool(self._accel_redirect)
            and request.is_proxied
            and request.headers.get("x-sendfile-type") == SENDFILE_TYPE
        )

    def _redirect(self, context: RequestContext, digest: Digest, size: int) -> Response:
        """Let nginx send the blob, or the ranges of it that the request selects."""
        headers = redirect_headers(
            self._accel_redirect, context.cache_state, context.namespace, digest
        )
        context.promised_bytes = size
        if "range" in context.request.headers:
            with suppress(RangeNotSatisfiableError):
                context.promised_bytes = 0
                selected = _select_ranges(context, headers["ETag"], size)
                context.promised_bytes = sum(one.length for one in selected) or size
        return Response(200, headers)


async def _wait_for_start(reader: DownloadReader, deadline: float) -> None:
    """Wait for upstream's first bytes or its error, so that the response has the error's status."""
    try:
        async with asyncio.timeout_at(deadline):
            await reader.wait_ready()
    except TimeoutError:
        # If upstream has stated a size, the headers are sent now; without a size they cannot be.
        if reader.size is None:
            raise UpstreamTimeoutError(
                f"{reader.upstream_name} has sent nothing for {RESPONSE_TIMEOUT:.0f} s; "
                "try again, the download continues"
            ) from None


class _StoredBlob:
    """The source of a stored blob, all of whose bytes may be sent."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    async def next(self, offset: int, stop: int = sys.maxsize) -> FileRange:
        """Return the range from `offset` up to `stop`."""
        return FileRange(self._fd, offset, stop)


# The response.


def _respond_stored(context: RequestContext, digest: Digest, blob: OpenBlob) -> Response:
    """Return the response with a stored blob, which owns the blob unless its body is bytes."""
    if "range" in context.request.headers:
        resources = AsyncExitStack()
        resources.callback(blob.close)
        return _respond(context, digest, blob.size, _StoredBlob(blob.fd), resources)
    content = _read_small(context, blob)
    body = FileBody(blob) if content is None else content
    return Response(200, hit_headers(context.namespace, digest), body)


def _respond(
    context: RequestContext,
    digest: Digest,
    size: int | None,
    source: BodySource,
    resources: AsyncExitStack,
) -> Response:
    """Return the response with a blob, or with the ranges that the request selects.

    The response owns `resources` and closes them at its end.
    """
    headers = blob_headers(context, digest)
    if size is None:
        # It may turn out to be larger than the store.
        headers["Cache-Status"] = CACHE_STATUS["bypass"]
    try:
        selected = _select_ranges(context, headers["ETag"], size)
    except RangeNotSatisfiableError:
        headers["Content-Range"] = f"bytes */{size}"
        return Response(416, headers, Body(0, (), source, resources))
    if len(selected) > 1 and isinstance(source, DownloadReader):
        if source.is_uncached:
            # Each range would cost a transfer from upstream, and the whole blob costs one.
            selected = []
        else:
            source.require_stored()
    if not selected or size is None:
        return Response(200, headers, Body(size, (ByteRange(0, size or 0),), source, resources))
    if len(selected) == 1:
        (one,) = selected
        headers["Content-Range"] = _content_range(one, size)
        return Response(206, headers, Body(one.length, selected, source, resources))
    return _respond_multipart(headers, selected, size, source, resources)


def _select_ranges(context: RequestContext, etag: str, size: int | None) -> list[ByteRange]:
    request_headers = context.request.headers
    range_header = request_headers.get("range")
    if range_header is None or size is None:
        return []
    if not ranges.is_if_range_match(request_headers.get("if-range"), etag):
        return []
    return ranges.parse_ranges(range_header, size)


def _respond_multipart(
    headers: dict[str, str],
    selected: list[ByteRange],
    size: int,
    source: BodySource,
    resources: AsyncExitStack,
) -> Response:
    """Return several ranges in one body (RFC 9110 section 14.6)."""
    boundary = secrets.token_hex(16)
    segments: list[bytes | ByteRange] = []
    for one in selected:
        part_head = (
            f"\r\n--{boundary}\r\nContent-Type: {headers['Content-Type']}\r\n"
            f"Content-Range: {_content_range(one, size)}\r\n\r\n"
        )
        segments += (part_head.encode(), one)
    segments.append(f"\r\n--{boundary}--\r\n".encode())
    length = sum(one.length if isinstance(one, ByteRange) else len(one) for one in segments)
    headers["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
    return Response(206, headers, Body(length, segments, source, resources))


def _content_range(one: ByteRange, size: int) -> str:
    return f"bytes {one.start}-{one.stop - 1}/{size}"


def _read_small(context: RequestContext, blob: OpenBlob) -> bytes | None:
    """Return the whole blob if it is small, in memory and no range is requested, else None."""
    if blob.size > INLINE_BLOB_SIZE or "range" in context.request.headers:
        return None
    content = bytearray(blob.size)
    try:
        count = os.preadv(blob.fd, (content,), 0, os.RWF_NOWAIT) if content else 0
    except OSError:
        return None
    return bytes(content) if count == blob.size else None
