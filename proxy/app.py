"""The composition root: a configuration becomes objects, servers and their end; and another configuration.

`open_cache` is the only way to build the program; the daemon and every test use it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from socket import socket

from proxy import __version__
from proxy.concurrency import started
from proxy.config import Config, carry_over, exposed_files
from proxy.download.download import Tools
from proxy.download.manager import Downloads
from proxy.download.queue import Slots
from proxy.download.writer import Disk
from proxy.errors import ProxyError, StorageError
from proxy.log import Log, get_logger
from proxy.metrics import Metrics
from proxy.preload.schedule import Schedules
from proxy.server.access import Access
from proxy.server.admin import listener as admin_listener
from proxy.server.admin.api import Api
from proxy.server.health import Admin
from proxy.server.listening import Listener
from proxy.server.middleware import Middleware
from proxy.service import Ground, Service, make_service
from proxy.storage.blobs import LocalStore
from proxy.storage.index import Index
from proxy.storage.space import Space
from proxy.systemd import ADMIN, REGISTRY
from proxy.tracing import Handler, tracing
from proxy.upstream.factory import Opener
from proxy.upstream.offline import Offline

# How often uses are written, and how often idle content is looked for, in seconds.
FLUSH_INTERVAL = 5.0
SWEEP_INTERVAL = 60.0

# Threads for the disk; DNS has the loop's own.
DISK_THREADS = 8

# After answers were cut, their handlers have so many seconds to end.
CUT_TIMEOUT = 1.0

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Listening:
    """What is known once the daemon serves. Addresses are `host:port` or `unix:/path`, sizes bytes."""

    addresses: list[str]
    store: Path
    max_size: int
    used: int
    upstreams: dict[str, str]
    admin_addresses: list[str] = field(default_factory=list)
    is_tls: bool = False


class _Shutdown(Exception):  # noqa: N818 (it ends the task group, and is no error)
    """The daemon is to end."""


class Running:
    """The program: a service on its ground, and what stands between it and those who ask."""

    def __init__(
        self,
        ground: Ground,
        service: Service,
        access: Access,
        access_log: Log | None,
        traced: Callable[[Handler], Handler],
    ) -> None:
        self.access = access
        self._ground = ground
        self._service = service
        self._access_log = access_log
        self._is_stale = False
        self.admin = Admin(ground.metrics, ground.check_store, ground.threads)
        self.middleware = Middleware(
            access, service.registry, self.admin, ground.metrics, access_log
        )
        self.api = Api(service.routes, ground.metrics, access_log)
        handler = traced(self.middleware)
        # What is traced goes the usual way, all of it.
        express = self.middleware if handler is self.middleware else None
        self.listener = Listener(handler, "server.listen", ground.group, access.crowd, express)
        self.check_store = ground.check_store
        self._schedules = Schedules(
            lambda: self._service.preloader,
            ground.offline,
            ground.metrics,
            ground.threads,
            ground.clock,
        )
        self._watch()

    @property
    def config(self) -> Config:
        """What applies now."""
        return self._service.config

    @property
    def routes(self) -> list[tuple[str, str]]:
        """The methods and paths of the admin API."""
        return [(route.method, route.path) for route in self.api.routes]

    @property
    def listening(self) -> Listening:
        """Where and what it serves."""
        ground = self._ground
        return Listening(
            ground.addresses,
            ground.store.root,
            ground.space.max_size,
            ground.space.stored,
            {name: str(settings.url) for name, settings in self.config.upstreams.items()},
            ground.admin_addresses,
            is_tls=self.access.tls is not None,
        )

    @property
    def status(self) -> str:
        """How it goes, in one line."""
        ground = self._ground
        served = sum(requests for requests, _ in ground.metrics.served().values())
        return (
            f"{self.middleware.in_flight} answers and {len(ground.downloads)} downloads under way; "
            f"{served} served; {ground.space.stored / 1e9:.1f} of {ground.space.max_size / 1e9:.1f} GB"
            f"{'; offline' if ground.offline else ''}"
            f"{'; the last reload failed' if self._is_stale else ''}"
        )

    async def reload(self, load: Callable[[], Config]) -> bool:
        """Go on with the configuration that `load` returns, all of it; or, if anything is wrong, as before.

        Returns whether it was taken. What only a restart can change is named in the log, and stays.
        """
        ground, before = self._ground, self._service
        # What can fail comes first, and changes nothing that is in use.
        try:
            config, fixed = carry_over(before.config, await asyncio.to_thread(load))
            service = await make_service(ground, config, before)
            let_in = await asyncio.to_thread(self.access.prepare, config.server)
            disk = await asyncio.to_thread(ground.store.total_bytes)
        except Exception as error:
            self._is_stale = True
            ground.metrics.reloaded(is_good=False)
            if not isinstance(error, ProxyError | OSError):
                ground.metrics.bug()
                log.exception("reload_crashed")
            log.error("not_reloaded", reason=str(error), applies="the old configuration")  # noqa: TRY400 - the reason says it all
            return False
        # What cannot fail follows, in one turn of the loop.
        self._is_stale = False
        self._enter(service)
        let_in()
        if config.offline != before.config.offline:
            ground.offline.switch(is_on=config.offline)
        if self._access_log:
            self._access_log.set_level(config.log.level)
        ground.downloads.slots.resize(config.fetch.max_downloads)
        ground.metrics.reloaded(is_good=True)
        for key in fixed:
            log.warning("restart_needed", key=key, reason="it was changed, and the old value stays")
        log.info("reloaded")
        try:
            await ground.space.resize(config.store.max_size.resolve(disk), config.store.min_free)
        except StorageError as error:
            log.warning("not_evicted", reason=str(error))
        return True

    def _enter(self, service: Service) -> None:
        """Put the service in the place of the one before, between two turns of the loop."""
        before, self._service = self._service, service
        self.middleware.registry = service.registry
        self.api.routes = tuple(service.routes)
        self._watch()
        if service.config.preload != before.config.preload:
            self.start_preloads()
        for name in before.upstreams.keys() - service.upstreams.keys():
            self._ground.metrics.forget_upstream(name)

    def _watch(self) -> None:
        """Let the metrics tell of the upstreams that there are, under the names that are wanted."""
        self._ground.metrics.show_registry_proxy(is_on=self.config.server.registry_proxy_metrics)
        for name, upstream in self._service.upstreams.items():
            self._ground.metrics.watch_upstream(name, partial(getattr, upstream, "is_up"))

    def start_preloads(self) -> None:
        """Begin with what the configuration orders to be preloaded."""
        self._schedules.start(self._ground.group, self.config.preload)

    def hurry(self) -> None:
        """Do not wait at the end for what is being sent."""
        self.listener.hurry()

    async def drain(self) -> None:
        """Wait for what is being sent, as long as the configuration says."""
        await self.listener.drain(self.config.server.shutdown_timeout)


@asynccontextmanager
async def open_cache(
    config: Config,
    *,
    clock: Callable[[], float] = time.time,
    access_log: Log | None = None,
    sockets: Mapping[str, Sequence[socket]] | None = None,
) -> AsyncIterator[Running]:
    """Build the program, serve for as long as the context lasts, and end it in order.

    Needs no network. `clock` tells Unix time; `sockets` that listen already take the place of the
    configured addresses of the same purpose. Raises `StorageError` and `ConfigError`.
    """
    async with AsyncExitStack() as stack:
        traced = await stack.enter_async_context(tracing(__version__, is_on=config.server.tracing))
        ground = await _lay_ground(stack, config, clock)
        for file in exposed_files(config):
            log.warning("readable_by_all", file=file, help=f"it holds a secret: chmod o-r {file}")
        access = Access(config.server, ground.group, ground.metrics)
        stack.callback(access.close)
        running = Running(ground, await make_service(ground, config), access, access_log, traced)
        listener = running.listener
        # Who is cut off leaves a handler that has yet to notice.
        stack.push_async_callback(running.middleware.drain, CUT_TIMEOUT)
        passed = sockets or {}
        given = passed.get(REGISTRY, ())
        addresses = await listener.open(
            stack, () if given else config.server.listen, given, access.tls
        )
        ground.addresses.extend(addresses)
        access.tell_of_risks(addresses)
        stack.push_async_callback(running.drain)
        stack.push_async_callback(listener.close)
        addresses = await admin_listener.listen(
            stack,
            ground.group,
            ground.store.root,
            config.server,
            running.api,
            running.admin,
            passed.get(ADMIN, ()),
            access.tls,
        )
        ground.admin_addresses.extend(addresses)
        ground.group.create_task(_keep_house(running, ground))
        running.start_preloads()
        # What happens first at the end.
        stack.push_async_callback(listener.close)
        stack.callback(setattr, running.admin, "is_stopping", True)
        yield running


async def _lay_ground(stack: AsyncExitStack, config: Config, clock: Callable[[], float]) -> Ground:
    """Open what lasts as long as the stack. What is opened first is closed last."""
    # The store outlives those who write to it.
    threads = started(DISK_THREADS, "disk")
    stack.callback(threads.shutdown)
    store = LocalStore(config.store.path)
    stack.callback(store.close)
    index = Index(store.root / "index.sqlite", clock)
    stack.callback(index.close)
    metrics = Metrics(config.upstreams, __version__)
    space = Space(
        store,
        index,
        metrics,
        max_size=config.store.max_size.resolve(store.total_bytes()),
        min_free=config.store.min_free,
        clock=clock,
    )
    await space.open()
    # Whoever still asks upstream is ended before its session is.
    sessions = await stack.enter_async_context(AsyncExitStack())
    group = await stack.enter_async_context(_owned_tasks())
    offline = Offline(config.offline)
    opener = Opener(metrics, offline, group, clock)
    sessions.push_async_callback(opener.close)
    group.create_task(opener.close_unused())
    tools = Tools(
        disk=Disk(store, index, space, metrics, threads),
        slots=Slots(config.fetch.max_downloads),
        settings=config.fetch,
    )
    downloads = Downloads(tools, {}, group)
    metrics.watch(_Gauges(space, index, downloads))
    return Ground(
        store=store,
        index=index,
        space=space,
        metrics=metrics,
        offline=offline,
        opener=opener,
        downloads=downloads,
        threads=threads,
        group=group,
        clock=clock,
    )


@asynccontextmanager
async def _owned_tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """Hold the group of all background work; at the end it is cancelled and waited for."""
    failure: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            try:
                yield group
            except BaseException as error:  # noqa: BLE001 (raised again below, not in a group)
                failure = error
            raise _Shutdown
    except BaseExceptionGroup as ended:
        _, crashes = ended.split(_Shutdown)
        if crashes is not None:
            raise crashes from None
    if failure is not None:
        raise failure


async def _keep_house(running: Running, ground: Ground) -> None:
    """Write uses, and remove what is idle, from time to time."""
    loop = asyncio.get_running_loop()
    swept = 0.0
    while True:
        config = running.config
        try:
            await ground.index.flush()
            if loop.time() - swept > SWEEP_INTERVAL:
                swept = loop.time()
                await ground.space.sweep(
                    max_idle=config.store.max_idle, ingest_ttl=config.fetch.ingest_ttl
                )
        except StorageError as error:
            log.warning("housekeeping_failed", reason=str(error))
        await asyncio.sleep(FLUSH_INTERVAL)


@dataclass(frozen=True, slots=True)
class _Gauges:
    """Where the metrics read what is so at the time of a scrape."""

    space: Space
    index: Index
    downloads: Downloads

    @property
    def store_bytes(self) -> int:
        return self.space.stored

    @property
    def store_limit_bytes(self) -> int:
        return self.space.max_size

    @property
    def store_blobs(self) -> int:
        return self.space.blobs

    @property
    def store_reserved_bytes(self) -> int:
        return self.space.reserved

    @property
    def store_pinned_bytes(self) -> int:
        return self.space.pinned

    @property
    def store_oldest_use(self) -> float:
        return self.index.oldest_use()

    @property
    def downloads_in_progress(self) -> int:
        return len(self.downloads)
