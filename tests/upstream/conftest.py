"""An upstream client that talks to the fake registry."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest
from yarl import URL

from proxy.metrics import Metrics
from proxy.upstream.auth import Authenticator
from proxy.upstream.client import Upstream
from proxy.upstream.credentials import Credentials
from proxy.upstream.egress import EgressGuard
from proxy.upstream.factory import open_session
from proxy.upstream.mirrors import MirrorSet
from proxy.upstream.offline import OfflineSwitch
from proxy.upstream.proxies import ProxySelector
from proxy.upstream.registry_client import RegistryClient, RegistryTimeouts
from tests.fakes.clock import Clock
from tests.fakes.registry import FakeRegistry

Connect = Callable[..., Any]

DIRECT = ProxySelector({})
PATIENT = RegistryTimeouts(connect=2, stall=5)


@asynccontextmanager
async def connected(
    url: str,
    *,
    credentials: Credentials | None = None,
    offline: bool = False,
    guard: EgressGuard | None = None,
    timeouts: RegistryTimeouts = PATIENT,
    proxies: ProxySelector = DIRECT,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Upstream]:
    """Yield a client of the registry at `url`."""

    async def login() -> Credentials | None:
        return credentials

    metrics = Metrics(["fake"], "0")
    switch = OfflineSwitch(offline)
    async with (
        open_session(
            guard or EgressGuard(URL(url), aiohttp.DefaultResolver(), proxies),
            proxies,
            switch,
            tls=tls or ssl.create_default_context(),
            connect_timeout=2.0,
        ) as session,
        asyncio.TaskGroup() as group,
    ):
        authenticator = Authenticator(URL(url), session, group, login, lambda _: None)
        exchange = RegistryClient(
            "fake",
            url,
            session=session,
            authenticator=authenticator,
            metrics=metrics,
            offline=switch,
            timeouts=timeouts,
            attempts=3,
            clock=Clock(),
        )
        routes = MirrorSet(exchange, [], metrics)
        yield Upstream(routes, metrics, min_rate=0, min_rate_window=10)


@pytest.fixture
async def upstream(registry: FakeRegistry) -> AsyncIterator[Upstream]:
    async with connected(registry.url) as upstream:
        yield upstream


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Make further clients, all closed at the end."""
    async with AsyncExitStack() as stack:

        async def enter(url: str, **kwargs: Any) -> Upstream:
            return await stack.enter_async_context(connected(url, **kwargs))

        yield enter
