"""Authentication at an upstream: Basic, or a Bearer token from the token server that it names.

Sources: distribution's "Token Authentication Specification", RFC 6750, RFC 7617. Token servers
issue tokens for anything, even for repositories that do not exist, so a token does not prove
access.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache, partial
from ipaddress import ip_address
from typing import Literal

from aiohttp import ClientResponse, ClientSession
from publicsuffixlist import PublicSuffixList
from yarl import URL

from proxy.concurrency import SingleFlight
from proxy.errors import RateLimitedError, UpstreamError, UpstreamUnavailableError
from proxy.lru import TTLCache
from proxy.oci.json_object import decode_object
from proxy.upstream import errors
from proxy.upstream.auth.challenge import Challenge
from proxy.upstream.auth.credentials import Credentials
from proxy.upstream.errors import map_errors
from proxy.upstream.network import retry
from proxy.upstream.network.redirects import MAX_REDIRECTS, REDIRECT_STATUSES, redirect_target
from proxy.upstream.responses import read_bounded

MAX_TOKEN_RESPONSE = 1 << 20
# Characters of a token; no server accepts a header of that length.
MAX_TOKEN_LENGTH = 64 << 10
# Tokens that are kept per upstream, one per repository, and their characters in all.
MAX_TOKENS = 10_000
MAX_TOKENS_SIZE = 32 << 20

# Bounds of a token's lifetime in seconds. The minimum is the specification's default, used if
# `expires_in` is missing or smaller.
MIN_TOKEN_LIFETIME = 60.0
MAX_TOKEN_LIFETIME = 3600.0
# A token is not used in its last seconds, so that it does not expire on its way to upstream.
EXPIRY_MARGIN = 10.0

CredentialsGetter = Callable[[], Awaitable[Credentials | None]]

# RFC 6750 section 2.1 allows fewer characters, but registries issue others, and clients send them.
# Control characters could inject headers; U+FFFD replaces what is not UTF-8.
_TOKEN = re.compile(rf"[^\x00-\x1f\x7f\ufffd]{{1,{MAX_TOKEN_LENGTH}}}")


@dataclass(frozen=True, slots=True)
class _AccessToken:
    authorization: str
    expires_at: float


async def no_credentials() -> None:
    """Return None: requests are anonymous."""


class Authenticator:
    """Answers the challenges of one upstream, and keeps its tokens, one per repository.

    It belongs to one upstream and one user, so a token is never used for another. `record_status`
    is called with the status of each response of the token server, or "error". If `is_redirected`,
    it belongs to one repository of a registry that another one has redirected to.
    """

    def __init__(
        self,
        registry_url: URL,
        session: ClientSession,
        group: asyncio.TaskGroup,
        get_credentials: CredentialsGetter,
        record_status: Callable[[int | Literal["error"]], None],
        *,
        is_redirected: bool = False,
    ) -> None:
        self._registry_url = registry_url
        self._session = session
        self._get_credentials = get_credentials
        self._record_status = record_status
        self._group = group
        self._is_redirected = is_redirected
        self._challenge: Challenge | None = None
        self._now = asyncio.get_running_loop().time
        self._tokens: TTLCache[str, _AccessToken] = TTLCache(
            MAX_TOKENS,
            self._now,
            max_size=MAX_TOKENS_SIZE,
            size_of=lambda token: len(token.authorization),
        )
        self._token_fetches: SingleFlight[str, _AccessToken] = SingleFlight(group)

    def create_anonymous(self, registry_url: URL) -> "Authenticator":
        """Return an authenticator for one repository of another registry, without credentials."""
        return Authenticator(
            registry_url,
            self._session,
            self._group,
            no_credentials,
            self._record_status,
            is_redirected=True,
        )

    async def get_authorization(self, repository: str) -> str | None:
        """Return the `Authorization` value for a pull, or None if upstream has never challenged us.

        Raises `UpstreamError` if no token can be obtained.
        """
        challenge = self._challenge
        if challenge is None:
            return None
        if challenge.scheme == "basic":
            credentials = await self._get_credentials()
            return credentials.basic_authorization() if credentials else None
        token = self._get_token(repository)
        if token is None or token.expires_at <= self._now():
            try:
                work = partial(self._fetch_token, challenge, repository)
                token = await self._token_fetches.run(repository, work)
            except UpstreamError:
                # The next request is sent without a token; its challenge names the token server
                # anew.
                self._challenge = None
                raise
        return token.authorization

    async def handle_challenges(
        self, challenges: list[Challenge], repository: str, rejected: str | None
    ) -> str | None:
        """Return an `Authorization` value to try instead of `rejected`, or None.

        Raises `UpstreamError` if no token can be obtained.
        """
        supported = [item for item in challenges if item.scheme in ("bearer", "basic")]
        if not supported:
            return None
        # Bearer is preferred: it does not send the password to the registry.
        self._challenge = min(supported, key=lambda item: item.scheme != "bearer")
        token = self._get_token(repository)
        if token is not None and token.authorization == rejected:
            self._tokens.discard(repository)
        renewed = await self.get_authorization(repository)
        return renewed if renewed != rejected else None

    def _get_token(self, repository: str) -> _AccessToken | None:
        kept = self._tokens.get_with_age(repository)
        return kept and kept[1]

    async def _fetch_token(self, challenge: Challenge, repository: str) -> _AccessToken:
        realm = _parse_realm(challenge)
        if self._registry_url.scheme == "https" and realm.scheme == "http":
            raise UpstreamError("upstream's token server does not use https, which is not allowed")
        # Requests without a repository are searches; docker requests this scope for them.
        scope = f"repository:{repository}:pull" if repository else "registry:catalog:search"
        if self._is_redirected:
            # The repository has another name there.
            scope = challenge.parameters.get("scope", scope)
        query = {"scope": scope}
        if service := challenge.parameters.get("service"):
            query["service"] = service
        credentials = await self._get_credentials()
        url: URL | None = realm.update_query(query)
        content = b""
        for _ in range(MAX_REDIRECTS + 1):
            if url is None:
                break
            content, url = await self._request_token(url, credentials)
        token = _parse_token(content, realm, self._now())
        self._tokens.set(repository, token)
        return token

    async def _request_token(
        self, url: URL, credentials: Credentials | None
    ) -> tuple[bytes, URL | None]:
        """Return the response of the token server, and where it redirects to, if it does."""
        headers = {}
        if credentials and is_trusted_realm(self._registry_url, url):
            headers["Authorization"] = credentials.basic_authorization()
        with map_errors(f"the token server {url.host}", self._record_status):
            async with self._session.get(url, headers=headers, allow_redirects=False) as response:
                self._record_status(response.status)
                if response.status in REDIRECT_STATUSES:
                    return b"", redirect_target(url, response.headers.get("Location", ""))
                if response.status != 200:
                    raise await _token_server_error(url, response, sent_password=bool(headers))
                return await read_bounded(response, MAX_TOKEN_RESPONSE), None


@cache
def _public_suffix_list() -> PublicSuffixList:
    return PublicSuffixList()


def is_trusted_realm(registry_url: URL, realm: URL) -> bool:
    """Tell whether the registry's credentials may be sent to the token server (CVE-2026-33540).

    It must have the same host or the same registrable domain, and use https unless the registry
    itself does not.
    """
    if realm.scheme != "https" and registry_url.scheme == "https":
        return False
    if realm.host == registry_url.host:
        return True
    if _is_ip_address(registry_url.host) or _is_ip_address(realm.host):
        return False
    site = _public_suffix_list().privatesuffix(registry_url.host or "")
    return site is not None and site == _public_suffix_list().privatesuffix(realm.host or "")


def _is_ip_address(host: str | None) -> bool:
    try:
        ip_address(host or "")
    except ValueError:
        return False
    return True


def _parse_realm(challenge: Challenge) -> URL:
    try:
        realm = URL(challenge.parameters.get("realm", ""))
    except ValueError as error:
        raise UpstreamError("upstream's token server (realm) is not a valid URL") from error
    if realm.scheme not in ("http", "https") or not realm.host or realm.user is not None:
        raise UpstreamError("upstream's token server (realm) is not an http(s) URL")
    return realm


async def _token_server_error(
    realm: URL, response: ClientResponse, *, sent_password: bool
) -> UpstreamError:
    status, label = response.status, f"the token server {realm.host}"
    if status in (401, 403):
        reason = (await errors.read_error(response)).reason
        if sent_password and status == 401:
            return errors.invalid_credentials_error(label, reason)
        # ghcr.io refuses the token where other registries issue one without any access.
        return errors.access_denied_error(label, reason)
    message = f"{label} responded with status {status}"
    if status == 429:
        return RateLimitedError(message)
    if status in retry.TRANSIENT_STATUSES:
        return UpstreamUnavailableError(message)
    return UpstreamError(message)


def _parse_token(content: bytes, realm: URL, now: float) -> _AccessToken:
    try:
        response = decode_object(content)
    except ValueError as error:
        raise UpstreamError(f"the token server {realm.host} did not send a token") from error
    token = response.get("token") or response.get("access_token")
    if not isinstance(token, str) or _TOKEN.fullmatch(token) is None:
        raise UpstreamError(f"the token server {realm.host} sent an invalid token")
    seconds = response.get("expires_in")
    lifetime = float(seconds) if isinstance(seconds, int | float) else MIN_TOKEN_LIFETIME
    lifetime = min(max(lifetime, MIN_TOKEN_LIFETIME), MAX_TOKEN_LIFETIME)
    return _AccessToken(f"Bearer {token}", now + lifetime - EXPIRY_MARGIN)
