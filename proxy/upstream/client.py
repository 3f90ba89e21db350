"""One registry, asked: resolve a tag, fetch a manifest, open a blob, list tags and referrers.

Every answer costs something there, so nothing is asked twice: HEAD where a digest is all that is
wanted (free at Docker Hub), one token a repository, redirects followed at once and never remembered.
Upstream's headers are read and never passed on.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from aiohttp import ClientResponse, ClientSession, ClientTimeout, hdrs
from yarl import URL

from proxy.errors import (
    DigestMismatchError,
    InvalidDigestError,
    OfflineError,
    RateLimitedError,
    UnknownBlobError,
    UnknownError,
    UnknownManifestError,
    UnknownNameError,
    UnsatisfiableRangeError,
    UpstreamError,
    UpstreamUnauthorizedError,
    UpstreamUnavailableError,
)
from proxy.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.manifest import ACCEPT, MAX_MANIFEST_SIZE
from proxy.oci.reference import Reference
from proxy.upstream import challenge, explain, retry
from proxy.upstream.auth import Authenticator
from proxy.upstream.wire import read_bounded, translated

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 5
# A list of tags or referrers may come in pages; a list that does not end is cut (CVE-2023-2253).
MAX_PAGES = 100
MAX_LIST_SIZE = 8 << 20

# Whoever waits for an answer has it, or an error, within the 30 s that clients wait for headers.
ANSWER_TIMEOUT = 20.0

_UNKNOWN = {"blob": UnknownBlobError, "tags": UnknownNameError}

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_NEXT_LINK = re.compile(r'<([^>]*)>\s*;[^,]*\brel="?next"?')


@dataclass(frozen=True, slots=True)
class Fetched:
    """A manifest as upstream sent it. The bytes have the digest."""

    content: bytes
    content_type: str
    digest: Digest


class Transfer:
    """The bytes of a blob, from `offset` on. `size` is the whole blob's, None if upstream is mute."""

    def __init__(self, response: ClientResponse, peer: str, offset: int, size: int | None) -> None:
        self._response = response
        self._peer = peer
        self.offset = offset
        self.size = size

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield what arrives, as it arrives. Raises `UpstreamError` when the transfer breaks."""
        body = self._response.content
        while True:
            with translated(self._peer, _ignore):
                chunk = await body.readany()
            if not chunk:
                return
            yield chunk


class Upstream:
    """One registry. `url` is its root; `url/v2/` is its API."""

    def __init__(
        self,
        name: str,
        url: str,
        *,
        session: ClientSession,
        authenticator: Authenticator,
        metrics: Metrics,
        offline: bool,
        connect_timeout: float,
        stall_timeout: float,
        clock: Callable[[], float],
    ) -> None:
        self.name = name
        self._root = URL(url)
        self._session = session
        self._authenticator = authenticator
        self._metrics = metrics
        self._offline = offline
        self._answer_timeout = ClientTimeout(total=ANSWER_TIMEOUT, sock_connect=connect_timeout)
        # No limit on the whole of a transfer, only on its standing still.
        self._blob_timeout = ClientTimeout(
            total=None, sock_connect=connect_timeout, sock_read=stall_timeout
        )
        self._clock = clock

    async def resolve(self, repository: str, reference: Reference) -> Digest | None:
        """Return the digest that `reference` stands for now, by HEAD.

        None if upstream does not say, or says something that is no digest.
        Raises `UnknownManifestError` and `UpstreamError`.
        """
        headers = {"Accept": ACCEPT}
        path = f"manifests/{reference}"
        async with self._answer("HEAD", repository, path, "manifest", headers) as response:
            try:
                return Digest.parse(response.headers.get("Docker-Content-Digest", ""))
            except InvalidDigestError:
                return None

    async def fetch_manifest(self, repository: str, reference: Reference) -> Fetched:
        """Return the manifest, verified if `reference` is a digest, its own digest computed if not.

        Raises `UnknownManifestError`, `DigestMismatchError` and `UpstreamError`.
        """
        headers = {"Accept": ACCEPT}
        path = f"manifests/{reference}"
        async with self._answer("GET", repository, path, "manifest", headers) as response:
            with translated(self.name, _ignore):
                content = await read_bounded(response, MAX_MANIFEST_SIZE)
            content_type = response.headers.get(hdrs.CONTENT_TYPE, "")
        self._metrics.upstream_bytes(self.name, len(content))
        if isinstance(reference, Digest):
            digest = Digest.of(content, reference.algorithm)
            if digest != reference:
                self._metrics.digest_mismatch(self.name)
                raise DigestMismatchError(f"{self.name} sent other content for {reference}")
        else:
            digest = Digest.of(content)
        return Fetched(content, content_type, digest)

    async def has_blob(self, repository: str, digest: Digest) -> bool:
        """Tell whether upstream holds the blob under this repository, by HEAD.

        A redirect says yes and is not followed: a signed URL is good for GET alone.
        """
        path = f"blobs/{digest}"
        try:
            async with self._answer("HEAD", repository, path, "blob", {}, follow=False):
                return True
        except (UnknownError, UpstreamUnauthorizedError):
            return False

    async def blob_size(self, repository: str, digest: Digest) -> int | None:
        """Return the size of a blob, None if upstream does not say.

        Raises `UnknownBlobError` and `UpstreamError`.
        """
        path = f"blobs/{digest}"
        async with self._answer("HEAD", repository, path, "blob", {}, follow=False) as response:
            if response.status == 200:
                return response.content_length
        # Redirected: only where a GET leads is the size known; one byte of it is enough to tell.
        headers = {"Range": "bytes=0-0"}
        async with self._answer("GET", repository, path, "blob", headers) as response:
            if response.status == 206:
                return _parse_content_range(response.headers.get(hdrs.CONTENT_RANGE, ""))[1]
            return response.content_length

    @asynccontextmanager
    async def open_blob(
        self, repository: str, digest: Digest, offset: int = 0
    ) -> AsyncIterator[Transfer]:
        """Open the blob at `offset`; the transfer begins at 0 if upstream does not do ranges.

        Raises `UnknownBlobError` and `UpstreamError`.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        path = f"blobs/{digest}"
        async with self._answer("GET", repository, path, "blob", headers) as response:
            if response.status == 206:
                start, size = _parse_content_range(response.headers.get(hdrs.CONTENT_RANGE, ""))
                if start != offset:
                    raise UpstreamError(f"{self.name} sent another range than was asked for")
            else:
                start, size = 0, response.content_length
            yield Transfer(response, self.name, start, size)

    async def fetch_tags(self, repository: str) -> list[str]:
        """Return all tags of the repository in upstream's order, of all pages."""
        tags: list[str] = []
        async for content in self._pages(repository, "tags/list?n=1000", "tags"):
            tags += explain.tags(content)
        return tags

    async def fetch_referrers(self, repository: str, digest: Digest) -> list[bytes]:
        """Return the pages, each an image index, that list what refers to `digest`.

        Raises `UnknownError` where upstream does not know the API (distribution-spec,
        "Listing Referrers": 404).
        """
        pages = self._pages(repository, f"referrers/{digest}", "referrers")
        return [content async for content in pages]

    async def _pages(self, repository: str, path: str, kind: str) -> AsyncIterator[bytes]:
        for _ in range(MAX_PAGES):
            async with self._answer("GET", repository, path, kind, {}) as response:
                with translated(self.name, _ignore):
                    content = await read_bounded(response, MAX_LIST_SIZE)
                link = _NEXT_LINK.search(response.headers.get(hdrs.LINK, ""))
            self._metrics.upstream_bytes(self.name, len(content))
            yield content
            if link is None:
                return
            # Only the query is taken from the link: upstream does not choose whom we ask
            # (CVE-2026-85732).
            path = f"{path.partition('?')[0]}?{link[1].partition('?')[2]}"
        raise UpstreamError(f"{self.name} sends a list of more than {MAX_PAGES} pages")

    @asynccontextmanager
    async def _answer(
        self,
        method: str,
        repository: str,
        path: str,
        kind: str,
        headers: Mapping[str, str],
        *,
        follow: bool = True,
    ) -> AsyncIterator[ClientResponse]:
        """Ask, log in if told to, follow redirects; yield what is then a good answer."""
        if self._offline:
            raise OfflineError(
                "this cache is offline and does not have it; go online or preload it"
            )
        url = URL(f"{self._root}/v2/{repository}/{path}".replace("//v2/", "/v2/"), encoded=True)
        authorization = await self._authenticator.authorization(repository)
        response = await self._send(method, url, kind, headers, authorization)
        try:
            if response.status == 401:
                challenges = challenge.parse(response.headers.getall(hdrs.WWW_AUTHENTICATE, ()))
                renewed = await self._authenticator.answer(challenges, repository, authorization)
                if renewed:
                    response.release()
                    response = await self._send(method, url, kind, headers, renewed)
                    authorization = renewed
            for _ in range(MAX_REDIRECTS):
                if response.status not in REDIRECTS or not follow:
                    break
                target = _redirect_target(url, response.headers.get(hdrs.LOCATION, ""))
                response.release()
                # Credentials do not leave their origin: CDNs refuse them, and strangers keep them.
                if target.origin() != url.origin():
                    authorization = None
                url = target
                response = await self._send(method, url, kind, headers, authorization)
            await self._check(response, kind, follow=follow)
            yield response
        finally:
            # Closed, not released: what is left of a body is not worth the wait for it.
            response.close() if not response.content.at_eof() else response.release()

    async def _send(
        self,
        method: str,
        url: URL,
        kind: str,
        headers: Mapping[str, str],
        authorization: str | None,
    ) -> ClientResponse:
        if authorization:
            headers = {**headers, hdrs.AUTHORIZATION: authorization}
        blob = kind == "blob" and method == "GET"
        began = asyncio.get_running_loop().time()
        with translated(self.name, lambda status: self._observe(kind, status)):
            response = await self._session.request(
                method,
                url,
                headers=headers,
                allow_redirects=False,
                timeout=self._blob_timeout if blob else self._answer_timeout,
                # One read of the kernel's buffer is one step of a download.
                read_bufsize=(1 << 20) if blob else (1 << 16),
            )
        self._observe(kind, response.status)
        elapsed = asyncio.get_running_loop().time() - began
        self._metrics.upstream_first_byte(self.name, kind, elapsed)
        limit = retry.parse_ratelimit(response.headers.get("RateLimit-Limit"))
        remaining = retry.parse_ratelimit(response.headers.get("RateLimit-Remaining"))
        if limit is not None and remaining is not None:
            self._metrics.ratelimit(self.name, limit, remaining)
        return response

    def _observe(self, kind: str, status: int | Literal["error"]) -> None:
        self._metrics.upstream_request(self.name, kind, status)

    async def _check(self, response: ClientResponse, kind: str, *, follow: bool) -> None:
        """Raise what a status other than success means."""
        status = response.status
        if status in (200, 206) or (status in REDIRECTS and not follow):
            return
        reason = await explain.reason(response)
        if status in (401, 403):
            # Docker Hub says this of a repository that does not exist, to anybody.
            raise UpstreamUnauthorizedError(
                f"{self.name} shows it to nobody, or not to this cache{reason}; "
                "if it is private, configure credentials"
            )
        if status == 404:
            raise _UNKNOWN.get(kind, UnknownManifestError)(f"{self.name} does not have it{reason}")
        if status == 416:
            raise UnsatisfiableRangeError(f"{self.name} has nothing at this offset")
        if status == 429:
            wait = retry.parse_retry_after(response.headers.get(hdrs.RETRY_AFTER), self._clock())
            raise RateLimitedError(f"{self.name} limits its rate{reason}", retry_after=wait)
        if status in retry.TRANSIENT:
            raise UpstreamUnavailableError(f"{self.name} answered {status}{reason}")
        raise UpstreamError(f"{self.name} answered {status}{reason}")


def _ignore(_status: str) -> None:
    """Do nothing: the answer whose body breaks was counted when it came."""


def _redirect_target(url: URL, location: str) -> URL:
    """Return where `location` leads, byte for byte: a signed query does not survive requoting."""
    try:
        target = url.join(URL(location, encoded=True))
    except ValueError as error:
        raise UpstreamError("upstream redirects to what is no address") from error
    if not location or target.scheme not in ("http", "https") or not target.host:
        raise UpstreamError("upstream redirects to what is no http(s) address")
    if url.scheme == "https" and target.scheme == "http":
        raise UpstreamError("upstream redirects from https to http, which is refused")
    return target


def _parse_content_range(value: str) -> tuple[int, int | None]:
    match = _CONTENT_RANGE.fullmatch(value)
    if match is None:
        raise UpstreamError("upstream sent a part without saying which")
    return int(match[1]), None if match[3] == "*" else int(match[3])
