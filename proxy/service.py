"""What is made of a configuration, and made anew when that changes.

The *ground* lasts as long as the daemon: what lies on the disk, what is known of it, what is under way.
A *service* stands on it and never changes. A reload makes another and puts it in the place of the old one;
requests, downloads and operations end with the service that they began with.
"""

import asyncio
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from proxy.bundle.export import BundleExporter
from proxy.bundle.import_ import BundleImporter
from proxy.cache.listings import ListingCache
from proxy.cache.prefetch import Prefetcher
from proxy.cache.pull_through import PullThroughCache
from proxy.cache.search import RepositorySearch
from proxy.concurrency import run_in_thread
from proxy.config import Config
from proxy.download.manager import DownloadManager
from proxy.images.check import OfflineChecker
from proxy.images.inspect import ImageInspector
from proxy.images.manage import ImageManager
from proxy.images.tree import ImageStore
from proxy.metrics import Metrics
from proxy.names import NameParser
from proxy.oci.platform import machine_platform
from proxy.preload.preload import PreloadDeps as PreloadTools, Preloader
from proxy.preload.resolve import ImageResolver
from proxy.server.admin import (
    bundles as admin_bundles,
    images as admin_images,
    preload as admin_preload,
    schema as admin_schema,
    search as admin_search,
    status as admin_status,
)
from proxy.server.admin.api import Route
from proxy.server.registry.handlers import RegistryHandler
from proxy.storage.blobs import BlobStore
from proxy.storage.index import Index
from proxy.storage.space import SpaceManager
from proxy.upstream.client import Upstream
from proxy.upstream.factory import UpstreamFactory, is_unchanged
from proxy.upstream.offline import OfflineSwitch


@dataclass(frozen=True, slots=True)
class Core:
    """What lasts. `addresses` are filled in when they are known; `started` is by the monotonic clock."""

    store: BlobStore
    index: Index
    space: SpaceManager
    metrics: Metrics
    offline: OfflineSwitch
    upstream_factory: UpstreamFactory
    downloads: DownloadManager
    disk_threads: ThreadPoolExecutor
    group: asyncio.TaskGroup
    clock: Callable[[], float]
    addresses: list[str] = field(default_factory=list)
    admin_addresses: list[str] = field(default_factory=list)
    started_at: float = field(default_factory=time.monotonic)

    async def check_store(self) -> None:
        """Return when the store has answered. Raises `StorageError`."""
        await run_in_thread(self.disk_threads, self.store.check_writable)
        self.index.oldest_use()


@dataclass(frozen=True, slots=True)
class ConfiguredApp:
    """All that a configuration decides: who is asked, what is answered, what is preloaded."""

    config: Config
    upstreams: Mapping[str, Upstream]
    registry: RegistryHandler
    preloader: Preloader
    routes: Sequence[Route]


async def configure_app(
    core: Core, config: Config, previous: ConfiguredApp | None = None
) -> ConfiguredApp:
    """Return the service for `config`; upstreams that it leaves as they are come from the one `before`.

    Raises `ConfigError`, and has then changed nothing.
    """
    upstreams = {
        name: previous.upstreams[name]
        if previous and is_unchanged(name, previous.config, config)
        else await core.upstream_factory.open(config, name)
        for name in config.upstreams
    }
    cache = PullThroughCache(
        upstreams=upstreams,
        store=core.store,
        index=core.index,
        space=core.space,
        downloads=core.downloads,
        settings=config.manifests,
        fetch_settings=config.fetch,
        metrics=core.metrics,
        executor=core.disk_threads,
        group=core.group,
        clock=core.clock,
    )
    listings = ListingCache(
        upstreams=upstreams,
        store=core.store,
        index=core.index,
        ttl=config.manifests.ttl,
        group=core.group,
        clock=core.clock,
    )
    search = RepositorySearch(
        config=config,
        upstreams=upstreams,
        index=core.index,
        group=core.group,
        clock=core.clock,
    )
    names = NameParser(config.upstreams)
    contents = ImageStore(core.store, core.index, core.space, names, core.disk_threads)
    native = machine_platform(platform.machine())
    checker = OfflineChecker(contents, native)
    preloader = Preloader(
        PreloadTools(
            cache=cache,
            downloads=core.downloads,
            resolver=ImageResolver(listings, upstreams, core.disk_threads),
            checker=checker,
            image_store=contents,
            upstreams=upstreams,
            metrics=core.metrics,
            native_platform=native,
            fetch_settings=config.fetch,
            clock=core.clock,
        )
    )
    prefetch = (
        Prefetcher(core.downloads, core.index, upstreams, config.fetch)
        if config.fetch.prefetch == "layers"
        else None
    )
    registry = RegistryHandler(config.upstreams, cache, listings, prefetch, search)
    # The routes of every feature; `server/admin/api.py` says how to add one.
    routes = [
        *admin_schema.routes(),
        *_status_handlers(core, config, upstreams).routes(),
        *admin_bundles.BundleHandlers(
            BundleExporter(contents), BundleImporter(contents), core.disk_threads
        ).routes(),
        *admin_images.ImageHandlers(
            ImageManager(contents), checker, ImageInspector(contents)
        ).routes(),
        *admin_preload.PreloadHandlers(preloader).routes(),
        *admin_search.routes(search),
    ]
    return ConfiguredApp(config, upstreams, registry, preloader, routes)


def _status_handlers(
    core: Core, config: Config, upstreams: Mapping[str, Upstream]
) -> admin_status.StatusHandlers:
    return admin_status.StatusHandlers(
        config,
        upstreams,
        core.space,
        core.downloads,
        core.metrics,
        core.offline,
        core.check_store,
        core.addresses,
        core.admin_addresses,
        core.started_at,
    )
