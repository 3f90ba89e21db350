"""How one upstream is connected to: the session that everything it is asked goes through."""

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
from proxy.tracing import traced
from proxy.upstream.egress import EgressGuard
from proxy.upstream.offline import Offline
from proxy.upstream.proxies import Proxies

# A token is asked for within this time, in seconds; what else is asked says its own.
TOTAL_TIMEOUT = 8.0


def open_session(
    guard: EgressGuard,
    proxies: Proxies,
    offline: Offline,
    *,
    tls: ssl.SSLContext,
    connect_timeout: float,
) -> ClientSession:
    """Return a session whose connections all pass `guard`, and none while `offline`. The caller closes it.

    It keeps no cookies, reads no netrc (which aiohttp's `trust_env` would, with the proxies of the
    environment), and leaves URLs and bodies as they are.
    """
    return ClientSession(
        connector=TCPConnector(limit=0, ssl=tls, resolver=guard),
        middlewares=(offline.middleware, guard.middleware, traced, _through(proxies)),
        timeout=ClientTimeout(total=TOTAL_TIMEOUT, sock_connect=connect_timeout),
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
        requote_redirect_url=False,
        # What upstream sends is what the digest is of.
        headers={"User-Agent": f"pullcache/{__version__}", "Accept-Encoding": "identity"},
        # Signed URLs and tokens are long.
        max_line_size=32 << 10,
        max_field_size=32 << 10,
    )


def _through(proxies: Proxies) -> ClientMiddlewareType:
    """Return what sends each request through its proxy: https by CONNECT, http by absolute URL."""

    async def send(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        proxy = proxies.of(request.url)
        if proxy is None:
            return await handler(request)
        tunnel: CIMultiDict[str] = CIMultiDict()
        if proxy.authorization:
            headers = tunnel if request.is_ssl() else request.headers
            headers[hdrs.PROXY_AUTHORIZATION] = proxy.authorization
        request.update_proxy(proxy.url, None, tunnel)
        try:
            response = await handler(request)
        except ClientConnectorDNSError as error:
            # Behind a proxy no other name is looked up.
            raise ClientProxyConnectionError(request.connection_key, error.os_error) from error
        if response.status == 407 and not request.is_ssl():
            response.close()
            raise ClientHttpProxyError(response.request_info, response.history, status=407)
        return response

    return send


def tls_context(name: str, settings: UpstreamSettings) -> ssl.SSLContext:
    """Return what the upstream called `name` is trusted by, or raise `ConfigError`."""
    context = ssl.create_default_context()
    if settings.ca_file:
        try:
            context.load_verify_locations(settings.ca_file)
        except OSError as error:
            raise ConfigError(
                f'upstreams."{name}".ca_file: {settings.ca_file} cannot be used ({error})'
            ) from error
    return context
