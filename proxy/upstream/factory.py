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
from proxy.tracing import trace_upstream_request
from proxy.upstream.auth import Authenticator, CredentialsGetter, no_credentials
from proxy.upstream.client import Upstream
from proxy.upstream.credentials import CredentialSource
from proxy.upstream.egress import EgressGuard
from proxy.upstream.mirrors import MirrorSet
from proxy.upstream.offline import OfflineSwitch
from proxy.upstream.proxies import ProxySelector
from proxy.upstream.registry_client import RegistryClient, RegistryTimeouts

# A token is asked for within this time, in seconds; what else is asked says its own.
DEFAULT_TOTAL_TIMEOUT = 8.0


def open_session(
    guard: EgressGuard,
    proxies: ProxySelector,
    offline: OfflineSwitch,
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
        # What upstream sends is what the digest is of.
        headers={"User-Agent": f"pullcache/{__version__}", "Accept-Encoding": "identity"},
        # Signed URLs and tokens are long.
        max_line_size=32 << 10,
        max_field_size=32 << 10,
    )


def _proxy_middleware(proxies: ProxySelector) -> ClientMiddlewareType:
    """Return what sends each request through its proxy: https by CONNECT, http by absolute URL."""

    async def send(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        proxy = proxies.select(request.url)
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


def create_tls_context(upstream: str, settings: UpstreamSettings) -> ssl.SSLContext:
    """Return what the upstream called `name` is trusted by, or raise `ConfigError`."""
    context = ssl.create_default_context()
    if settings.ca_file:
        try:
            context.load_verify_locations(settings.ca_file)
        except OSError as error:
            raise ConfigError(
                f'upstreams."{upstream}".ca_file: {settings.ca_file} cannot be used ({error})'
            ) from error
    return context


class UpstreamFactory:
    """Opens upstreams, whose sessions stay open for as long as anybody holds the upstream.

    A reload replaces upstreams under requests and downloads that go on with the one they began with;
    whoever lets go of it last closes it, without knowing. `close` closes the rest.
    """

    def __init__(
        self,
        metrics: Metrics,
        offline: OfflineSwitch,
        group: asyncio.TaskGroup,
        clock: Callable[[], float],
    ) -> None:
        self._metrics = metrics
        self._offline = offline
        self._group = group
        self._clock = clock
        self._open_sessions: dict[AsyncExitStack, finalize[..., Upstream]] = {}
        self._unused_sessions: asyncio.Queue[AsyncExitStack] = asyncio.Queue()

    async def open(self, config: Config, name: str) -> Upstream:
        """Return the upstream called `name`. Raises `ConfigError`."""
        async with AsyncExitStack() as stack:
            upstream = await self._create(stack, config, name)
            sessions = stack.pop_all()
        loop = asyncio.get_running_loop()
        # An object may be found to be garbage in any thread.
        self._open_sessions[sessions] = finalize(
            upstream, loop.call_soon_threadsafe, self._unused_sessions.put_nowait, sessions
        )
        return upstream

    async def close_unused(self) -> None:
        """Close what is not held any more, for ever."""
        while True:
            sessions = await self._unused_sessions.get()
            del self._open_sessions[sessions]
            await sessions.aclose()

    async def close(self) -> None:
        """Close all sessions."""
        while self._open_sessions:
            sessions, end = self._open_sessions.popitem()
            end.detach()
            await sessions.aclose()

    async def _create(self, stack: AsyncExitStack, config: Config, name: str) -> Upstream:
        settings, fetch, metrics = config.upstreams[name], config.fetch, self._metrics
        tls = await asyncio.to_thread(create_tls_context, name, settings)
        proxies = ProxySelector(os.environ, settings.proxy)

        async def exchange(
            url: str,
            login: CredentialsGetter,
            timeouts: RegistryTimeouts,
            attempts: int,
            *,
            label: str = name,
            is_mirror: bool = False,
        ) -> RegistryClient:
            guard = EgressGuard(URL(url), DefaultResolver(), proxies)
            session = open_session(
                guard, proxies, self._offline, tls=tls, connect_timeout=timeouts.connect
            )
            await stack.enter_async_context(session)
            observe = partial(metrics.count_upstream_request, label, "token")
            return RegistryClient(
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

        timeouts = RegistryTimeouts(fetch.connect_timeout, fetch.stall_timeout)
        login = CredentialSource(name, settings, self._group).get
        registry = await exchange(settings.url, login, timeouts, fetch.attempts)
        briefly = timeouts.for_mirror(len(settings.mirrors))
        # The login is for the registry: mirrors are asked as anybody.
        mirrors = [
            await exchange(url, no_credentials, briefly, 1, is_mirror=True)
            for url in settings.mirrors
        ]
        found_by, searched = URL(config.get_search_url(name)), None
        if found_by.absolute and found_by.origin() != URL(settings.url).origin():
            # It has a breaker and limits of its own, under its own name; the login is not for it.
            searched = await exchange(
                str(found_by), no_credentials, timeouts, fetch.attempts, label=found_by.authority
            )
        return Upstream(
            MirrorSet(registry, mirrors, metrics),
            metrics,
            min_rate=fetch.min_rate,
            min_rate_window=2 * fetch.stall_timeout,
            search_registry=searched,
        )


def is_unchanged(name: str, old: Config, new: Config) -> bool:
    """Tell whether the upstream called `name` can stay as it is, with its tokens, breaker and limits.

    What lies in `ca_file` may have changed though its name did not.
    """
    return (
        name in old.upstreams
        and not new.upstreams[name].ca_file
        and old.upstreams[name] == new.upstreams[name]
        and old.get_search_url(name) == new.get_search_url(name)
        and old.fetch == new.fetch
    )
