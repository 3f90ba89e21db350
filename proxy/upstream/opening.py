"""An upstream as the configuration has it: its sessions, logins, mirrors, and the host that searches it."""

import asyncio
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

from aiohttp import DefaultResolver
from yarl import URL

from proxy.config import Config
from proxy.metrics import Metrics
from proxy.upstream.auth import Authenticator, Login, anonymous
from proxy.upstream.client import Upstream
from proxy.upstream.credentials import CredentialSource
from proxy.upstream.egress import EgressGuard
from proxy.upstream.exchange import Exchange, Timeouts
from proxy.upstream.offline import Offline
from proxy.upstream.proxies import Proxies
from proxy.upstream.routes import Routes
from proxy.upstream.session import open_session, tls_context


async def open_upstream(
    stack: AsyncExitStack,
    config: Config,
    name: str,
    offline: Offline,
    metrics: Metrics,
    group: asyncio.TaskGroup,
    clock: Callable[[], float],
) -> Upstream:
    """Return the upstream called `name`; its sessions are closed with `stack`. Raises `ConfigError`."""
    settings, fetch = config.upstreams[name], config.fetch
    tls, proxies = tls_context(name, settings), Proxies(os.environ, settings.proxy)

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
        session = open_session(guard, proxies, offline, tls=tls, connect_timeout=timeouts.connect)
        await stack.enter_async_context(session)
        observe = partial(metrics.upstream_request, label, "token")
        return Exchange(
            label,
            url,
            session=session,
            authenticator=Authenticator(URL(url), session, group, login, observe),
            metrics=metrics,
            offline=offline,
            timeouts=timeouts,
            attempts=attempts,
            clock=clock,
            is_mirror=is_mirror,
        )

    timeouts = Timeouts(fetch.connect_timeout, fetch.stall_timeout)
    login = CredentialSource(name, settings, group).get
    registry = await exchange(settings.url, login, timeouts, fetch.attempts)
    briefly = timeouts.of_mirror(len(settings.mirrors))
    # The login is for the registry: mirrors are asked as anybody.
    mirrors = [
        await exchange(url, anonymous, briefly, 1, is_mirror=True) for url in settings.mirrors
    ]
    routes = Routes(registry, mirrors, metrics)
    metrics.watch_upstream(name, lambda: routes.is_up)
    found_by, searched = URL(config.search_url(name)), None
    if found_by.absolute and found_by.origin() != URL(settings.url).origin():
        # It has a breaker and limits of its own, under its own name; the login is not for it.
        searched = await exchange(
            str(found_by), anonymous, timeouts, fetch.attempts, label=found_by.authority
        )
    return Upstream(
        routes,
        metrics,
        min_rate=fetch.min_rate,
        floor_window=2 * fetch.stall_timeout,
        searched=searched,
    )
