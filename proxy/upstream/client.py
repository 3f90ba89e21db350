"""The operations on one upstream: resolve a tag, fetch a manifest, open a blob, list, search.

It sends few requests: HEAD where only a digest is needed (free at Docker Hub), and one token
request per repository. Redirects are followed but never remembered. Upstream's headers are never
passed on.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlencode

from proxy.errors import (
    DigestMismatchError,
    UpstreamError,
)
from proxy.metrics import Metrics, RequestKind
from proxy.oci.digest import Digest
from proxy.oci.manifest import ACCEPT, parse_manifest
from proxy.oci.reference import Reference
from proxy.upstream import responses, retry, search
from proxy.upstream.body import BlobBody
from proxy.upstream.encoding import is_gzip_encoded
from proxy.upstream.hub_client import HubClient
from proxy.upstream.mirrors import MirrorSet
from proxy.upstream.registry_client import REQUEST_TIMEOUT, ApiRequest, RegistryClient
from proxy.upstream.responses import MAX_LIST_SIZE, Evidence
from proxy.upstream.search import SearchPage

# A list of tags or referrers with more pages, or larger in all than `MAX_LIST_SIZE`, is an error
# (CVE-2023-2253). Quay has 100 tags in a page.
MAX_PAGES = 10_000


@dataclass(frozen=True, slots=True)
class FetchedManifest:
    """A manifest as upstream sent it; `digest` was computed from `content`.

    `is_verified` says that it was requested by this digest.
    """

    content: bytes
    content_type: str
    digest: Digest
    is_verified: bool


class Upstream:
    """One upstream: its registry, its mirrors, and the registry that searches it.

    A blob that arrives at less than `min_rate` bytes a second over `min_rate_window` seconds counts
    as stalled. `search_registry` is the host that answers searches, by default the registry itself.
    `hub` asks Docker Hub for facts about repositories, None if it is not to be asked.
    """

    def __init__(
        self,
        mirror_set: MirrorSet,
        metrics: Metrics,
        *,
        min_rate: int,
        min_rate_window: float,
        search_registry: RegistryClient | None = None,
        hub: HubClient | None = None,
    ) -> None:
        self.name = mirror_set.registry.name
        self.hub = hub
        self._mirror_set = mirror_set
        self._registry = mirror_set.registry
        self._metrics = metrics
        self._min_rate = min_rate
        self._min_rate_window = min_rate_window
        self._now = asyncio.get_running_loop().time
        self._search_registry = search_registry or mirror_set.registry

    @property
    def scarce_quota_reason(self) -> str:
        """How many pulls upstream still allows, as a clause; empty unless they are scarce."""
        quota = self._registry.quota
        if not quota.is_scarce:
            return ""
        return f"{self.name} allows {quota.remaining} more of {quota.limit} pulls"

    @property
    def has_mirrors(self) -> bool:
        """Whether others than the registry are asked for content."""
        return self._mirror_set.has_mirrors

    @property
    def is_up(self) -> bool:
        """Whether requests for content are sent: to the registry or at least to one mirror."""
        return self._mirror_set.is_up

    @property
    def outage_reason(self) -> str:
        """Why no requests are sent; empty while `is_up`."""
        return "" if self.is_up else self._registry.health.reason

    @property
    def pull_quota(self) -> tuple[int | None, int | None]:
        """The pulls that upstream allows per time window, and those left, as it last reported."""
        return self._registry.quota.limit, self._registry.quota.remaining

    async def resolve(self, repository: str, reference: Reference) -> Digest | None:
        """Return the digest that `reference` points to now, by HEAD.

        For a digest this proves that the repository holds it; a mirror cannot prove that. Returns
        None if upstream sends no valid digest. Raises `UnknownManifestError` and `UpstreamError`.
        """
        headers = {"Accept": ACCEPT}
        request = ApiRequest("HEAD", repository, f"manifests/{reference}", "manifest", headers)
        if isinstance(reference, Digest):
            return await self._registry.request(request, responses.read_digest)
        deadline = self._request_deadline()

        async def resolve_at(registry: RegistryClient) -> Digest | None:
            digest = await registry.request(request, responses.read_digest, deadline)
            if digest is None and registry.is_mirror:
                raise UpstreamError(f"{registry.label} sent no digest for the tag")
            return digest

        return await self._mirror_set.try_each(resolve_at)

    async def fetch_manifest(self, repository: str, reference: Reference) -> FetchedManifest:
        """Return the manifest; if `reference` is a digest, the content is verified against it.

        Raises `UnknownManifestError`, `DigestMismatchError` (after a second attempt) and
        `UpstreamError`.
        """
        headers = {"Accept": ACCEPT}
        request = ApiRequest("GET", repository, f"manifests/{reference}", "manifest", headers)
        deadline = self._request_deadline()

        async def fetch_at(registry: RegistryClient) -> FetchedManifest:
            try:
                return await self._fetch_manifest_at(registry, request, reference, deadline)
            except DigestMismatchError:
                if registry.is_mirror:
                    raise
                self._metrics.count_upstream_retry(self.name, "mismatch")
                return await self._fetch_manifest_at(
                    registry, request, reference, self._request_deadline()
                )

        return await self._mirror_set.try_each(fetch_at)

    async def probe_blob(self, repository: str, digest: Digest) -> Evidence:
        """Ask for the first byte of a blob, and return what the response states about the blob.

        Only the registry is asked: many mirrors serve a digest under any name. Redirects are followed,
        because some registries redirect every request, without looking whether the blob exists.
        Raises `UnknownBlobError`, `UpstreamError`, and `UnsatisfiableRangeError` if it is empty.
        """
        one_byte = {"Range": "bytes=0-0"}
        request = ApiRequest("GET", repository, f"blobs/{digest}", "blob", one_byte)
        return await self._registry.request(request, responses.read_evidence)

    async def fetch_blob_size(self, repository: str, digest: Digest) -> int | None:
        """Return the size of a blob, or None if upstream does not send it.

        Raises `UnknownBlobError` and `UpstreamError`.
        """
        path, deadline = f"blobs/{digest}", self._request_deadline()
        head = ApiRequest("HEAD", repository, path, "blob", follow_redirects=False)
        # If HEAD is redirected, only the redirect's target knows the size: GET one byte of it.
        get = ApiRequest("GET", repository, path, "blob", {"Range": "bytes=0-0"})

        async def fetch_at(registry: RegistryClient) -> int | None:
            status, size = await registry.request(head, responses.read_blob_size, deadline)
            if status != 200:
                _, size = await registry.request(get, responses.read_blob_size, deadline)
            return size

        return await self._mirror_set.try_each(fetch_at, digest)

    @asynccontextmanager
    async def open_blob(
        self, repository: str, digest: Digest, offset: int = 0, stop: int | None = None
    ) -> AsyncIterator[BlobBody]:
        """Open the blob at `offset`, up to `stop` (exclusive).

        If upstream ignores ranges, the body is the whole blob: see `BlobBody.offset`.
        Raises `UnknownBlobError` and `UpstreamError`.
        """
        last = "" if stop is None else stop - 1
        headers = {"Range": f"bytes={offset}-{last}"} if offset or stop else {}
        request = ApiRequest("GET", repository, f"blobs/{digest}", "blob", headers)
        async with AsyncExitStack() as stack:

            async def open_at(registry: RegistryClient) -> tuple[RegistryClient, BlobBody]:
                opened = self._open_blob_at(registry, request, digest, offset)
                return registry, await stack.enter_async_context(opened)

            registry, body = await self._mirror_set.try_each(open_at, digest)
            try:
                yield body
            except UpstreamError:
                if registry.is_mirror:
                    self._mirror_set.mark_suspect(digest, is_corrupt=False)
                raise

    def mark_suspect(self, digest: Digest) -> None:
        """Record that a blob had a wrong digest: for a while no mirror is asked for it."""
        self._mirror_set.mark_suspect(digest, is_corrupt=True)

    async def fetch_tags(self, repository: str) -> list[str]:
        """Return all tags of the repository, from all pages, in upstream's order.

        Only the registry is asked: a mirror's incomplete list looks like any other.
        """
        tags: list[str] = []
        async for content in self._fetch_pages(repository, "tags/list?n=1000", "tags"):
            tags += responses.parse_tags(content)
        return tags

    async def fetch_referrers(self, repository: str, digest: Digest) -> list[bytes]:
        """Return the pages of the referrers of `digest`, each an image index.

        Only the registry is asked, as for tags. Raises `NotFoundError` if upstream does not support
        the API (distribution-spec, "Listing Referrers": 404).
        """
        pages = self._fetch_pages(repository, f"referrers/{digest}", "referrers")
        return [content async for content in pages]

    async def search(self, terms: str, *, limit: int, page: int) -> SearchPage:
        """Return one page of the repositories that match `terms`; the first page is 1.

        Raises `NotFoundError` if upstream has no search, and `UpstreamError`.
        """
        path = f"v1/search?{urlencode({'q': terms, 'n': limit, 'page': page})}"
        content = await self._search_registry.request(
            ApiRequest("GET", "", path, "search"), responses.read_search_page
        )
        self._metrics.count_upstream_bytes(self._search_registry.name, "search", len(content))
        return search.parse_search_page(content)

    def _request_deadline(self) -> float:
        """Return the time by which a request must be answered, by mirrors and registry together."""
        return self._now() + REQUEST_TIMEOUT

    async def _fetch_manifest_at(
        self, registry: RegistryClient, request: ApiRequest, reference: Reference, deadline: float
    ) -> FetchedManifest:
        content, content_type = await registry.request(request, responses.read_manifest, deadline)
        self._metrics.count_upstream_bytes(self.name, "manifest", len(content))
        digest, is_verified = Digest.from_content(content), isinstance(reference, Digest)
        if isinstance(reference, Digest):
            digest = Digest.from_content(content, reference.algorithm)
            if digest != reference:
                self._metrics.count_digest_mismatch(self.name)
                raise DigestMismatchError(
                    f"{registry.label} sent content that does not match {reference}"
                )
        if (
            registry.is_mirror
            and not is_verified
            and (doubt := parse_manifest(content, content_type).doubt)
        ):
            raise UpstreamError(f"{registry.label} did not send a manifest: {doubt}")
        return FetchedManifest(content, content_type, digest, is_verified)

    @asynccontextmanager
    async def _open_blob_at(
        self, registry: RegistryClient, request: ApiRequest, digest: Digest, offset: int
    ) -> AsyncIterator[BlobBody]:
        async with registry.stream(request) as response:
            if response.status == 206:
                start, size = responses.parse_content_range(response)
                if start != offset:
                    raise UpstreamError(f"{registry.label} sent a different range than requested")
            else:
                start, size = 0, response.content_length
            body = BlobBody(
                response,
                registry.label,
                start,
                size,
                stall_timeout=registry.timeouts.stall,
                rate_monitor=retry.MinRateMonitor(self._min_rate, self._min_rate_window),
            )
            if start == 0 and is_gzip_encoded(response.headers):
                await body.undo_encoding(digest)
            elif registry.is_mirror:
                # A mirror that sends headers and then nothing is replaced before the stall timeout.
                await body.read_first_bytes(registry.timeouts.response)
            yield body

    async def _fetch_pages(
        self, repository: str, path: str, kind: RequestKind
    ) -> AsyncIterator[bytes]:
        total_size, seen = 0, set()
        for _ in range(MAX_PAGES):
            seen.add(path)
            content, next_query = await self._registry.request(
                ApiRequest("GET", repository, path, kind), responses.read_list_page
            )
            self._metrics.count_upstream_bytes(self.name, kind, len(content))
            total_size += len(content)
            if total_size > MAX_LIST_SIZE:
                raise UpstreamError(f"{self.name} sent a list of more than {MAX_LIST_SIZE} bytes")
            yield content
            if next_query is None:
                return
            path = f"{path.partition('?')[0]}?{next_query}"
            if path in seen or not next_query:
                raise UpstreamError(f"{self.name} sent a list whose pages do not lead to an end")
        raise UpstreamError(f"{self.name} sent a list of more than {MAX_PAGES} pages")
