"""Manifests on `/v2/`."""

from aiohttp import hdrs
from aiohttp.web import BaseRequest, Response
from multidict import CIMultiDictProxy

from proxy.cache.manifests import ManifestCache, ManifestResult
from proxy.cache.prefetch import Prefetcher
from proxy.oci.reference import Reference, Repository
from proxy.server import ranges
from proxy.server.request_context import IMMUTABLE_CACHE_CONTROL, RequestContext, digest_headers
from proxy.server.responses import InMemoryResponse

RequestHeaders = CIMultiDictProxy[str]


class ManifestHandler:
    """Answers requests for manifests."""

    def __init__(self, manifests: ManifestCache, prefetch: Prefetcher | None) -> None:
        self._manifests = manifests
        self._prefetch = prefetch

    async def handle(
        self,
        request: BaseRequest,
        context: RequestContext,
        repository: Repository,
        reference: Reference,
    ) -> Response:
        """Answer a GET or HEAD. Raises `ProxyError`."""
        accept = accept_values(request.headers)
        answer = await self._manifests.get_manifest(repository, reference, accept)
        context.cache_state = answer.cache_state
        self._notify_prefetch(repository, answer, request.method)
        return build_manifest_response(request.headers, context, answer)

    def lookup_cached(
        self, repository: Repository, reference: Reference, accept: tuple[str, ...], method: str
    ) -> ManifestResult | None:
        """Return the answer to a GET or HEAD, if that takes no waiting, and nobody has to be asked."""
        answer = self._manifests.lookup_cached_manifest(repository, reference, accept)
        if answer:
            self._notify_prefetch(repository, answer, method)
        return answer

    def _notify_prefetch(self, repository: Repository, result: ManifestResult, method: str) -> None:
        if self._prefetch and method == hdrs.METH_GET:
            self._prefetch.prefetch_blobs(repository, result.manifest)


def accept_values(headers: RequestHeaders) -> tuple[str, ...]:
    """Return the lines of the header Accept."""
    return tuple(headers.getall(hdrs.ACCEPT, ()))


def build_manifest_response(
    request_headers: RequestHeaders, context: RequestContext, result: ManifestResult
) -> Response:
    """Return the answer to a request that had the headers `asked`."""
    held = result.manifest
    headers = digest_headers(context, held.digest)
    if result.ttl is None:
        headers["Cache-Control"] = IMMUTABLE_CACHE_CONTROL
    else:
        headers["Cache-Control"] = f"public, max-age={result.ttl:.0f}"
        headers["Age"] = f"{result.age:.0f}"
    if result.warning:
        # distribution-spec, "Warnings": this form exactly, and clients print it.
        text = result.warning.replace("\\", "").replace('"', "'")
        headers["Warning"] = f'299 - "{_printable(text)}"'
    if ranges.is_not_modified(request_headers.get(hdrs.IF_NONE_MATCH), headers["ETag"]):
        return Response(status=304, headers=headers)
    headers["Content-Type"] = held.media_type
    return InMemoryResponse(body=held.content, headers=headers)


def _printable(text: str) -> str:
    return "".join(character if " " <= character <= "~" else "?" for character in text)[:400]
