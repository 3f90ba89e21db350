"""Build upstreams from the configuration, and close their sessions once they are no longer used."""

import asyncio
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from weakref import finalize

from aiohttp import DefaultResolver
from yarl import URL

from proxy.config import Config
from proxy.fleet.directory import Directory
from proxy.metrics import Metrics
from proxy.parsing import DocumentParser
from proxy.upstream.auth.credentials import CredentialSource
from proxy.upstream.auth.tokens import Authenticator, CredentialsGetter, no_credentials
from proxy.upstream.client import Upstream
from proxy.upstream.hub.client import HUB_ATTEMPTS, HubClient
from proxy.upstream.mirrors import MirrorSet
from proxy.upstream.network.egress import EgressGuard
from proxy.upstream.network.proxies import ProxySelector
from proxy.upstream.network.session import create_tls_context, open_session
from proxy.upstream.offline import OfflineSwitch
from proxy.upstream.registry_client import RegistryClient, RegistryTimeouts


class UpstreamFactory:
    """Opens upstreams, and closes the sessions of each when its `Upstream` is garbage collected.

    A reload replaces upstreams while requests and downloads still use the old ones, so the owner of
    an `Upstream` cannot know when to close it.
    """

    def __init__(
        self,
        metrics: Metrics,
        offline: OfflineSwitch,
        parser: DocumentParser,
        group: asyncio.TaskGroup,
        clock: Callable[[], float],
        daemon_id: str,
        directory: Directory | None = None,
    ) -> None:
        self._metrics = metrics
        self._daemon_id = daemon_id
        self._directory = directory
        self._offline = offline
        self._parser = parser
        self._group = group
        self._clock = clock
        self._open_sessions: dict[AsyncExitStack, finalize[..., Upstream]] = {}
        self._unused_sessions: asyncio.Queue[AsyncExitStack] = asyncio.Queue()

    async def open(self, config: Config, name: str) -> Upstream:
        """Return the upstream of this name. Raises `ConfigError`."""
        async with AsyncExitStack() as stack:
            upstream = await self._create(stack, config, name)
            sessions = stack.pop_all()
        loop = asyncio.get_running_loop()
        # Garbage collection may run in any thread.
        self._open_sessions[sessions] = finalize(
            upstream, loop.call_soon_threadsafe, self._unused_sessions.put_nowait, sessions
        )
        return upstream

    async def close_unused(self) -> None:
        """Close the sessions of upstreams as they become unused; never returns."""
        while True:
            sessions = await self._unused_sessions.get()
            del self._open_sessions[sessions]
            await sessions.aclose()

    async def close(self) -> None:
        """Close all sessions."""
        while self._open_sessions:
            sessions, finalizer = self._open_sessions.popitem()
            finalizer.detach()
            await sessions.aclose()

    async def _create(self, stack: AsyncExitStack, config: Config, name: str) -> Upstream:
        settings, fetch, metrics = config.upstreams[name], config.fetch, self._metrics
        tls = await asyncio.to_thread(create_tls_context, name, settings)
        proxies = ProxySelector(os.environ, settings.proxy)

        async def create_client(
            url: str,
            get_credentials: CredentialsGetter,
            timeouts: RegistryTimeouts,
            attempts: int,
            *,
            name: str = name,
            is_mirror: bool = False,
        ) -> RegistryClient:
            guard = EgressGuard(URL(url), DefaultResolver(), proxies)
            session = open_session(
                guard, proxies, self._offline, tls=tls, connect_timeout=timeouts.connect
            )
            await stack.enter_async_context(session)
            record_token_status = partial(metrics.count_upstream_request, name, "token")
            return RegistryClient(
                name,
                url,
                session=session,
                authenticator=Authenticator(
                    URL(url), session, self._group, get_credentials, record_token_status
                ),
                metrics=metrics,
                offline=self._offline,
                timeouts=timeouts,
                attempts=attempts,
                clock=self._clock,
                daemon_id=self._daemon_id,
                is_mirror=is_mirror,
                directory=None if is_mirror else self._directory,
            )

        timeouts = RegistryTimeouts(fetch.connect_timeout, fetch.stall_timeout)
        get_credentials = CredentialSource(name, settings, self._group).get
        registry = await create_client(settings.url, get_credentials, timeouts, fetch.attempts)
        # The credentials are for the registry: requests to mirrors and searches are anonymous.
        mirror_timeouts = timeouts.for_mirror(len(settings.mirrors))
        mirrors = [
            await create_client(url, no_credentials, mirror_timeouts, 1, is_mirror=True)
            for url in settings.mirrors
        ]
        search_url, search_registry = URL(config.get_search_url(name)), None
        if search_url.absolute and search_url.origin() != URL(settings.url).origin():
            # A host of its own: it has its own breaker and quota, under its own name.
            search_registry = await create_client(
                str(search_url),
                no_credentials,
                timeouts,
                fetch.attempts,
                name=search_url.authority,
            )
        hub = None
        if facts_url := settings.facts_url:
            # Anonymous, as facts are asked about public repositories only.
            hub = HubClient(
                await create_client(
                    facts_url,
                    no_credentials,
                    timeouts,
                    HUB_ATTEMPTS,
                    name=URL(facts_url).authority,
                ),
                await create_client(settings.url, no_credentials, timeouts, HUB_ATTEMPTS),
                metrics,
                self._parser,
            )
        return Upstream(
            MirrorSet(registry, mirrors, metrics),
            metrics,
            self._parser,
            hub=hub,
            min_rate=fetch.min_rate,
            min_rate_window=2 * fetch.stall_timeout,
            search_registry=search_registry,
        )


def is_unchanged(name: str, old: Config, new: Config) -> bool:
    """Tell whether a reload can keep the upstream of this name, with its tokens, breaker and quota.

    An upstream with a `ca_file` is always replaced: the content of the file may have changed.
    """
    return (
        name in old.upstreams
        and not new.upstreams[name].ca_file
        and old.upstreams[name] == new.upstreams[name]
        and old.get_search_url(name) == new.get_search_url(name)
        and old.fetch == new.fetch
    )
