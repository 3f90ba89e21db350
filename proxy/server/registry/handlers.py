"""`/v2/*`: the read side of the distribution specification; and `/v1/search`."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Executor
from contextlib import suppress
from urllib.parse import quote

from aiohttp import HttpVersion11, hdrs
from aiohttp.web import BaseRequest, Response, StreamResponse
from multidict import MultiDictProxy

from proxy.cache.blobs import BlobCache, BlobResult
from proxy.cache.listings import ListingCache
from proxy.cache.manifests import ManifestCache
from proxy.cache.prefetch import Prefetcher
from proxy.cache.search import DEFAULT_LIMIT, RepositorySearch
from proxy.concurrency import RESPONSE_TIMEOUT
from proxy.config import UpstreamSettings
from proxy.config.schema import DEFAULT_UPSTREAM
from proxy.download.reader import DownloadReader
from proxy.errors import UnknownNameError, UpstreamTimeoutError
from proxy.oci.digest import Digest
from proxy.oci.manifest import OCI_INDEX
from proxy.oci.reference import Repository
from proxy.server import ranges
from proxy.server.fast_path import FastPath
from proxy.server.ranges import ByteRange, RangeNotSatisfiableError
from proxy.server.registry.manifests import ManifestHandler
from proxy.server.registry.router import Router, TargetResource
from proxy.server.request_context import CACHE_STATUS, RequestContext, blob_headers
from proxy.server.responses import BodySender, json_response

MAX_PAGE_SIZE = 10_000


class RegistryHandler:
    """Answers requests under `/v2/` and `/v1/`."""

    def __init__(
        self,
        upstreams: Mapping[str, UpstreamSettings],
        manifests: ManifestCache,
        blobs: BlobCache,
        listings: ListingCache,
        prefetch: Prefetcher | None,
        search: RepositorySearch,
        threads: Executor,
    ) -> None:
        self._router = Router(upstreams)
        self._blobs = blobs
        self._manifest_handler = ManifestHandler(manifests, prefetch)
        self.fast_path = FastPath(self._router, blobs, self._manifest_handler, threads)
        self._listings = listings
        self._search = search
        self._threads = threads

    async def handle(self, request: BaseRequest, context: RequestContext) -> StreamResponse:
        """Answer a GET or HEAD. Raises `ProxyError`, and `ConnectionError` for a body cut short."""
        path, mark, _ = request.raw_path.partition("?")
        query = request.rel_url.query if mark else None
        if path in ("/v2/", "/v2"):
            context.kind = "ping"
            return json_response({}, headers={"Cache-Status": CACHE_STATUS["none"]})
        if path == "/v2/_catalog":
            context.kind = "catalog"
            return self._handle_catalog(query)
        if path.startswith("/v1/"):
            return await self._handle_v1(request, context, path, query)
        namespace = query.get("ns") if query else None
        target = self._router.parse(path, namespace, request.headers.get(hdrs.HOST))
        context.kind = target.kind
        context.upstream = target.repository.upstream
        if namespace:
            context.response_headers["OCI-Namespace"] = target.repository.upstream
        return await self._dispatch(request, context, target, query)

    async def _dispatch(
        self,
        request: BaseRequest,
        context: RequestContext,
        target: TargetResource,
        query: "MultiDictProxy[str] | None",
    ) -> StreamResponse:
        repository, reference = target.repository, target.reference
        if reference is None:
            return await self._handle_tags(request, context, repository, query)
        if target.kind == "manifest":
            return await self._manifest_handler.handle(request, context, repository, reference)
        assert isinstance(reference, Digest)
        if target.kind == "referrers":
            return await self._handle_referrers(context, repository, reference, query)
        if request.method == "HEAD":
            return await self._handle_blob_head(request, context, repository, reference)
        return await self._handle_blob(request, context, repository, reference)

    # Blobs.

    async def _handle_blob_head(
        self, request: BaseRequest, context: RequestContext, repository: Repository, digest: Digest
    ) -> Response:
        size, context.cache_state = await self._blobs.get_blob_size(repository, digest)
        headers = blob_headers(context, digest)
        if ranges.is_not_modified(request.headers.get(hdrs.IF_NONE_MATCH), headers["ETag"]):
            return Response(status=304, headers=headers)
        if size is not None:
            headers["Content-Length"] = str(size)
        return Response(headers=headers)

    async def _handle_blob(
        self, request: BaseRequest, context: RequestContext, repository: Repository, digest: Digest
    ) -> StreamResponse:
        if ranges.is_not_modified(request.headers.get(hdrs.IF_NONE_MATCH), f'"{digest}"'):
            _, context.cache_state = await self._blobs.get_blob_size(repository, digest)
            return Response(status=304, headers=blob_headers(context, digest))
        deadline = asyncio.get_running_loop().time() + RESPONSE_TIMEOUT
        opened = self._blobs.open_blob(repository, digest, client=request.remote or "")
        async with opened as answer:
            context.cache_state = answer.cache_state
            if isinstance(answer.source, DownloadReader):
                await self._wait_for_start(answer.source, deadline)
                if answer.source.size is None and request.version < HttpVersion11:
                    # No chunks there: a body without a length could not be told from a whole one.
                    await answer.source.wait_verified()
            return await self._send_blob(request, context, answer, digest)

    async def _wait_for_start(self, reader: DownloadReader, deadline: float) -> None:
        """Wait for upstream's first bytes, or its no, so that a no has a status of its own."""
        try:
            async with asyncio.timeout_at(deadline):
                await reader.wait_ready()
        except TimeoutError:
            # Upstream has promised a size, but sends nothing yet: the headers cannot wait longer.
            if reader.size is None:
                raise UpstreamTimeoutError(
                    f"{reader.upstream_name} has sent nothing for {RESPONSE_TIMEOUT:.0f} s; "
                    "try again, the download goes on"
                ) from None

    async def _send_blob(
        self, request: BaseRequest, context: RequestContext, result: BlobResult, digest: Digest
    ) -> StreamResponse:
        source = result.source
        if isinstance(source, DownloadReader) and source.is_uncached:
            context.cache_state = "bypass"
        headers = blob_headers(context, digest)
        size = source.size
        window = ByteRange(0, size or 0)
        status = 200
        if size is not None and ranges.is_if_range_match(
            request.headers.get(hdrs.IF_RANGE), headers["ETag"]
        ):
            try:
                wanted = ranges.parse_range(request.headers.get(hdrs.RANGE), size)
            except RangeNotSatisfiableError:
                headers["Content-Range"] = f"bytes */{size}"
                return Response(status=416, headers=headers)
            if wanted:
                window, status = wanted, 206
                headers["Content-Range"] = f"bytes {wanted.start}-{wanted.stop - 1}/{size}"
        response = StreamResponse(status=status, headers=headers)
        if size is not None:
            response.content_length = window.length
        else:
            response.enable_chunked_encoding()
        writer = await response.prepare(request)
        assert writer is not None
        sender = BodySender(request, writer, self._threads)
        try:
            if size is not None:
                await sender.send(source, window)
            elif isinstance(source, DownloadReader):
                await sender.send_unsized(source)
        finally:
            context.bytes_sent = sender.bytes_sent
        return response

    # Lists.

    async def _handle_tags(
        self,
        request: BaseRequest,
        context: RequestContext,
        repository: Repository,
        query: "MultiDictProxy[str] | None",
    ) -> Response:
        tags, context.cache_state = await self._listings.list_tags(repository)
        path = request.raw_path.partition("?")[0]
        page, link = _paginate(tags, query, path)
        headers = {
            "Cache-Status": CACHE_STATUS[context.cache_state],
            **context.response_headers,
            **link,
        }
        name = path.removeprefix("/v2/").removesuffix("/tags/list")
        return json_response({"name": name, "tags": page}, headers=headers)

    async def _handle_referrers(
        self,
        context: RequestContext,
        repository: Repository,
        digest: Digest,
        query: "MultiDictProxy[str] | None",
    ) -> Response:
        found, context.cache_state = await self._listings.list_referrers(repository, digest)
        headers = {"Cache-Status": CACHE_STATUS[context.cache_state], **context.response_headers}
        wanted = query.get("artifactType") if query else None
        if wanted:
            found = [item for item in found if item.get("artifactType") == wanted]
            headers["OCI-Filters-Applied"] = "artifactType"
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found}
        return json_response(document, content_type=OCI_INDEX, headers=headers)

    def _handle_catalog(self, query: "MultiDictProxy[str] | None") -> Response:
        names = sorted(map(_pull_name, self._listings.list_repositories()))
        page, link = _paginate(names, query, "/v2/_catalog")
        headers = {"Cache-Status": CACHE_STATUS["hit"], **link}
        return json_response({"repositories": page}, headers=headers)

    # Version 1 of the API, of which `docker search` and `podman search` have stayed.

    async def _handle_v1(
        self,
        request: BaseRequest,
        context: RequestContext,
        path: str,
        query: "MultiDictProxy[str] | None",
    ) -> Response:
        if path == "/v1/_ping":
            context.kind = "ping"
            # Without this docker takes us for a private registry, and sends its password to search.
            headers = {
                "X-Docker-Registry-Standalone": "false",
                "Cache-Status": CACHE_STATUS["none"],
            }
            return json_response({"standalone": False}, headers=headers)
        if path != "/v1/search":
            raise UnknownNameError("of version 1 there is only /v1/search; images are under /v2/")
        context.kind = "search"
        wanted = self._search.parse_query(
            query.get("q", "") if query else "",
            upstream=self._router.find_upstream(request.headers.get(hdrs.HOST)),
            limit=_query_int(query, "n", DEFAULT_LIMIT),
            page=_query_int(query, "page", 1),
        )
        context.upstream = wanted.upstream
        answer = await self._search.search(wanted)
        context.cache_state = answer.cache_state
        document = {
            "query": wanted.terms,
            "num_results": answer.page.total,
            "num_pages": -(-answer.page.total // wanted.limit),
            "page": wanted.page,
            "page_size": wanted.limit,
            "results": [
                {
                    "name": one.name,
                    "description": one.description,
                    "star_count": one.stars,
                    "is_official": one.is_official,
                    "is_automated": False,
                }
                for one in answer.page.results
            ],
        }
        return json_response(document, headers={"Cache-Status": CACHE_STATUS[answer.cache_state]})


def _pull_name(repository: Repository) -> str:
    """Return the name by which the repository is pulled from here."""
    if repository.upstream == DEFAULT_UPSTREAM:
        return repository.name
    return f"{repository.upstream}/{repository.name}"


def _paginate(
    items: list[str], query: "MultiDictProxy[str] | None", path: str
) -> tuple[list[str], dict[str, str]]:
    """Return the page that `n` and `last` ask for, and the `Link` to the next one.

    A number that is none is no limit; a huge one is cut (CVE-2023-2253).
    """
    if not query:
        return items, {}
    if last := query.get("last"):
        items = [item for item in items if item > last]
    limit = MAX_PAGE_SIZE
    with suppress(ValueError):
        limit = min(MAX_PAGE_SIZE, max(0, int(query.get("n", MAX_PAGE_SIZE))))
    page = items[:limit]
    if not page or len(page) == len(items):
        return page, {}
    parameters = f"n={limit}&last={quote(page[-1], safe='')}"
    if namespace := query.get("ns"):
        parameters += f"&ns={quote(namespace, safe='')}"
    return page, {"Link": f'<{path}?{parameters}>; rel="next"'}


def _query_int(query: "MultiDictProxy[str] | None", name: str, default: int) -> int:
    """Return the number that the query gives, `default` if it gives none."""
    try:
        return int(query.get(name, "")) if query else default
    except ValueError:
        return default
