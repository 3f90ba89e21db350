"""Clients of the fake registry."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest
from yarl import URL

from proxy.metrics import Metrics
from proxy.parsing import DocumentParser
from proxy.upstream.auth.credentials import Credentials
from proxy.upstream.auth.tokens import Authenticator
from proxy.upstream.client import Upstream
from proxy.upstream.mirrors import MirrorSet
from proxy.upstream.network.egress import EgressGuard
from proxy.upstream.network.proxies import ProxySelector
from proxy.upstream.network.session import open_session
from proxy.upstream.offline import OfflineSwitch
from proxy.upstream.registry_client import RegistryClient, RegistryTimeouts
from tests.fakes.clock import Clock
from tests.fakes.registry import FakeRegistry

Connect = Callable[..., Any]

NO_PROXIES = ProxySelector({})
TIMEOUTS = RegistryTimeouts(connect=2, stall=5)


@asynccontextmanager
async def open_upstream(
    url: str,
    *,
    credentials: Credentials | None = None,
    offline: bool = False,
    guard: EgressGuard | None = None,
    timeouts: RegistryTimeouts = TIMEOUTS,
    proxies: ProxySelector = NO_PROXIES,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Upstream]:
    """Yield an upstream without mirrors whose registry is at `url`."""

    async def get_credentials() -> Credentials | None:
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
        registry = RegistryClient(
            "fake",
            url,
            session=session,
            authenticator=Authenticator(
                URL(url), session, group, get_credentials, lambda _status: None
            ),
            metrics=metrics,
            offline=switch,
            timeouts=timeouts,
            attempts=3,
            clock=Clock(),
            daemon_id="0" * 16,
        )
        mirror_set = MirrorSet(registry, [], metrics)
        parser = await asyncio.to_thread(DocumentParser)
        yield Upstream(mirror_set, metrics, parser, min_rate=0, min_rate_window=10)
        await asyncio.to_thread(parser.close)


@pytest.fixture
async def upstream(registry: FakeRegistry) -> AsyncIterator[Upstream]:
    async with open_upstream(registry.url) as upstream:
        yield upstream


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Open further upstreams, with the arguments of `open_upstream`; all are closed at the end."""
    async with AsyncExitStack() as stack:

        async def connect(url: str, **kwargs: Any) -> Upstream:
            return await stack.enter_async_context(open_upstream(url, **kwargs))

        yield connect
