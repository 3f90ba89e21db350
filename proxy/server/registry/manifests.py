"""Manifests on `/v2/`."""

from collections.abc import Awaitable
from functools import lru_cache

from proxy.cache.manifests import ManifestCache, ManifestResult
from proxy.cache.prefetch import Prefetcher
from proxy.metrics import CacheState
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository
from proxy.repository_rules import NEVER
from proxy.server import ranges
from proxy.server.request import Request
from proxy.server.request_context import IMMUTABLE_CACHE_CONTROL, RequestContext, digest_headers
from proxy.server.responses import Response, SharedHeaders


class ManifestHandler:
    """Answers requests for manifests."""

    def __init__(self, manifests: ManifestCache, prefetch: Prefetcher | None) -> None:
        self._manifests = manifests
        self._prefetch = prefetch

    def handle(
        self, context: RequestContext, repository: Repository, reference: Reference
    ) -> Response | Awaitable[Response]:
        """Answer a GET or HEAD, at once if the manifest is in memory and upstream is not needed.

        Raises `ProxyError`, also from the awaitable.
        """
        accept = accept_values(context.request)
        result = self._manifests.lookup_cached_manifest(repository, reference, accept)
        if result is None:
            return self._fetch(context, repository, reference, accept)
        return self._respond(context, repository, result)

    async def _fetch(
        self,
        context: RequestContext,
        repository: Repository,
        reference: Reference,
        accept: tuple[str, ...],
    ) -> Response:
        result = await self._manifests.get_manifest(repository, reference, accept)
        return self._respond(context, repository, result)

    async def handle_peer(
        self, context: RequestContext, repository: Repository, digest: Digest, *, is_proven: bool
    ) -> Response:
        """Answer another node of the fleet. Raises `ProxyError`."""
        result = await self._manifests.get_for_peer(repository, digest, is_proven=is_proven)
        context.cache_state = result.cache_state
        return build_manifest_response(context, result)

    def _respond(
        self, context: RequestContext, repository: Repository, result: ManifestResult
    ) -> Response:
        context.cache_state, context.digest = result.cache_state, result.manifest.digest
        if self._prefetch and context.request.method == "GET":
            self._prefetch.prefetch_blobs(repository, result.manifest)
        return build_manifest_response(context, result)


def accept_values(request: Request) -> tuple[str, ...]:
    """Return the value of the request's Accept header in a tuple; an empty tuple without one."""
    accept = request.headers.get("accept")
    return () if accept is None else (accept,)


def build_manifest_response(context: RequestContext, result: ManifestResult) -> Response:
    """Return the response with a manifest, or 304 if the client has it."""
    manifest = result.manifest
    # A tag that never moves is like a digest.
    is_fixed = result.ttl is None or result.ttl == NEVER
    ttl = None if is_fixed else int(result.ttl or 0)
    headers = _manifest_headers(
        manifest.digest,
        manifest.media_type,
        result.cache_state,
        context.namespace,
        ttl,
        0 if ttl is None else int(result.age),
        result.warning,
    )
    condition = context.request.headers.get("if-none-match")
    if condition is not None and ranges.is_not_modified(condition, headers["ETag"]):
        return Response(304, {name: headers[name] for name in headers if name != "Content-Type"})
    return Response(200, headers, manifest.content)


# The nodes of a fleet request the same few manifests again and again.
@lru_cache(maxsize=4096)
def _manifest_headers(
    digest: Digest,
    media_type: str,
    cache_state: CacheState,
    namespace: str,
    ttl: int | None,
    age: int,
    warning: str,
) -> SharedHeaders:
    headers = digest_headers(cache_state, namespace, digest)
    if ttl is None:
        headers["Cache-Control"] = IMMUTABLE_CACHE_CONTROL
    else:
        headers["Cache-Control"] = f"public, max-age={ttl}"
        headers["Age"] = str(age)
    if warning:
        # distribution-spec, "Warnings", requires exactly this form. Clients print the text.
        text = warning.replace("\\", "").replace('"', "'")
        headers["Warning"] = f'299 - "{_printable(text)}"'
    headers["Content-Type"] = media_type
    return SharedHeaders.of(headers)


def _printable(text: str) -> str:
    return "".join(character if " " <= character <= "~" else "?" for character in text)[:400]
