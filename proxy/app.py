"""The program: built from a configuration, served, reloaded and shut down in order.

`open_cache` is the only way to build it, for the daemon, for commands and for tests. It opens the
core (`core.py`), builds the configured part (`service.py`), which a reload replaces, and starts the
servers.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from socket import socket

from proxy import __version__
from proxy.cache.repair import BlobRepairer, RepairQueue
from proxy.cache.stand_ins import StandIns
from proxy.concurrency import background
from proxy.conditions import ConditionWatcher
from proxy.config import Config, keep_restart_only_keys, world_readable_files
from proxy.contents.scanner import ImageScanner, run_scan_schedule
from proxy.core import Core, open_core
from proxy.errors import ProxyError, StorageError
from proxy.log import LogWriter, get_logger
from proxy.preload.schedule import PreloadScheduler
from proxy.repository_rules import RepositoryRules
from proxy.server.activity.schedules import routes as schedule_routes
from proxy.server.admin import listener as admin_listener
from proxy.server.admin.handler import AdminApiHandler
from proxy.server.clients.access_control import AccessControl
from proxy.server.clients.peer_gate import PeerGate
from proxy.server.health import HealthEndpoints
from proxy.server.http import HttpServer
from proxy.server.listening import Listener
from proxy.server.middleware import Middleware
from proxy.service import ConfiguredApp, configure_app
from proxy.storage.records.trail import Act
from proxy.systemd import ADMIN_SOCKET, REGISTRY_SOCKET
from proxy.tracing import HttpHandler, open_tracing
from proxy.upstream.client import Upstream

# Seconds between two writes of the uses of blobs, and between two searches for idle content.
FLUSH_INTERVAL = 5.0
SWEEP_INTERVAL = 60.0

# Seconds that handlers of aborted responses have to end at a shutdown.
ABORT_TIMEOUT = 1.0

log = get_logger(__name__)


@asynccontextmanager
async def open_cache(
    config: Config,
    *,
    clock: Callable[[], float] = time.time,
    access_log: LogWriter | None = None,
    sockets: Mapping[str, Sequence[socket]] | None = None,
) -> AsyncIterator["RunningApp"]:
    """Build the program, serve during the block, and shut down in order. Needs no network.

    `clock` returns Unix time. `sockets` that already listen, by purpose, replace the configured
    addresses. Raises `StorageError` and `ConfigError`.
    """
    sockets = sockets or {}
    async with AsyncExitStack() as stack:
        trace_requests = await stack.enter_async_context(
            open_tracing(__version__, is_on=config.server.tracing)
        )
        core = await open_core(stack, config, clock)
        for file in world_readable_files(config):
            log.warning(
                "secret_file_exposed", file=file, help=f"it holds a secret: chmod o-r {file}"
            )
        if any(rule.mode == "enforce" for rule in config.policy):
            log.info(
                "policy_bypass_possible",
                help="clients that ask a registry for what this cache refuses avoid the policies; "
                "see pullcache client-config --only",
            )
        access = AccessControl(config.server, core.group, core.metrics)
        stack.callback(access.close)
        app = RunningApp(
            # Not in a variable, because that would keep replaced upstreams open after a reload.
            configured=await configure_app(core, config),
            core=core,
            access=access,
            access_log=access_log,
            trace_requests=trace_requests,
        )
        await _listen(app, core, stack, sockets)
        # Before preloads, which one node of a fleet runs.
        await core.directory.join()
        core.group.create_task(core.directory.run())
        stack.push_async_callback(app.write_last_records)
        core.group.create_task(run_maintenance(app, core))
        core.group.create_task(run_scrub(app, core))
        core.group.create_task(run_scan_schedule(lambda: app.scanner, core.clock))
        app.start_preloads()
        # A shutdown begins here: /readyz fails, and no new connections are accepted.
        stack.push_async_callback(app.listener.close)
        stack.callback(setattr, app.health, "is_stopping", True)
        stack.push_async_callback(core.directory.leave)
        yield app


async def _listen(
    app: "RunningApp", core: Core, stack: AsyncExitStack, sockets: Mapping[str, Sequence[socket]]
) -> None:
    """Open the registry's and the admin API's listeners; the stack drains and closes them."""
    server, tls = app.config.server, app.access.tls
    # Handlers of aborted connections still have to end.
    stack.push_async_callback(app.middleware.drain, ABORT_TIMEOUT)
    passed = sockets.get(REGISTRY_SOCKET, ())
    core.addresses.extend(
        await app.listener.open(stack, () if passed else server.listen, passed, tls)
    )
    app.access.log_risks(core.addresses)
    stack.push_async_callback(app.drain)
    stack.push_async_callback(app.listener.close)
    core.admin_addresses.extend(
        await admin_listener.listen(
            stack,
            core.store.root,
            admin_listener.AdminServices(
                server,
                app.api,
                app.health,
                core.page_links,
                core.group,
                app.access_log,
                core.clock,
            ),
            sockets.get(ADMIN_SOCKET, ()),
            tls,
        )
    )


async def run_maintenance(app: "RunningApp", core: Core) -> None:
    """Write the uses of blobs to the index, and remove idle content, until cancelled."""
    loop = asyncio.get_running_loop()
    swept_at = 0.0
    conditions = ConditionWatcher(core.webhook)
    while True:
        config = app.config
        # A command without a daemon, which does not listen, reports what fails and no states.
        if config.server.listen:
            conditions.check(app.upstreams, core.space)
        try:
            await core.index.flush()
            await core.space.shrink_index()
            await app.write_policy_decisions()
            await app.write_traffic()
        except StorageError as error:
            log.warning("maintenance_failed", reason=str(error))
        if loop.time() - swept_at > SWEEP_INTERVAL:
            swept_at = loop.time()
            try:
                await app.stand_ins.refresh()
                await core.space.sweep(
                    max_idle=config.store.max_idle, ingest_ttl=config.fetch.ingest_ttl
                )
            except StorageError as error:
                log.warning("maintenance_failed", reason=str(error))
            await core.trail.write_evictions()
        await asyncio.sleep(FLUSH_INTERVAL)


async def run_scrub(app: "RunningApp", core: Core) -> None:
    """Look for damaged blobs, and fetch them anew, until cancelled."""
    repairs = RepairQueue(lambda: app.repairer)
    async with background(repairs.run()):
        await core.scrubber.run(lambda: app.config.store.scrub, repairs.add)


@dataclass(frozen=True, slots=True)
class DaemonInfo:
    """What a command prints once the daemon serves.

    Addresses are `host:port` or `unix:/path`, sizes are bytes; `upstreams` are URLs by name.
    """

    addresses: list[str]
    store: Path
    max_size: int
    used: int
    upstreams: dict[str, str]
    admin_addresses: list[str] = field(default_factory=list)
    is_tls: bool = False
    has_pages: bool = True


def _peer_gate(core: Core, config: Config) -> PeerGate | None:
    """Return what recognises the nodes of the fleet; None without a fleet."""
    if core.peers is None:
        return None
    return PeerGate(core.peers.token, is_local=not config.fleet.token_file)


class RunningApp:
    """The running program: the core, the configured part, and the servers in front of them."""

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
        self.access_log = access_log
        self._has_failed_reload = False
        self.health = HealthEndpoints(core.metrics, core.check_store, core.disk_threads)
        core.pulls.upstreams = configured.upstreams
        self.middleware = Middleware(
            access,
            configured.registry,
            self.health,
            core.metrics,
            access_log,
            core.daemon_id,
            core.pulls,
            core.admin_addresses if configured.config.server.pages else (),
            _peer_gate(core, self.config),
        )
        self.middleware.fleet_handlers = configured.fleet_handlers
        server = HttpServer(
            self.middleware, core.disk_threads, core.group, trace_requests, access.proxies
        )
        self.listener = Listener(
            server, "server.listen", core.group, access.limiter, access.proxies
        )
        self.check_store = core.check_store
        self._scheduler = PreloadScheduler(
            lambda: self._configured.preloader,
            core.offline,
            core.metrics,
            core.disk_threads,
            core.clock,
            core.trail,
            core.directory,
        )
        self.api = AdminApiHandler(
            [*configured.routes, *schedule_routes(self._scheduler)], core.metrics, access_log
        )
        self._update_upstream_metrics()

    @property
    def config(self) -> Config:
        """The configuration that applies."""
        return self._configured.config

    @property
    def upstreams(self) -> Mapping[str, Upstream]:
        """The upstreams of the configuration that applies."""
        return self._configured.upstreams

    @property
    def repairer(self) -> BlobRepairer:
        """Fetches damaged blobs, as the configuration that applies says."""
        return self._configured.repairer

    @property
    def scanner(self) -> ImageScanner:
        """Runs the scanner of the configuration that applies."""
        return self._configured.scanner

    @property
    def stand_ins(self) -> StandIns:
        """Keeps what stands in for content that is too young for a policy."""
        return self._configured.stand_ins

    @property
    def routes(self) -> list[tuple[str, str]]:
        """The methods and paths of the admin API."""
        return [(route.method, route.path) for route in self.api.routes]

    @property
    def info(self) -> DaemonInfo:
        """The addresses, the store and the upstreams."""
        core = self._core
        return DaemonInfo(
            core.addresses,
            core.store.root,
            core.space.max_size,
            core.space.stored_bytes,
            {name: str(settings.url) for name, settings in self.config.upstreams.items()},
            core.admin_addresses,
            is_tls=self.access.tls is not None,
            has_pages=self.config.server.pages,
        )

    @property
    def status_line(self) -> str:
        """The state of the daemon in one line, as `systemctl status` shows it."""
        core = self._core
        served = sum(requests for requests, _ in core.metrics.served_totals().values())
        used, limit = core.space.stored_bytes / 1e9, core.space.max_size / 1e9
        return (
            f"running: {self.middleware.in_flight} responses, {len(core.downloads)} downloads; "
            f"{served} served; {used:.1f} of {limit:.1f} GB"
            f"{'; offline' if core.offline else ''}"
            f"{'; last reload failed' if self._has_failed_reload else ''}"
        )

    async def write_policy_decisions(self) -> None:
        """Write what policies have decided to the index. Raises `StorageError`."""
        await self._configured.policy.write_decisions()

    async def write_traffic(self) -> None:
        """Write what was counted of clients' pulls to the index. Raises `StorageError`."""
        await self._core.write_traffic(self.config.statistics)

    async def write_last_records(self) -> None:
        """Write decisions and traffic at the end of the daemon; without space they are lost."""
        for write in (
            self.write_policy_decisions,
            self.write_traffic,
            self._core.trail.write_evictions,
        ):
            with suppress(StorageError):
                await write()

    def start_preloads(self) -> None:
        """Start the scheduled preloads of the configuration, in place of the previous ones."""
        self._scheduler.start(self._core.group, self.config.preload)

    def skip_drain(self) -> None:
        """End a running or later `drain` at once."""
        self.listener.end_drain()

    async def drain(self) -> None:
        """Wait for the responses that are being sent, up to `server.shutdown_timeout`."""
        await self.listener.drain(self.config.server.shutdown_timeout)

    async def reload(self, load: Callable[[], Config]) -> bool:
        """Apply the configuration that `load` returns; if it has an error, keep the old one.

        Returns whether it was applied. Keys that need a restart keep their values, with a warning.
        """
        act = Act("reload", "SIGHUP")
        core, before = self._core, self._configured
        # All steps that can fail come first, and change nothing that is in use.
        try:
            config, kept_keys = keep_restart_only_keys(before.config, await asyncio.to_thread(load))
            configured = await configure_app(core, config, before)
            apply_access = await asyncio.to_thread(self.access.prepare_reload, config.server)
            disk_size = await asyncio.to_thread(core.store.total_bytes)
        except Exception as error:  # noqa: BLE001 (a bug must not end the daemon either)
            self._report_failed_reload(error)
            act.outcome, act.detail = "failed", str(error)
            await self._core.trail.add(act)
            return False
        # The rest cannot fail, and runs in one turn of the loop.
        self._switch_to(configured)
        apply_access()
        self._apply_core_settings(before.config)
        self._has_failed_reload = False
        core.metrics.count_reload(is_success=True)
        for key in kept_keys:
            log.warning(
                "restart_required", key=key, reason="it changed; the old value still applies"
            )
        log.info("config_reloaded")
        await core.trail.add(act)
        try:
            await core.space.resize(
                config.store.max_size.to_bytes(disk_size), config.store.min_free
            )
        except StorageError as error:
            log.warning("eviction_failed", reason=str(error))
        return True

    def _report_failed_reload(self, error: Exception) -> None:
        self._has_failed_reload = True
        self._core.metrics.count_reload(is_success=False)
        if not isinstance(error, ProxyError | OSError):
            self._core.metrics.count_internal_error()
            log.error("config_reload_crashed", exc_info=error)
        log.error("config_reload_failed", reason=str(error))

    def _switch_to(self, configured: ConfiguredApp) -> None:
        """Replace the configured part; running requests and operations finish with the old one."""
        before, self._configured = self._configured, configured
        self.middleware.registry_handler = configured.registry
        self.middleware.fleet_handlers = configured.fleet_handlers
        self._core.pulls.upstreams = configured.upstreams
        self.api.routes = (*configured.routes, *schedule_routes(self._scheduler))
        self._update_upstream_metrics()
        if configured.config.preload != before.config.preload:
            self.start_preloads()
        for name in before.upstreams.keys() - configured.upstreams.keys():
            self._core.metrics.unregister_upstream(name)

    def _apply_core_settings(self, before: Config) -> None:
        """Apply the keys that the core and the log read from the configuration."""
        config = self.config
        # An unchanged key leaves it as `pullcache offline` has set it.
        if config.offline != before.offline:
            self._core.offline.set_offline(is_offline=config.offline)
        if self.access_log:
            self.access_log.set_level(config.log.level)
        self._core.downloads.configure(config.fetch)
        self._core.webhook.settings = config.notify
        self._core.space.set_rules(RepositoryRules(config))

    def _update_upstream_metrics(self) -> None:
        self._core.metrics.enable_registry_proxy(is_on=self.config.server.registry_proxy_metrics)
        for name, upstream in self._configured.upstreams.items():
            self._core.metrics.register_upstream(name, partial(getattr, upstream, "is_up"))
