"""The composition root: a configuration becomes objects, servers and their end.

`open_cache` is the only way to build the program; the daemon and every test use it.
"""

import asyncio
import platform
import signal
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
from aiohttp.web import ServerRunner, TCPSite

from proxy import __version__
from proxy.cache.checking import Checker
from proxy.cache.contents import Contents
from proxy.cache.download import Tools
from proxy.cache.downloads import Downloads
from proxy.cache.eviction import Space
from proxy.cache.exporting import Exporter
from proxy.cache.filling import Disk
from proxy.cache.images import Images
from proxy.cache.importing import Importer
from proxy.cache.inspection import Inspector
from proxy.cache.listings import Listings
from proxy.cache.naming import Names
from proxy.cache.prefetch import Prefetch
from proxy.cache.preload import Preloader, Tools as PreloadTools
from proxy.cache.pull_through import PullThrough
from proxy.cache.resolving import Resolver
from proxy.cache.schedules import Schedules
from proxy.cache.search import Search
from proxy.cache.slots import Slots
from proxy.config import Config
from proxy.errors import ConfigError, StorageError
from proxy.flight import in_thread
from proxy.log import Log, configure, get_logger
from proxy.metrics import Metrics
from proxy.oci.platform import of_machine
from proxy.server import (
    api_bundles,
    api_door,
    api_images,
    api_preload,
    api_schema,
    api_search,
    api_status,
)
from proxy.server.admin import Admin
from proxy.server.api import Api, Route
from proxy.server.http import HttpServer
from proxy.server.middleware import Middleware
from proxy.server.registry import Registry
from proxy.storage.index import Index
from proxy.storage.local import LocalStore
from proxy.upstream.offline import Offline
from proxy.upstream.opening import open_upstream

# How often uses are written, and how often idle content is looked for, in seconds.
FLUSH_INTERVAL = 5.0
SWEEP_INTERVAL = 60.0
# How long answers that are being sent may go on after a SIGTERM, in seconds: less than the ten after
# which `docker stop` kills. Who is cut off resumes by range.
DRAIN_TIMEOUT = 8.0

# Threads for the disk; DNS has the loop's own.
DISK_THREADS = 8

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Listening:
    """What is known once the daemon serves. Addresses are `host:port`, sizes bytes.

    `routes` are the methods and paths of the admin API.
    """

    addresses: list[str]
    store: Path
    max_size: int
    used: int
    upstreams: dict[str, str]
    admin_addresses: list[str] = field(default_factory=list)
    routes: list[tuple[str, str]] = field(default_factory=list)


class _Shutdown(Exception):  # noqa: N818 (it ends the task group, and is no error)
    """The daemon is to end."""


def run(config: Config, announce: Callable[[Listening], None]) -> None:
    """Serve until SIGTERM or SIGINT. `announce` is called once, when clients can connect.

    Raises `StorageError` and `ConfigError`.
    """
    access_log = configure(config.log.level, config.log.format)
    try:
        uvloop.run(_serve(config, announce, access_log))
    finally:
        access_log.close()


async def _serve(config: Config, announce: Callable[[Listening], None], access_log: Log) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with open_cache(config, access_log=access_log) as listening:
        announce(listening)
        log.info("serving", addresses=listening.addresses, version=__version__)
        await stop.wait()
        log.info("stopping")


@asynccontextmanager
async def open_cache(
    config: Config,
    *,
    clock: Callable[[], float] = time.time,
    access_log: Log | None = None,
) -> AsyncIterator[Listening]:
    """Build the program, serve for as long as the context lasts, and end it in order.

    Needs no network. `clock` tells Unix time. Raises `StorageError` and `ConfigError`.
    """
    async with AsyncExitStack() as stack:
        # What is opened first is closed last: the store outlives those who write to it.
        threads = ThreadPoolExecutor(DISK_THREADS, thread_name_prefix="disk")
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
        upstreams = {
            name: await open_upstream(sessions, config, name, offline, metrics, group, clock)
            for name in config.upstreams
        }
        tools = Tools(
            disk=Disk(store, index, space, metrics, threads),
            slots=Slots(config.fetch.max_downloads),
            settings=config.fetch,
        )
        downloads = Downloads(tools, upstreams, group)
        cache = PullThrough(
            upstreams=upstreams,
            store=store,
            index=index,
            space=space,
            downloads=downloads,
            settings=config.manifests,
            metrics=metrics,
            threads=threads,
            group=group,
            clock=clock,
        )
        listings = Listings(
            upstreams=upstreams,
            store=store,
            index=index,
            ttl=config.manifests.ttl,
            group=group,
            clock=clock,
        )
        search = Search(config=config, upstreams=upstreams, index=index, group=group, clock=clock)
        metrics.watch(_Gauges(space, index, downloads))

        async def check_store() -> None:
            await in_thread(threads, store.check)
            index.oldest_use()

        prefetch = Prefetch(downloads, index) if config.fetch.prefetch == "layers" else None
        registry = Registry(config.upstreams, cache, listings, prefetch, search, threads)
        admin = Admin(metrics, check_store, threads)
        addresses = await _listen(stack, config, Middleware(registry, admin, metrics, access_log))
        admin_addresses: list[str] = []
        operations = api_status.Operations(
            config,
            upstreams,
            space,
            downloads,
            metrics,
            offline,
            check_store,
            addresses,
            admin_addresses,
        )
        contents = Contents(store, index, space, Names(config.upstreams), threads)
        native = of_machine(platform.machine())
        checker = Checker(contents, native)
        preloader = Preloader(
            PreloadTools(
                cache=cache,
                downloads=downloads,
                resolver=Resolver(listings, upstreams, threads),
                checker=checker,
                contents=contents,
                upstreams=upstreams,
                metrics=metrics,
                native=native,
                max_downloads=config.fetch.max_downloads,
                clock=clock,
            )
        )
        routes = [
            *api_schema.routes(),
            *operations.routes(),
            *_image_routes(contents, checker, preloader),
            *api_search.routes(search),
        ]
        api = Api(routes, metrics, access_log)
        admin_addresses += await api_door.listen(stack, store.root, config.server, api, admin)
        group.create_task(_keep_house(space, index, config))
        Schedules(preloader, offline, metrics, threads, clock).start(group, config.preload)
        yield Listening(
            addresses,
            store.root,
            space.max_size,
            space.stored,
            {name: str(settings.url) for name, settings in config.upstreams.items()},
            admin_addresses,
            api.routes,
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


def _image_routes(contents: Contents, checker: Checker, preloader: Preloader) -> list[Route]:
    """Return what the admin API does with images; how a route is added is said in `server/api.py`."""
    catalogue = api_images.Operations(Images(contents), checker, Inspector(contents))
    bundles = api_bundles.Operations(Exporter(contents), Importer(contents), contents.threads)
    preload = api_preload.Operations(preloader)
    return [*bundles.routes(), *catalogue.routes(), *preload.routes()]


async def _listen(stack: AsyncExitStack, config: Config, handler: Middleware) -> list[str]:
    """Open the listeners. Returns their real addresses. Raises `ConfigError`."""
    # What is still being sent after the drain is cut: aiohttp would wait as long again, twice.
    runner = ServerRunner(HttpServer(handler), shutdown_timeout=0.1)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    stack.push_async_callback(_stop_listening, runner, handler)
    for address in config.server.listen:
        site = TCPSite(runner, address.host or None, address.port, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"server.listen: {address} cannot be used ({error.strerror}); "
                "stop what uses it, or choose another with --listen"
            ) from error
    return [_text(address) for address in runner.addresses]


async def _stop_listening(runner: ServerRunner, handler: Middleware) -> None:
    """Let nobody in any more, and those who are in finish."""
    for site in list(runner.sites):
        await site.stop()
    await handler.drain(DRAIN_TIMEOUT)


def _text(address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _keep_house(space: Space, index: Index, config: Config) -> None:
    """Write uses, and remove what is idle, from time to time."""
    loop = asyncio.get_running_loop()
    swept = 0.0
    while True:
        try:
            await index.flush()
            if loop.time() - swept > SWEEP_INTERVAL:
                swept = loop.time()
                await space.sweep(
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
