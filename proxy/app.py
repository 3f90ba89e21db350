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
from proxy.concurrency import start_threads
from proxy.config import Config, keep_restart_only_keys, world_readable_files
from proxy.download.manager import DownloadManager
from proxy.download.writer import StorageDeps
from proxy.errors import ProxyError, StorageError
from proxy.log import LogWriter, get_logger
from proxy.metrics import Metrics
from proxy.preload.schedule import PreloadScheduler
from proxy.server.access import AccessControl
from proxy.server.admin import listener as admin_listener
from proxy.server.admin.handler import AdminApiHandler
from proxy.server.health import HealthEndpoints
from proxy.server.http import HttpServer
from proxy.server.listening import Listener
from proxy.server.middleware import Middleware
from proxy.service import ConfiguredApp, Core, configure_app
from proxy.storage.blobs import BlobStore
from proxy.storage.index import Index
from proxy.storage.space import SpaceManager
from proxy.systemd import ADMIN_SOCKET, REGISTRY_SOCKET
from proxy.tracing import HttpHandler, open_tracing
from proxy.upstream.factory import UpstreamFactory
from proxy.upstream.offline import OfflineSwitch

# How often uses are written, and how often idle content is looked for, in seconds.
FLUSH_INTERVAL = 5.0
SWEEP_INTERVAL = 60.0

# Threads for the disk; DNS has the loop's own.
DISK_THREADS = 8

# After answers were cut, their handlers have so many seconds to end.
ABORT_TIMEOUT = 1.0

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DaemonInfo:
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


class RunningApp:
    """The program: a service on its ground, and what stands between it and those who ask."""

    def __init__(
        self,
        core: Core,
        configured: ConfiguredApp,
        access: AccessControl,
        access_log: LogWriter | None,
        trace_requests: Callable[[HttpHandler], HttpHandler] | None,
    ) -> None:
        self.access = access
        self._core = core
        self._configured = configured
        self._access_log = access_log
        self._has_failed_reload = False
        self.health = HealthEndpoints(core.metrics, core.check_store, core.disk_threads)
        self.middleware = Middleware(
            access, configured.registry, self.health, core.metrics, access_log
        )
        self.api = AdminApiHandler(configured.routes, core.metrics, access_log)
        server = HttpServer(self.middleware, core.disk_threads, core.group, trace_requests)
        self.listener = Listener(server, "server.listen", core.group, access.limiter)
        self.check_store = core.check_store
        self._schedules = PreloadScheduler(
            lambda: self._configured.preloader,
            core.offline,
            core.metrics,
            core.disk_threads,
            core.clock,
        )
        self._update_upstream_metrics()

    @property
    def config(self) -> Config:
        """What applies now."""
        return self._configured.config

    @property
    def routes(self) -> list[tuple[str, str]]:
        """The methods and paths of the admin API."""
        return [(route.method, route.path) for route in self.api.routes]

    @property
    def info(self) -> DaemonInfo:
        """Where and what it serves."""
        ground = self._core
        return DaemonInfo(
            ground.addresses,
            ground.store.root,
            ground.space.max_size,
            ground.space.stored_bytes,
            {name: str(settings.url) for name, settings in self.config.upstreams.items()},
            ground.admin_addresses,
            is_tls=self.access.tls is not None,
        )

    @property
    def status_line(self) -> str:
        """How it goes, in one line."""
        ground = self._core
        served = sum(requests for requests, _ in ground.metrics.served_totals().values())
        return (
            f"{self.middleware.in_flight} answers and {len(ground.downloads)} downloads under way; "
            f"{served} served; {ground.space.stored_bytes / 1e9:.1f} of {ground.space.max_size / 1e9:.1f} GB"
            f"{'; offline' if ground.offline else ''}"
            f"{'; the last reload failed' if self._has_failed_reload else ''}"
        )

    async def reload(self, load: Callable[[], Config]) -> bool:
        """Go on with the configuration that `load` returns, all of it; or, if anything is wrong, as before.

        Returns whether it was taken. What only a restart can change is named in the log, and stays.
        """
        ground, before = self._core, self._configured
        # What can fail comes first, and changes nothing that is in use.
        try:
            config, fixed = keep_restart_only_keys(before.config, await asyncio.to_thread(load))
            service = await configure_app(ground, config, before)
            let_in = await asyncio.to_thread(self.access.prepare_reload, config.server)
            disk = await asyncio.to_thread(ground.store.total_bytes)
        except Exception as error:
            self._has_failed_reload = True
            ground.metrics.count_reload(is_success=False)
            if not isinstance(error, ProxyError | OSError):
                ground.metrics.count_internal_error()
                log.exception("config_reload_crashed")
            log.error("config_reload_failed", reason=str(error), applies="the old configuration")  # noqa: TRY400 - the reason says it all
            return False
        # What cannot fail follows, in one turn of the loop.
        self._has_failed_reload = False
        self._switch_to(service)
        let_in()
        if config.offline != before.config.offline:
            ground.offline.set_offline(is_offline=config.offline)
        if self._access_log:
            self._access_log.set_level(config.log.level)
        ground.downloads.configure(config.fetch)
        ground.metrics.count_reload(is_success=True)
        for key in fixed:
            log.warning(
                "restart_required", key=key, reason="it was changed, and the old value stays"
            )
        log.info("config_reloaded")
        try:
            await ground.space.resize(config.store.max_size.to_bytes(disk), config.store.min_free)
        except StorageError as error:
            log.warning("eviction_failed", reason=str(error))
        return True

    def _switch_to(self, configured: ConfiguredApp) -> None:
        """Put the service in the place of the one before, between two turns of the loop."""
        before, self._configured = self._configured, configured
        self.middleware.registry_handler = configured.registry
        self.api.routes = tuple(configured.routes)
        self._update_upstream_metrics()
        if configured.config.preload != before.config.preload:
            self.start_preloads()
        for name in before.upstreams.keys() - configured.upstreams.keys():
            self._core.metrics.unregister_upstream(name)

    def _update_upstream_metrics(self) -> None:
        """Let the metrics tell of the upstreams that there are, under the names that are wanted."""
        self._core.metrics.enable_registry_proxy(is_on=self.config.server.registry_proxy_metrics)
        for name, upstream in self._configured.upstreams.items():
            self._core.metrics.register_upstream(name, partial(getattr, upstream, "is_up"))

    def start_preloads(self) -> None:
        """Begin with what the configuration orders to be preloaded."""
        self._schedules.start(self._core.group, self.config.preload)

    def skip_drain(self) -> None:
        """Do not wait at the end for what is being sent."""
        self.listener.end_drain()

    async def drain(self) -> None:
        """Wait for what is being sent, as long as the configuration says."""
        await self.listener.drain(self.config.server.shutdown_timeout)


@asynccontextmanager
async def open_cache(
    config: Config,
    *,
    clock: Callable[[], float] = time.time,
    access_log: LogWriter | None = None,
    sockets: Mapping[str, Sequence[socket]] | None = None,
) -> AsyncIterator[RunningApp]:
    """Build the program, serve for as long as the context lasts, and end it in order.

    Needs no network. `clock` tells Unix time; `sockets` that listen already take the place of the
    configured addresses of the same purpose. Raises `StorageError` and `ConfigError`.
    """
    async with AsyncExitStack() as stack:
        traced = await stack.enter_async_context(
            open_tracing(__version__, is_on=config.server.tracing)
        )
        ground = await open_core(stack, config, clock)
        for file in world_readable_files(config):
            log.warning(
                "secret_file_exposed", file=file, help=f"it holds a secret: chmod o-r {file}"
            )
        access = AccessControl(config.server, ground.group, ground.metrics)
        stack.callback(access.close)
        running = RunningApp(
            ground, await configure_app(ground, config), access, access_log, traced
        )
        listener = running.listener
        # Who is cut off leaves a handler that has yet to notice.
        stack.push_async_callback(running.middleware.drain, ABORT_TIMEOUT)
        passed = sockets or {}
        given = passed.get(REGISTRY_SOCKET, ())
        addresses = await listener.open(
            stack, () if given else config.server.listen, given, access.tls
        )
        ground.addresses.extend(addresses)
        access.log_risks(addresses)
        stack.push_async_callback(running.drain)
        stack.push_async_callback(listener.close)
        addresses = await admin_listener.listen(
            stack,
            ground.group,
            ground.store.root,
            config.server,
            running.api,
            running.health,
            passed.get(ADMIN_SOCKET, ()),
            access.tls,
        )
        ground.admin_addresses.extend(addresses)
        ground.group.create_task(run_maintenance(running, ground))
        running.start_preloads()
        # What happens first at the end.
        stack.push_async_callback(listener.close)
        stack.callback(setattr, running.health, "is_stopping", True)
        yield running


async def open_core(stack: AsyncExitStack, config: Config, clock: Callable[[], float]) -> Core:
    """Open what lasts as long as the stack. What is opened first is closed last."""
    # The store outlives those who write to it.
    threads = start_threads(DISK_THREADS, "disk")
    stack.callback(threads.shutdown)
    store = BlobStore(config.store.path)
    stack.callback(store.close)
    index = Index(store.root / "index.sqlite", clock)
    stack.callback(index.close)
    metrics = Metrics(config.upstreams, __version__)
    space = SpaceManager(
        store,
        index,
        metrics,
        max_size=config.store.max_size.to_bytes(store.total_bytes()),
        min_free=config.store.min_free,
        clock=clock,
    )
    await space.open()
    # Whoever still asks upstream is ended before its session is.
    sessions = await stack.enter_async_context(AsyncExitStack())
    group = await stack.enter_async_context(_background_tasks())
    offline = OfflineSwitch(config.offline)
    opener = UpstreamFactory(metrics, offline, group, clock)
    sessions.push_async_callback(opener.close)
    group.create_task(opener.close_unused())
    storage = StorageDeps(store, index, space, metrics, threads, open_ingests=set())
    downloads = DownloadManager(storage, config.fetch, group)
    metrics.register_gauges(_LiveGauges(space, index, downloads))
    return Core(
        store=store,
        index=index,
        space=space,
        metrics=metrics,
        offline=offline,
        upstream_factory=opener,
        downloads=downloads,
        disk_threads=threads,
        group=group,
        clock=clock,
    )


@asynccontextmanager
async def _background_tasks() -> AsyncIterator[asyncio.TaskGroup]:
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


async def run_maintenance(app: RunningApp, core: Core) -> None:
    """Write uses, and remove what is idle, from time to time."""
    loop = asyncio.get_running_loop()
    swept = 0.0
    while True:
        config = app.config
        try:
            await core.index.flush()
            if loop.time() - swept > SWEEP_INTERVAL:
                swept = loop.time()
                await core.space.sweep(
                    max_idle=config.store.max_idle, ingest_ttl=config.fetch.ingest_ttl
                )
        except StorageError as error:
            log.warning("maintenance_failed", reason=str(error))
        await asyncio.sleep(FLUSH_INTERVAL)


@dataclass(frozen=True, slots=True)
class _LiveGauges:
    """Where the metrics read what is so at the time of a scrape."""

    space: SpaceManager
    index: Index
    downloads: DownloadManager

    @property
    def store_bytes(self) -> int:
        return self.space.stored_bytes

    @property
    def store_limit_bytes(self) -> int:
        return self.space.max_size

    @property
    def store_blobs(self) -> int:
        return self.space.blob_count

    @property
    def store_reserved_bytes(self) -> int:
        return self.space.reserved_bytes

    @property
    def store_pinned_bytes(self) -> int:
        return self.space.pinned_bytes

    @property
    def store_oldest_use(self) -> float:
        return self.index.oldest_use()

    @property
    def downloads_in_progress(self) -> int:
        return len(self.downloads)
