"""From a configuration to an upstream: sessions, logins, mirrors; and when its sessions are closed."""

import asyncio
import os
import ssl
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from weakref import finalize

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
    DefaultResolver,
    DummyCookieJar,
    TCPConnector,
    hdrs,
)
from multidict import CIMultiDict
from yarl import URL

from proxy import __version__
from proxy.config import Config, UpstreamSettings
from proxy.errors import ConfigError
from proxy.metrics import Metrics
from proxy.tracing import traced
from proxy.upstream.auth import Authenticator, Login, anonymous
from proxy.upstream.client import Upstream
from proxy.upstream.credentials import CredentialSource
from proxy.upstream.egress import EgressGuard
from proxy.upstream.mirrors import Routes
from proxy.upstream.offline import Offline
from proxy.upstream.proxies import Proxies
from proxy.upstream.registry_client import Exchange, Timeouts

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


class Opener:
    """Opens upstreams, whose sessions stay open for as long as anybody holds the upstream.

    A reload replaces upstreams under requests and downloads that go on with the one they began with;
    whoever lets go of it last closes it, without knowing. `close` closes the rest.
    """

    def __init__(
        self,
        metrics: Metrics,
        offline: Offline,
        group: asyncio.TaskGroup,
        clock: Callable[[], float],
    ) -> None:
        self._metrics = metrics
        self._offline = offline
        self._group = group
        self._clock = clock
        self._open: dict[AsyncExitStack, finalize[..., Upstream]] = {}
        self._unused: asyncio.Queue[AsyncExitStack] = asyncio.Queue()

    async def open(self, config: Config, name: str) -> Upstream:
        """Return the upstream called `name`. Raises `ConfigError`."""
        async with AsyncExitStack() as stack:
            upstream = await self._make(stack, config, name)
            sessions = stack.pop_all()
        loop = asyncio.get_running_loop()
        # An object may be found to be garbage in any thread.
        self._open[sessions] = finalize(
            upstream, loop.call_soon_threadsafe, self._unused.put_nowait, sessions
        )
        return upstream

    async def close_unused(self) -> None:
        """Close what is not held any more, for ever."""
        while True:
            sessions = await self._unused.get()
            del self._open[sessions]
            await sessions.aclose()

    async def close(self) -> None:
        """Close all sessions."""
        while self._open:
            sessions, end = self._open.popitem()
            end.detach()
            await sessions.aclose()

    async def _make(self, stack: AsyncExitStack, config: Config, name: str) -> Upstream:
        settings, fetch, metrics = config.upstreams[name], config.fetch, self._metrics
        tls = await asyncio.to_thread(tls_context, name, settings)
        proxies = Proxies(os.environ, settings.proxy)

        async def exchange(
            url: str,
            login: Login,
            timeouts: Timeouts,
            attempts: int,
            *,
            label: str = name,
            is_mirror: bool = False,
        ) -> Exchange:
            guard = EgressGuard(URL(url), DefaultResolver(), proxies)
            session = open_session(
                guard, proxies, self._offline, tls=tls, connect_timeout=timeouts.connect
            )
            await stack.enter_async_context(session)
            observe = partial(metrics.upstream_request, label, "token")
            return Exchange(
                label,
                url,
                session=session,
                authenticator=Authenticator(URL(url), session, self._group, login, observe),
                metrics=metrics,
                offline=self._offline,
                timeouts=timeouts,
                attempts=attempts,
                clock=self._clock,
                is_mirror=is_mirror,
            )

        timeouts = Timeouts(fetch.connect_timeout, fetch.stall_timeout)
        login = CredentialSource(name, settings, self._group).get
        registry = await exchange(settings.url, login, timeouts, fetch.attempts)
        briefly = timeouts.of_mirror(len(settings.mirrors))
        # The login is for the registry: mirrors are asked as anybody.
        mirrors = [
            await exchange(url, anonymous, briefly, 1, is_mirror=True) for url in settings.mirrors
        ]
        found_by, searched = URL(config.search_url(name)), None
        if found_by.absolute and found_by.origin() != URL(settings.url).origin():
            # It has a breaker and limits of its own, under its own name; the login is not for it.
            searched = await exchange(
                str(found_by), anonymous, timeouts, fetch.attempts, label=found_by.authority
            )
        return Upstream(
            Routes(registry, mirrors, metrics),
            metrics,
            min_rate=fetch.min_rate,
            floor_window=2 * fetch.stall_timeout,
            searched=searched,
        )


def is_unchanged(name: str, old: Config, new: Config) -> bool:
    """Tell whether the upstream called `name` can stay as it is, with its tokens, breaker and limits.

    What lies in `ca_file` may have changed though its name did not.
    """
    return (
        name in old.upstreams
        and not new.upstreams[name].ca_file
        and old.upstreams[name] == new.upstreams[name]
        and old.search_url(name) == new.search_url(name)
        and old.fetch == new.fetch
    )
