"""The HTTP session of one registry: guard, proxy and TLS trust, no implicit settings."""

import ssl

from aiohttp import (
    ClientConnectorDNSError,
    ClientHandlerType,
    ClientHttpProxyError,
    ClientMiddlewareType,
    ClientProxyConnectionError,
    ClientRequest,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    TCPConnector,
    hdrs,
)
from multidict import CIMultiDict

from proxy import __version__
from proxy.config import UpstreamSettings
from proxy.errors import ConfigError
from proxy.tracing import trace_upstream_request
from proxy.upstream.network.egress import EgressGuard
from proxy.upstream.network.proxies import ProxySelector
from proxy.upstream.offline import OfflineSwitch

# Seconds for a request to a token server; all other requests set timeouts of their own.
DEFAULT_TOTAL_TIMEOUT = 8.0

# Signed URLs and tokens are longer than the default of 8190 bytes.
_MAX_HEADER_LENGTH = 32 << 10


def open_session(
    guard: EgressGuard,
    proxies: ProxySelector,
    offline: OfflineSwitch,
    *,
    tls: ssl.SSLContext,
    connect_timeout: float,
) -> ClientSession:
    """Return a session, to be closed by the caller, that connects as `guard` and `offline` allow.

    It keeps no cookies, ignores netrc (aiohttp's `trust_env` would read it along with the proxies
    of the environment), and changes neither URLs nor bodies.
    """
    return ClientSession(
        connector=TCPConnector(limit=0, ssl=tls, resolver=guard),
        middlewares=(
            offline.middleware,
            guard.middleware,
            trace_upstream_request,
            _proxy_middleware(proxies),
        ),
        timeout=ClientTimeout(total=DEFAULT_TOTAL_TIMEOUT, sock_connect=connect_timeout),
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
        requote_redirect_url=False,
        # The digest is of the bytes that upstream sends, so they must not be encoded.
        headers={"User-Agent": f"pullcache/{__version__}", "Accept-Encoding": "identity"},
        max_line_size=_MAX_HEADER_LENGTH,
        max_field_size=_MAX_HEADER_LENGTH,
    )


def create_tls_context(upstream: str, settings: UpstreamSettings) -> ssl.SSLContext:
    """Return the TLS context for the upstream of this name. Blocks; raises `ConfigError`."""
    context = ssl.create_default_context()
    if settings.ca_file:
        try:
            context.load_verify_locations(settings.ca_file)
        except OSError as error:
            raise ConfigError(
                f'upstreams."{upstream}".ca_file: {settings.ca_file} cannot be used ({error})'
            ) from error
    return context


def _proxy_middleware(proxies: ProxySelector) -> ClientMiddlewareType:
    """Return a middleware that uses the selected proxy: https by CONNECT, http by absolute URL."""

    async def send(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        proxy = proxies.select(request.url)
        if proxy is None:
            return await handler(request)
        connect_headers: CIMultiDict[str] = CIMultiDict()
        if proxy.authorization:
            headers = connect_headers if request.is_ssl() else request.headers
            headers[hdrs.PROXY_AUTHORIZATION] = proxy.authorization
        request.update_proxy(proxy.url, None, connect_headers)
        try:
            response = await handler(request)
        except ClientConnectorDNSError as error:
            # It is the proxy's own name: the proxy resolves all others.
            raise ClientProxyConnectionError(request.connection_key, error.os_error) from error
        if response.status == 407 and not request.is_ssl():
            response.close()
            raise ClientHttpProxyError(response.request_info, response.history, status=407)
        return response

    return send
