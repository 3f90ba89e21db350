"""An upstream client that talks to the fake registry."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest
from yarl import URL

from proxy.metrics import Metrics
from proxy.upstream.auth import Authenticator, Credentials
from proxy.upstream.client import Upstream
from tests.fakes.clock import Clock
from tests.fakes.registry import FakeRegistry

Connect = Callable[..., Any]


@asynccontextmanager
async def connected(
    url: str, *, credentials: Credentials | None = None, offline: bool = False
) -> AsyncIterator[Upstream]:
    """Yield a client of the registry at `url`."""
    metrics = Metrics(["fake"], "0")
    async with (
        aiohttp.ClientSession(
            auto_decompress=False,
            requote_redirect_url=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity"},
        ) as session,
        asyncio.TaskGroup() as group,
    ):
        authenticator = Authenticator(URL(url), session, group, lambda: credentials, lambda _: None)
        yield Upstream(
            "fake",
            url,
            session=session,
            authenticator=authenticator,
            metrics=metrics,
            offline=offline,
            connect_timeout=2.0,
            stall_timeout=5,
            clock=Clock(),
        )


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
