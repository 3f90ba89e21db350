"""The requests under `/v2/`, the read side of the distribution specification, and `/v1/search`."""

from collections.abc import Awaitable, Mapping
from urllib.parse import quote

from proxy.cache.blobs import BlobCache
from proxy.cache.listings import ListingCache
from proxy.cache.manifests import ManifestCache
from proxy.cache.prefetch import Prefetcher
from proxy.cache.search import DEFAULT_LIMIT, RepositorySearch
from proxy.config import UpstreamSettings
from proxy.config.schema import DEFAULT_UPSTREAM
from proxy.errors import UnknownManifestError, UnknownNameError
from proxy.fleet.transfers import PeerTransfers
from proxy.names import NameParser
from proxy.oci.digest import Digest
from proxy.oci.manifest import OCI_INDEX
from proxy.oci.reference import Repository
from proxy.server.registry.blobs import BlobHandler
from proxy.server.registry.manifests import ManifestHandler
from proxy.server.registry.router import Router
from proxy.server.request import Request
from proxy.server.request_context import CACHE_STATUS, RequestContext
from proxy.server.responses import Response, encoded_response, json_response

# The largest page of tags or repositories, in entries.
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
        peer_transfers: PeerTransfers,
        accel_redirect: str = "",
    ) -> None:
        self._router = Router(upstreams)
        self._names = NameParser(upstreams)
        self._manifests = manifests
        self._manifest_handler = ManifestHandler(manifests, prefetch)
        self._blob_handler = BlobHandler(blobs, peer_transfers, accel_redirect)
        self._listings = listings
        self._search = search

    def handle(self, request: Request, context: RequestContext) -> Response | Awaitable[Response]:
        """Answer a GET or HEAD: return the response, or an awaitable of it if it must wait.

        Raises `ProxyError`, also from the awaitable.
        """
        path = request.path
        if path in ("/v2/", "/v2"):
            context.kind = "ping"
            return json_response({}, headers={"Cache-Status": CACHE_STATUS["none"]})
        if path == "/v2/_catalog":
            context.kind = "catalog"
            return self._handle_catalog(request.query)
        if path.startswith("/v1/"):
            return self._handle_v1(request, context)
        return self._handle_resource(request, context)

    async def handle_peer(self, request: Request, context: RequestContext) -> Response:
        """Answer another node of the fleet from the store or a running download; upstream is not asked.

        Raises `ProxyError`: `UnknownNameError` for content that this node has, but not for the repository.
        """
        target = self._router.parse(request.path, request.query.get("ns"), None)
        repository, digest = target.repository, target.reference
        context.kind, context.upstream = target.kind, repository.upstream
        is_proven = "pullcache-proven" in request.headers
        if request.method == "GET" and isinstance(digest, Digest):
            if target.kind == "manifest":
                return await self._manifest_handler.handle_peer(
                    context, repository, digest, is_proven=is_proven
                )
            if target.kind == "blob":
                return await self._blob_handler.handle_peer(
                    context, repository, digest, is_proven=is_proven
                )
        raise UnknownManifestError("peers are sent manifests and blobs by digest")

    def _handle_resource(
        self, request: Request, context: RequestContext
    ) -> Response | Awaitable[Response]:
        path = request.path
        namespace = request.query.get("ns") if request.query_string else None
        target = self._router.parse(path, namespace, request.headers.get("host"))
        repository, reference = target.repository, target.reference
        context.target = target
        context.kind = target.kind
        context.upstream = repository.upstream
        if namespace:
            context.namespace = repository.upstream
        if target.kind == "manifest" and reference:
            return self._manifest_handler.handle(context, repository, reference)
        if not isinstance(reference, Digest):
            return self._handle_tags(request, context, repository)
        if target.kind == "referrers":
            return self._handle_referrers(request, context, repository, reference)
        if self._manifests.is_judged(repository, reference):
            return self._handle_manifest_among_blobs(context, repository, reference)
        return self._blob_handler.handle(context, repository, reference)

    async def _handle_manifest_among_blobs(
        self, context: RequestContext, repository: Repository, digest: Digest
    ) -> Response:
        """Respond to a request for a manifest as a blob, which containerd sends after a refusal."""
        await self._manifests.get_manifest(repository, digest, ())
        response = self._blob_handler.handle(context, repository, digest)
        return response if isinstance(response, Response) else await response

    # Lists.

    async def _handle_tags(
        self,
        request: Request,
        context: RequestContext,
        repository: Repository,
    ) -> Response:
        tags, context.cache_state = await self._listings.list_tags(repository)
        path, query, headers = request.path, request.query, context.shared_headers
        name = path.removeprefix("/v2/").removesuffix("/tags/list")
        if not query:
            return encoded_response(tags.document(name), headers=headers)
        limit = _page_size(query)
        page, last = tags.page(name, query.get("last", ""), limit)
        if last:
            headers |= _next_link(path, limit, last, query.get("ns", ""))
        return encoded_response(page, headers=headers)

    async def _handle_referrers(
        self,
        request: Request,
        context: RequestContext,
        repository: Repository,
        digest: Digest,
    ) -> Response:
        wanted = request.query.get("artifactType", "")
        found, context.cache_state = await self._listings.list_referrers(repository, digest, wanted)
        headers = context.shared_headers
        if wanted:
            headers["OCI-Filters-Applied"] = "artifactType"
        return encoded_response(found.document(), content_type=OCI_INDEX, headers=headers)

    async def _handle_catalog(self, query: Mapping[str, str]) -> Response:
        limit = _page_size(query)
        # One more tells whether there is a next page.
        found = await self._listings.list_repositories(
            query.get("last", ""), limit + 1, self._names.is_allowed
        )
        page = list(map(_pull_name, found[:limit]))
        headers = {"Cache-Status": CACHE_STATUS["hit"]}
        if page and len(found) > limit:
            headers |= _next_link("/v2/_catalog", limit, page[-1])
        return json_response({"repositories": page}, headers=headers)

    # Version 1 of the API, which `docker search` and `podman search` still use.

    async def _handle_v1(self, request: Request, context: RequestContext) -> Response:
        path, query = request.path, request.query
        if path == "/v1/_ping":
            context.kind = "ping"
            # Without this, docker treats the cache as a private registry and sends its password
            # with searches.
            headers = {
                "X-Docker-Registry-Standalone": "false",
                "Cache-Status": CACHE_STATUS["none"],
            }
            return json_response({"standalone": False}, headers=headers)
        if path != "/v1/search":
            raise UnknownNameError("only /v1/search exists in version 1; images are under /v2/")
        context.kind = "search"
        search_query = self._search.parse_query(
            query.get("q", ""),
            upstream=self._router.find_upstream(request.headers.get("host")),
            limit=_query_int(query, "n", DEFAULT_LIMIT),
            page=_query_int(query, "page", 1),
        )
        context.upstream = search_query.upstream
        result = await self._search.search(search_query)
        context.cache_state = result.cache_state
        document = {
            "query": search_query.terms,
            "num_results": result.page.total,
            "num_pages": -(-result.page.total // search_query.limit),
            "page": search_query.page,
            "page_size": search_query.limit,
            "results": [
                {
                    "name": one.name,
                    "description": one.description,
                    "star_count": one.stars,
                    "is_official": one.is_official,
                    "is_automated": False,
                }
                for one in result.page.results
            ],
        }
        return json_response(document, headers={"Cache-Status": CACHE_STATUS[result.cache_state]})


def _pull_name(repository: Repository) -> str:
    """Return the name by which clients pull the repository from this cache."""
    if repository.upstream == DEFAULT_UPSTREAM:
        return repository.name
    return f"{repository.upstream}/{repository.name}"


def _page_size(query: Mapping[str, str]) -> int:
    """Return the number of entries that `n` asks for, at most `MAX_PAGE_SIZE` (CVE-2023-2253).

    An invalid number is ignored.
    """
    return min(MAX_PAGE_SIZE, max(0, _query_int(query, "n", MAX_PAGE_SIZE)))


def _next_link(path: str, limit: int, last: str, namespace: str = "") -> dict[str, str]:
    """Return the `Link` header of the page that follows the entry `last`."""
    parameters = f"n={limit}&last={quote(last, safe='')}"
    if namespace:
        parameters += f"&ns={quote(namespace, safe='')}"
    return {"Link": f'<{path}?{parameters}>; rel="next"'}


def _query_int(query: Mapping[str, str], name: str, default: int) -> int:
    """Return an integer parameter of the query; `default` if it is absent or invalid."""
    try:
        return int(query.get(name, ""))
    except ValueError:
        return default
