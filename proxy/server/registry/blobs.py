"""Blobs on `/v2/`: from the store, or from a download as it grows; whole, or ranges of them."""

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack

from proxy.cache.pull_through import BlobResult, PullThroughCache
from proxy.concurrency import RESPONSE_TIMEOUT
from proxy.download.download import Download, NotStoring
from proxy.errors import UpstreamTimeoutError, UpstreamUnavailableError
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.server import ranges
from proxy.server.ranges import ByteRange, RangeNotSatisfiableError
from proxy.server.request_context import RequestContext, blob_headers
from proxy.server.responses import Body, BodyPart, FileRange, Response
from proxy.storage.blobs import OpenBlob

# A stored blob up to this size is sent with its head, if it is in memory.
INLINE_BLOB_SIZE = 64 << 10

# Reads a range; without an end, up to the end of a blob whose size is not known.
_ReadRange = Callable[[int, int | None], AsyncGenerator[BodyPart, None]]


class BlobHandler:
    """Answers requests for blobs."""

    def __init__(self, cache: PullThroughCache) -> None:
        self._cache = cache

    def handle(
        self, context: RequestContext, repository: Repository, digest: Digest
    ) -> Response | Awaitable[Response]:
        """Answer a GET or HEAD, at once if the blob is stored and upstream need not be asked."""
        request = context.request
        if request.method == "HEAD" or "if-none-match" in request.headers:
            return self._answer_without_body(context, repository, digest)
        blob = self._cache.lookup_cached_blob(repository, digest)
        if blob is None:
            return self._answer_later(context, repository, digest)
        context.cache_state = "hit"
        try:
            content = _read_small(context, blob)
            if content is None:
                resources = AsyncExitStack()
                resources.callback(blob.close)
                return _respond(context, digest, blob.size, _file_reader(blob.fd), resources)
            response = Response(200, blob_headers(context, digest), content)
        except BaseException:
            blob.close()
            raise
        blob.close()
        return response

    async def _answer_without_body(
        self, context: RequestContext, repository: Repository, digest: Digest
    ) -> Response:
        headers = context.request.headers
        is_match = ranges.is_not_modified(headers.get("if-none-match"), f'"{digest}"')
        if context.request.method != "HEAD" and not is_match:
            return await self._answer_later(context, repository, digest)
        size, context.cache_state = await self._cache.get_blob_size(repository, digest)
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
                self._cache.open_blob(repository, digest)
            )
            context.cache_state = result.cache_state
            source = result.source
            if isinstance(source, OpenBlob):
                content = _read_small(context, source)
                if content is not None:
                    return Response(200, blob_headers(context, digest), content)
                reader = _file_reader(source.fd)
                return _respond(context, digest, source.size, reader, stack.pop_all())
            await _wait_for_start(source, deadline)
            if source.size is None and context.request.is_http_1_0:
                # No chunks there: a body without a length could not be told from a whole one.
                await _wait_for_commit(source)
            if source.has_stopped_storing:
                context.cache_state = "bypass"
            return _respond(context, digest, source.size, _download_reader(source), stack.pop_all())


async def _wait_for_start(download: Download, deadline: float) -> None:
    """Wait for upstream's first bytes or its error, so that an error has a status of its own."""
    try:
        async with asyncio.timeout_at(deadline):
            await download.wait_readable(0)
    except NotStoring:
        pass
    except TimeoutError:
        # Upstream has promised a size, but sends nothing yet: the headers cannot wait longer.
        if download.size is None:
            raise UpstreamTimeoutError(
                f"{download.repository.upstream} has sent nothing for {RESPONSE_TIMEOUT:.0f} s; "
                "try again, the download goes on"
            ) from None


async def _wait_for_commit(download: Download) -> None:
    """Wait until the download is verified, and its size known."""
    try:
        await download.wait_readable(sys.maxsize)
    except NotStoring:
        raise UpstreamUnavailableError(
            "its size is not known and it is not stored; ask for it by HTTP/1.1"
        ) from None


# Where the bytes come from.


def _file_reader(fd: int) -> _ReadRange:
    async def read(start: int, stop: int | None) -> AsyncGenerator[BodyPart, None]:
        assert stop is not None
        if start < stop:
            yield FileRange(fd, start, stop)

    return read


def _download_reader(download: Download) -> _ReadRange:
    async def read(start: int, stop: int | None) -> AsyncGenerator[BodyPart, None]:
        offset = start
        end = sys.maxsize if stop is None else stop
        is_read_ahead = stop is not None and download.is_read_ahead(start, stop)
        try:
            while offset < end:
                limit = await download.wait_readable(offset, end, is_read_ahead=is_read_ahead)
                limit = min(limit, end)
                if limit == offset:
                    return
                yield FileRange(download.fd, offset, limit)
                offset = limit
        except NotStoring:
            async for chunk in download.stream_from_upstream(offset, stop):
                yield chunk

    return read


# The response.


def _respond(
    context: RequestContext,
    digest: Digest,
    size: int | None,
    read: _ReadRange,
    resources: AsyncExitStack,
) -> Response:
    """Return the response with a blob or the ranges of it that the request asks for.

    It closes `resources` in the end.
    """
    headers = blob_headers(context, digest)
    try:
        selected = _select_ranges(context, headers["ETag"], size)
    except RangeNotSatisfiableError:
        headers["Content-Range"] = f"bytes */{size}"
        return Response(416, headers, Body(0, read(0, 0), resources))
    if not selected or size is None:
        return Response(200, headers, Body(size, read(0, size), resources))
    if len(selected) == 1:
        (one,) = selected
        headers["Content-Range"] = _content_range(one, size)
        return Response(206, headers, Body(one.length, read(one.start, one.stop), resources))
    return _respond_multipart(headers, selected, size, read, resources)


def _select_ranges(context: RequestContext, etag: str, size: int | None) -> list[ByteRange]:
    request_headers = context.request.headers
    asked = request_headers.get("range")
    if asked is None or size is None:
        return []
    if not ranges.is_if_range_match(request_headers.get("if-range"), etag):
        return []
    return ranges.parse_ranges(asked, size)


def _respond_multipart(
    headers: dict[str, str],
    selected: list[ByteRange],
    size: int,
    read: _ReadRange,
    resources: AsyncExitStack,
) -> Response:
    """Return several ranges in one body (RFC 9110 section 14.6)."""
    boundary = secrets.token_hex(16)
    part_heads = [
        f"\r\n--{boundary}\r\nContent-Type: {headers['Content-Type']}\r\n"
        f"Content-Range: {_content_range(one, size)}\r\n\r\n".encode()
        for one in selected
    ]
    end = f"\r\n--{boundary}--\r\n".encode()
    length = sum(map(len, part_heads)) + sum(one.length for one in selected) + len(end)

    async def parts() -> AsyncGenerator[BodyPart, None]:
        for part_head, one in zip(part_heads, selected, strict=True):
            yield part_head
            async for part in read(one.start, one.stop):
                yield part
        yield end

    headers["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
    return Response(206, headers, Body(length, parts(), resources))


def _content_range(one: ByteRange, size: int) -> str:
    return f"bytes {one.start}-{one.stop - 1}/{size}"


def _read_small(context: RequestContext, blob: OpenBlob) -> bytes | None:
    """Return all of a blob, if it is small and in memory, and all of it is asked for."""
    if blob.size > INLINE_BLOB_SIZE or "range" in context.request.headers:
        return None
    content = bytearray(blob.size)
    try:
        count = os.preadv(blob.fd, (content,), 0, os.RWF_NOWAIT) if content else 0
    except OSError:
        return None
    return bytes(content) if count == blob.size else None
