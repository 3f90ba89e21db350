"""One registry, asked: resolve a tag, fetch a manifest, open a blob, list tags and referrers.

Every answer costs something there, so nothing is asked twice: HEAD where a digest is all that is
wanted (free at Docker Hub), one token a repository, redirects followed at once and never remembered.
Upstream's headers are read and never passed on.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlencode

from aiohttp import ClientResponse, hdrs

from proxy.errors import (
    DigestMismatchError,
    InvalidDigestError,
    NotFoundError,
    UpstreamError,
    UpstreamUnauthorizedError,
)
from proxy.metrics import Metrics, RequestKind
from proxy.oci.digest import Digest
from proxy.oci.manifest import ACCEPT, MAX_MANIFEST_SIZE, parse_manifest
from proxy.oci.reference import Reference
from proxy.upstream import errors, retry, search
from proxy.upstream.body import BlobBody
from proxy.upstream.errors import read_bounded
from proxy.upstream.mirrors import MirrorSet
from proxy.upstream.registry_client import REQUEST_TIMEOUT, ApiRequest, RegistryClient
from proxy.upstream.search import SearchPage

# A list of tags or referrers may come in pages; one that does not end, or is larger than this in all,
# is refused (CVE-2023-2253).
MAX_PAGES = 100
MAX_LIST_SIZE = 8 << 20
MAX_SEARCH_SIZE = 1 << 20

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_NEXT_LINK = re.compile(r'<([^>]*)>\s*;[^,]*\brel="?next"?')


@dataclass(frozen=True, slots=True)
class FetchedManifest:
    """A manifest as upstream sent it. The bytes have the digest."""

    content: bytes
    content_type: str
    digest: Digest


class Upstream:
    """One registry. Less than `min_rate` bytes a second over `floor_window` seconds is a stall.

    `searched` is the host that knows how to search it, None if the registry does so itself.
    """

    def __init__(
        self,
        mirror_set: MirrorSet,
        metrics: Metrics,
        *,
        min_rate: int,
        min_rate_window: float,
        search_registry: RegistryClient | None = None,
    ) -> None:
        self.name = mirror_set.registry.name
        self._mirror_set = mirror_set
        self._registry = mirror_set.registry
        self._metrics = metrics
        self._min_rate = min_rate
        self._min_rate_window = min_rate_window
        self._now = asyncio.get_running_loop().time
        self._search_registry = search_registry or mirror_set.registry

    @property
    def scarce_quota_reason(self) -> str:
        """How few pulls upstream still allows, as a sentence; empty while there are enough."""
        quota = self._registry.quota
        if not quota.is_scarce:
            return ""
        return f"{self.name} allows {quota.remaining} more of {quota.limit} pulls"

    @property
    def is_up(self) -> bool:
        """Whether anybody is asked for its content."""
        return self._mirror_set.is_up

    @property
    def outage_reason(self) -> str:
        """Why upstream is left alone, empty while it is asked."""
        return "" if self.is_up else self._registry.health.reason

    @property
    def pull_quota(self) -> tuple[int | None, int | None]:
        """How many pulls upstream allows in its time window, and how many are left, as it said last."""
        return self._registry.quota.limit, self._registry.quota.remaining

    async def resolve(self, repository: str, reference: Reference) -> Digest | None:
        """Return the digest that `reference` stands for now, by HEAD.

        Of a digest this is the proof that the repository holds it, which a mirror cannot give.
        None if upstream does not say, or says something that is no digest.
        Raises `UnknownManifestError` and `UpstreamError`.
        """
        headers = {"Accept": ACCEPT}
        question = ApiRequest("HEAD", repository, f"manifests/{reference}", "manifest", headers)
        if isinstance(reference, Digest):
            return await self._registry.request(question, _read_digest)
        deadline = self._request_deadline()

        async def ask(route: RegistryClient) -> Digest | None:
            digest = await route.request(question, _read_digest, deadline)
            if digest is None and route.is_mirror:
                raise UpstreamError(f"{route.label} does not say what a tag stands for")
            return digest

        return await self._mirror_set.try_each(ask)

    async def fetch_manifest(self, repository: str, reference: Reference) -> FetchedManifest:
        """Return the manifest, verified if `reference` is a digest, its own digest computed if not.

        Raises `UnknownManifestError`, `DigestMismatchError` (twice in a row) and `UpstreamError`.
        """
        headers = {"Accept": ACCEPT}
        question = ApiRequest("GET", repository, f"manifests/{reference}", "manifest", headers)
        deadline = self._request_deadline()

        async def ask(route: RegistryClient) -> FetchedManifest:
            try:
                return await self._fetch_manifest_from(route, question, reference, deadline)
            except DigestMismatchError:
                if route.is_mirror:
                    raise
                self._metrics.count_upstream_retry(self.name, "mismatch")
                return await self._fetch_manifest_from(
                    route, question, reference, self._request_deadline()
                )

        return await self._mirror_set.try_each(ask)

    async def _fetch_manifest_from(
        self, registry: RegistryClient, request: ApiRequest, reference: Reference, deadline: float
    ) -> FetchedManifest:
        content, content_type = await registry.request(request, _read_manifest, deadline)
        self._metrics.count_upstream_bytes(self.name, "manifest", len(content))
        digest = Digest.from_content(content)
        if isinstance(reference, Digest):
            digest = Digest.from_content(content, reference.algorithm)
            if digest != reference:
                self._metrics.count_digest_mismatch(self.name)
                raise DigestMismatchError(f"{registry.label} sent other content for {reference}")
        if registry.is_mirror:
            # What is no manifest is of no use, and the next one may have it.
            parse_manifest(content, content_type)
        return FetchedManifest(content, content_type, digest)

    async def has_blob(self, repository: str, digest: Digest) -> bool:
        """Tell whether upstream holds the blob under this repository, by HEAD.

        No mirror is asked: many serve a digest under any name, and some say yes to everything.
        A redirect says yes and is not followed: a signed URL is good for GET alone.
        """
        question = ApiRequest("HEAD", repository, f"blobs/{digest}", "blob", follow_redirects=False)
        try:
            await self._registry.request(question, _read_size)
        except (NotFoundError, UpstreamUnauthorizedError):
            return False
        return True

    async def fetch_blob_size(self, repository: str, digest: Digest) -> int | None:
        """Return the size of a blob, None if upstream does not say.

        Raises `UnknownBlobError` and `UpstreamError`.
        """
        path, deadline = f"blobs/{digest}", self._request_deadline()
        head = ApiRequest("HEAD", repository, path, "blob", follow_redirects=False)
        # Redirected: only where a GET leads is the size known; one byte of it is enough to tell.
        get = ApiRequest("GET", repository, path, "blob", {"Range": "bytes=0-0"})

        async def ask(route: RegistryClient) -> int | None:
            status, size = await route.request(head, _read_size, deadline)
            if status != 200:
                _, size = await route.request(get, _read_size, deadline)
            return size

        return await self._mirror_set.try_each(ask, digest)

    @asynccontextmanager
    async def open_blob(
        self, repository: str, digest: Digest, offset: int = 0, stop: int | None = None
    ) -> AsyncIterator[BlobBody]:
        """Open the blob at `offset`, for the bytes before `stop`; all of it without ranges upstream.

        Raises `UnknownBlobError` and `UpstreamError`.
        """
        last = "" if stop is None else stop - 1
        headers = {"Range": f"bytes={offset}-{last}"} if offset or stop else {}
        question = ApiRequest("GET", repository, f"blobs/{digest}", "blob", headers)
        async with AsyncExitStack() as stack:

            async def enter(route: RegistryClient) -> tuple[RegistryClient, BlobBody]:
                opened = self._open_blob_from(route, question, offset)
                return route, await stack.enter_async_context(opened)

            route, transfer = await self._mirror_set.try_each(enter, digest)
            try:
                yield transfer
            except UpstreamError:
                if route.is_mirror:
                    self._mirror_set.mark_suspect(digest, is_corrupt=False)
                raise

    @asynccontextmanager
    async def _open_blob_from(
        self, registry: RegistryClient, request: ApiRequest, offset: int
    ) -> AsyncIterator[BlobBody]:
        async with registry.stream(request) as response:
            if response.status == 206:
                start, size = _parse_content_range(response.headers.get(hdrs.CONTENT_RANGE, ""))
                if start != offset:
                    raise UpstreamError(f"{registry.label} sent another range than was asked for")
            else:
                start, size = 0, response.content_length
            floor = retry.MinRateMonitor(self._min_rate, self._min_rate_window)
            transfer = BlobBody(
                response,
                registry.label,
                start,
                size,
                stall_timeout=registry.timeouts.stall,
                rate_monitor=floor,
            )
            if registry.is_mirror:
                await transfer.read_first_bytes(registry.timeouts.response)
            yield transfer

    def mark_suspect(self, digest: Digest) -> None:
        """Note that a blob came with another digest: its next transfers come from no mirror."""
        self._mirror_set.mark_suspect(digest, is_corrupt=True)

    async def fetch_tags(self, repository: str) -> list[str]:
        """Return all tags of the repository in upstream's order, of all pages.

        Lists come from no mirror: one that lacks something looks like any other.
        """
        tags: list[str] = []
        async for content in self._fetch_pages(repository, "tags/list?n=1000", "tags"):
            tags += errors.parse_tags(content)
        return tags

    async def fetch_referrers(self, repository: str, digest: Digest) -> list[bytes]:
        """Return the pages, each an image index, that list what refers to `digest`.

        Raises `UnknownError` where upstream does not know the API (distribution-spec,
        "Listing Referrers": 404).
        """
        pages = self._fetch_pages(repository, f"referrers/{digest}", "referrers")
        return [content async for content in pages]

    def _request_deadline(self) -> float:
        """Return when a question must be answered, whoever is asked."""
        return self._now() + REQUEST_TIMEOUT

    async def search(self, terms: str, *, limit: int, page: int) -> SearchPage:
        """Return a page of `limit` repositories that upstream finds by the words, the first one is 1.

        Raises `UnknownError` where upstream has no search, and `UpstreamError`.
        """
        path = f"v1/search?{urlencode({'q': terms, 'n': limit, 'page': page})}"
        content = await self._search_registry.request(
            ApiRequest("GET", "", path, "search"), _read_search_page
        )
        self._metrics.count_upstream_bytes(self._search_registry.name, "search", len(content))
        return search.parse_search_page(content)

    async def _fetch_pages(
        self, repository: str, path: str, kind: RequestKind
    ) -> AsyncIterator[bytes]:
        size = 0
        for _ in range(MAX_PAGES):
            question = ApiRequest("GET", repository, path, kind)
            content, link = await self._registry.request(question, _read_list_page)
            self._metrics.count_upstream_bytes(self.name, kind, len(content))
            size += len(content)
            if size > MAX_LIST_SIZE:
                raise UpstreamError(f"{self.name} sends a list of more than {MAX_LIST_SIZE} bytes")
            yield content
            found = _NEXT_LINK.search(link)
            if found is None:
                return
            # Only the query is taken from the link: upstream does not choose whom we ask
            # (CVE-2026-85732).
            path = f"{path.partition('?')[0]}?{found[1].partition('?')[2]}"
        raise UpstreamError(f"{self.name} sends a list of more than {MAX_PAGES} pages")


async def _read_digest(response: ClientResponse) -> Digest | None:
    try:
        return Digest.parse(response.headers.get("Docker-Content-Digest", ""))
    except InvalidDigestError:
        return None


async def _read_manifest(response: ClientResponse) -> tuple[bytes, str]:
    content = await read_bounded(response, MAX_MANIFEST_SIZE)
    return content, response.headers.get(hdrs.CONTENT_TYPE, "")


async def _read_size(response: ClientResponse) -> tuple[int, int | None]:
    if response.status == 206:
        return 206, _parse_content_range(response.headers.get(hdrs.CONTENT_RANGE, ""))[1]
    return response.status, response.content_length


async def _read_list_page(response: ClientResponse) -> tuple[bytes, str]:
    content = await read_bounded(response, MAX_LIST_SIZE)
    return content, response.headers.get(hdrs.LINK, "")


async def _read_search_page(response: ClientResponse) -> bytes:
    return await read_bounded(response, MAX_SEARCH_SIZE)


def _parse_content_range(value: str) -> tuple[int, int | None]:
    match = _CONTENT_RANGE.fullmatch(value)
    if match is None:
        raise UpstreamError("upstream sent a part without saying which")
    return int(match[1]), None if match[3] == "*" else int(match[3])
