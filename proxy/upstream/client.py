"""The operations on one upstream: resolve a tag, fetch a manifest, open a blob, list, search.

It sends few requests: HEAD where only a digest is needed (free at Docker Hub), and one token
request per repository. Redirects are followed but never remembered. Upstream's headers are never
passed on.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeVar
from urllib.parse import urlencode

from proxy.errors import (
    DigestMismatchError,
    NoReferrersApiError,
    NotFoundError,
    OfflineError,
    ProxyError,
    UnknownManifestError,
    UnsatisfiableRangeError,
    UpstreamDownError,
    UpstreamError,
    UpstreamForbiddenError,
    UpstreamRefusedError,
    UpstreamTimeoutError,
    UpstreamUnauthorizedError,
    UpstreamUnavailableError,
    UpstreamUnreachableError,
)
from proxy.log import get_logger
from proxy.metrics import Metrics, RequestKind
from proxy.oci.digest import Digest
from proxy.oci.manifest import ACCEPT, parse_manifest
from proxy.oci.reference import Reference, Tag
from proxy.oci.referrers import EncodedReferrers
from proxy.oci.tags import EncodedTags
from proxy.parsing import DocumentParser
from proxy.traffic import purpose
from proxy.upstream import responses, search
from proxy.upstream.body import BlobBody
from proxy.upstream.encoding import is_gzip_encoded
from proxy.upstream.features import Feature, MissingFeature
from proxy.upstream.hub.client import HubClient
from proxy.upstream.mirrors import MirrorSet
from proxy.upstream.network import retry
from proxy.upstream.registry_client import REQUEST_TIMEOUT, ApiRequest, RegistryClient
from proxy.upstream.registry_report import RegistryReport, describe_registry
from proxy.upstream.responses import MAX_LIST_SIZE, Evidence, ListPage
from proxy.upstream.search import SearchPage

# A list of tags or referrers with more pages, or larger in all than `MAX_LIST_SIZE`, is an error
# (CVE-2023-2253). Quay has 100 tags in a page.
MAX_PAGES = 10_000

# Attempts of a HEAD, if it fails in a way that may be temporary, before a GET is tried.
HEAD_ATTEMPTS = 2
_FIRST_BYTE = {"Range": "bytes=0-0"}

T = TypeVar("T")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FetchedManifest:
    """A manifest as upstream sent it; `digest` was computed from `content`.

    `is_verified` says that it was requested by this digest.
    """

    content: bytes
    content_type: str
    digest: Digest
    is_verified: bool


@dataclass(frozen=True, slots=True)
class ResolvedReference:
    """The digest that a reference points to, and the manifest if it took a GET to learn that.

    `digest` is None if only a GET could tell, which would spend one of the last pulls.
    """

    digest: Digest | None
    manifest: FetchedManifest | None = None


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
        parser: DocumentParser,
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
        self._parser = parser
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

    def is_rate_limited(self, repository: str) -> bool:
        """Tell whether the registry allows no pulls of the repository now."""
        return self._registry.is_rate_limited(repository)

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
    def retry_at(self) -> float | None:
        """When a request is sent again, in Unix time; None while `is_up`."""
        return None if self.is_up else self._registry.health.retry_at

    @property
    def pulls_renewed_at(self) -> float | None:
        """When all pulls are allowed again, in Unix time; None if that is not known."""
        return self._registry.pulls_renewed_at

    @property
    def credentials_problem(self) -> str:
        """How the registry rejected the configured credentials; empty once a request succeeded."""
        return self._registry.credentials_problem

    @property
    def pull_quota(self) -> tuple[int | None, int | None]:
        """The pulls that upstream allows per time window, and those left, as it last reported."""
        return self._registry.quota.limit, self._registry.quota.remaining

    @property
    def reports(self) -> list[RegistryReport]:
        """The state of the registry, then that of its mirrors."""
        return [describe_registry(client) for client in self._mirror_set.clients]

    @property
    def missing_features(self) -> list[MissingFeature]:
        """What the registry was recently found unable to do."""
        return self._registry.features.missing()

    async def resolve(self, repository: str, reference: Reference) -> ResolvedReference:
        """Return the digest that `reference` points to now, by HEAD or, if that fails, by GET.

        While pulls are scarce, only HEAD is used, which costs none. For a digest this proves that
        the repository holds it; a mirror cannot prove that. Raises `UnknownManifestError` and `UpstreamError`.
        """
        deadline = self._request_deadline()

        async def resolve_at(registry: RegistryClient) -> ResolvedReference:
            return await self._resolve_at(registry, repository, reference, deadline)

        if isinstance(reference, Digest):
            return await resolve_at(self._registry)
        return await self._mirror_set.try_each(resolve_at)

    async def probe_head(self, repository: str, digest: Digest) -> None:
        """Find out whether HEAD works, by a manifest that the registry has, unless that is known."""
        features = self._registry.features
        if not (
            features.has("manifest_head", repository) or features.lacks("manifest_head", repository)
        ):
            await self.resolve(repository, digest)

    async def find_tag(self, repository: str, tag: Tag) -> ResolvedReference | None:
        """Return what a tag points to that the registry probably does not have; None without it.

        Where HEAD has worked before, its 404 is believed, so that no pull is spent. Raises
        `UpstreamError` if upstream says neither yes nor no.
        """
        registry, deadline = self._registry, self._request_deadline()
        try:
            if not registry.features.has("manifest_head", repository):
                return await self._resolve_at(registry, repository, tag, deadline)
            request = _manifest_request("HEAD", repository, tag)
            return ResolvedReference(
                await registry.request(request, responses.read_digest, deadline)
            )
        except (NotFoundError, UpstreamUnauthorizedError, UpstreamRefusedError):
            return None

    def record_unreliable_head(self, repository: str) -> None:
        """Record that HEAD named a manifest for a tag that upstream does not have."""
        self._record_missing(self._registry, "manifest_head", repository)

    async def fetch_manifest(self, repository: str, reference: Reference) -> FetchedManifest:
        """Return the manifest; if `reference` is a digest, the content is verified against it.

        Raises `UnknownManifestError`, `DigestMismatchError` (after a second attempt) and
        `UpstreamError`.
        """
        request = _manifest_request("GET", repository, reference)
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
        deadline = self._request_deadline()
        # If HEAD is redirected, only the redirect's target knows the size: GET one byte of it.
        get = ApiRequest("GET", repository, f"blobs/{digest}", "blob", _FIRST_BYTE)

        async def fetch_at(registry: RegistryClient) -> int | None:
            status, size = await self._probe_blob(registry, repository, digest, deadline)
            # Some registries send a HEAD's response without the body's length.
            if status not in (200, 206) or not size:
                _, size = await _request_first_byte(registry, get, deadline)
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

    async def fetch_tags(self, repository: str) -> EncodedTags:
        """Return all tags of the repository, from all pages.

        Only the registry is asked: a mirror's incomplete list looks like any other.
        """
        pages = self._fetch_pages(repository, "tags/list?n=1000", "tags")
        contents = [page.content async for page in pages]
        size = sum(map(len, contents))
        return await self._parser.run(self.name, size, responses.parse_tags, contents)

    async def fetch_referrers(self, repository: str, digest: Digest) -> EncodedReferrers:
        """Return the descriptors of the referrers of `digest`, from all pages.

        Only the registry is asked, as for tags. Raises `UnknownManifestError` if upstream refuses
        the list or sends anything but an index: clients then go on to the fallback tag. Where the
        referrers API as a whole is missing, it is not asked again for a while.
        """
        features = self._registry.features
        if features.lacks("referrers", repository):
            raise NoReferrersApiError(f"{self.name} has no referrers API for {repository}")
        referrers = EncodedReferrers()
        has_page = False
        try:
            async for page in self._fetch_pages(repository, f"referrers/{digest}", "referrers"):
                found = await self._parser.run(
                    self.name, len(page.content), responses.parse_referrers, page
                )
                if found is None:
                    raise NoReferrersApiError(f"{self.name} sent no index of referrers")
                referrers += found
                has_page = True
        except UnknownManifestError as error:
            if has_page:
                raise UpstreamError(
                    f"{self.name} broke off a list of referrers: {error}"
                ) from error
            if isinstance(error, NoReferrersApiError):
                self._record_missing(self._registry, "referrers", repository, error)
            raise
        features.record_present("referrers", repository)
        return referrers

    async def search(self, terms: str, *, limit: int, page: int) -> SearchPage:
        """Return one page of the repositories that match `terms`; the first page is 1.

        Raises `NotFoundError` if upstream has no search, and `UpstreamError`.
        """
        path = f"v1/search?{urlencode({'q': terms, 'n': limit, 'page': page})}"
        content = await self._search_registry.request(
            ApiRequest("GET", "", path, "search"), responses.read_search_page
        )
        self._metrics.count_upstream_bytes(self._search_registry.name, "search", len(content))
        return await self._parser.run(self.name, len(content), search.parse_search_page, content)

    async def check(self) -> None:
        """Request the registry's API version, with the configured login.

        Raises `NotFoundError` and `UpstreamError`.
        """
        await self._registry.request(
            ApiRequest("GET", "", "v2/", "ping"), responses.read_digest, max_attempts=1
        )

    def _request_deadline(self) -> float:
        """Return the time by which a request must be answered, by mirrors and registry together."""
        return self._now() + REQUEST_TIMEOUT

    async def _resolve_at(
        self, registry: RegistryClient, repository: str, reference: Reference, deadline: float
    ) -> ResolvedReference:
        async def head() -> ResolvedReference | None:
            request = _manifest_request("HEAD", repository, reference)
            digest = await registry.request(
                request, responses.read_digest, deadline, max_attempts=HEAD_ATTEMPTS
            )
            is_scarce = registry.quota.is_scarce
            return ResolvedReference(digest) if digest or is_scarce else None

        async def get() -> ResolvedReference:
            request = _manifest_request("GET", repository, reference)
            manifest = await self._fetch_manifest_at(registry, request, reference, deadline)
            return ResolvedReference(manifest.digest, manifest)

        if registry.quota.is_scarce and (resolved := await head()):
            return resolved
        return await self._head_or_get(registry, "manifest_head", repository, head, get)

    async def _probe_blob(
        self, registry: RegistryClient, repository: str, digest: Digest, deadline: float
    ) -> tuple[int, int | None]:
        """Return status and size of a blob's response, by HEAD or, if that fails, by GET."""
        request = ApiRequest("HEAD", repository, f"blobs/{digest}", "blob", follow_redirects=False)

        async def head() -> tuple[int, int | None]:
            return await registry.request(
                request, responses.read_blob_size, deadline, max_attempts=HEAD_ATTEMPTS
            )

        async def get() -> tuple[int, int | None]:
            get_request = replace(request, method="GET", headers=_FIRST_BYTE)
            return await _request_first_byte(registry, get_request, deadline)

        return await self._head_or_get(registry, "blob_head", repository, head, get)

    async def _head_or_get(
        self,
        registry: RegistryClient,
        feature: Feature,
        repository: str,
        head: Callable[[], Awaitable[T | None]],
        get: Callable[[], Awaitable[T]],
    ) -> T:
        """Return what HEAD tells or, if it fails or tells nothing, what GET tells.

        Where GET knows what HEAD does not, HEAD is left out for a while.
        """
        refusal: ProxyError | None = None
        if not registry.features.lacks(feature, repository):
            try:
                if (told := await head()) is not None:
                    registry.features.record_present(feature, repository)
                    return told
            except ProxyError as error:
                if not _is_refusal(error):
                    raise
                refusal = error
        try:
            told = await get()
        except UpstreamDownError as error:
            raise refusal or error from error
        self._record_missing(registry, feature, repository, refusal)
        return told

    def _record_missing(
        self,
        registry: RegistryClient,
        feature: Feature,
        repository: str,
        refusal: ProxyError | None = None,
    ) -> None:
        """Remember what the registry cannot do; shortly if the `refusal` may be temporary."""
        is_certain = not isinstance(refusal, UpstreamUnavailableError)
        if registry.features.record_missing(feature, repository, is_certain=is_certain):
            reason = str(refusal) if refusal else ""
            log.info(
                "feature_missing",
                upstream=registry.label,
                repository=repository,
                feature=feature,
                reason=reason,
            )

    async def _fetch_manifest_at(
        self, registry: RegistryClient, request: ApiRequest, reference: Reference, deadline: float
    ) -> FetchedManifest:
        content, content_type = await registry.request(request, responses.read_manifest, deadline)
        self._metrics.count_upstream_bytes(
            self.name, "manifest", len(content), purpose.get(), request.repository
        )
        digest, is_verified = Digest.from_content(content), isinstance(reference, Digest)
        if isinstance(reference, Digest):
            digest = Digest.from_content(content, reference.algorithm)
            if digest != reference:
                self._metrics.count_digest_mismatch(self.name)
                raise DigestMismatchError(
                    f"{registry.label} sent content that does not match {reference}"
                )
        if registry.is_mirror and not is_verified:
            manifest = await self._parser.run(
                registry.label, len(content), parse_manifest, content, content_type
            )
            if manifest.doubt:
                raise UpstreamError(f"{registry.label} did not send a manifest: {manifest.doubt}")
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
            self._record_ranges(registry, request, response.status, size)
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

    def _record_ranges(
        self, registry: RegistryClient, request: ApiRequest, status: int, size: int | None
    ) -> None:
        if status == 206:
            registry.features.record_present("ranges", request.repository)
        elif "Range" in request.headers and size != 0:
            self._record_missing(registry, "ranges", request.repository)

    async def _fetch_pages(
        self, repository: str, path: str, kind: RequestKind
    ) -> AsyncIterator[ListPage]:
        total_size, seen = 0, set()
        for _ in range(MAX_PAGES):
            seen.add(path)
            page = await self._registry.request(
                ApiRequest("GET", repository, path, kind), responses.read_list_page
            )
            size = len(page.content)
            self._metrics.count_upstream_bytes(self.name, kind, size, purpose.get())
            total_size += size
            if total_size > MAX_LIST_SIZE:
                raise UpstreamError(f"{self.name} sent a list of more than {MAX_LIST_SIZE} bytes")
            yield page
            if page.next_query is None:
                return
            path = f"{path.partition('?')[0]}?{page.next_query}"
            if path in seen or not page.next_query:
                raise UpstreamError(f"{self.name} sent a list whose pages do not lead to an end")
        raise UpstreamError(f"{self.name} sent a list of more than {MAX_PAGES} pages")


def _manifest_request(
    method: Literal["GET", "HEAD"], repository: str, reference: Reference
) -> ApiRequest:
    headers = {"Accept": ACCEPT}
    return ApiRequest(method, repository, f"manifests/{reference}", "manifest", headers)


async def _request_first_byte(
    registry: RegistryClient, request: ApiRequest, deadline: float
) -> tuple[int, int | None]:
    """Return status and size of a blob's response to a GET of its first byte."""
    try:
        return await registry.request(request, responses.read_blob_size, deadline)
    except UnsatisfiableRangeError:
        return 206, 0  # only an empty blob has no first byte


def _is_refusal(error: ProxyError) -> bool:
    """Tell whether a failed HEAD may be a matter of the method."""
    if isinstance(error, UpstreamUnavailableError):
        others = (OfflineError, UpstreamDownError, UpstreamTimeoutError, UpstreamUnreachableError)
        return not isinstance(error, others)
    return isinstance(error, (NotFoundError, UpstreamForbiddenError, UpstreamRefusedError))
