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

from proxy.bundle.export import Exporter
from proxy.bundle.import_ import Importer
from proxy.cache.prefetch import Prefetch
from proxy.cache.pull_through import PullThrough
from proxy.cache.search import Search
from proxy.cache.tags import Listings
from proxy.concurrency import in_thread
from proxy.config import Config
from proxy.download.manager import Downloads
from proxy.images.check import Checker
from proxy.images.inspect import Inspector
from proxy.images.manage import Images
from proxy.images.tree import Contents
from proxy.metrics import Metrics
from proxy.names import Names
from proxy.oci.platform import of_machine
from proxy.preload.preload import Preloader, Tools as PreloadTools
from proxy.preload.resolve import Resolver
from proxy.server.admin import (
    bundles as admin_bundles,
    images as admin_images,
    preload as admin_preload,
    schema as admin_schema,
    search as admin_search,
    status as admin_status,
)
from proxy.server.admin.api import Route
from proxy.server.registry.handlers import Registry
from proxy.storage.blobs import LocalStore
from proxy.storage.index import Index
from proxy.storage.space import Space
from proxy.upstream.client import Upstream
from proxy.upstream.factory import Opener, is_unchanged
from proxy.upstream.offline import Offline


@dataclass(frozen=True, slots=True)
class Ground:
    """What lasts. `addresses` are filled in when they are known; `started` is by the monotonic clock."""

    store: LocalStore
    index: Index
    space: Space
    metrics: Metrics
    offline: Offline
    opener: Opener
    downloads: Downloads
    threads: ThreadPoolExecutor
    group: asyncio.TaskGroup
    clock: Callable[[], float]
    addresses: list[str] = field(default_factory=list)
    admin_addresses: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    async def check_store(self) -> None:
        """Return when the store has answered. Raises `StorageError`."""
        await in_thread(self.threads, self.store.check)
        self.index.oldest_use()


@dataclass(frozen=True, slots=True)
class Service:
    """All that a configuration decides: who is asked, what is answered, what is preloaded."""

    config: Config
    upstreams: Mapping[str, Upstream]
    registry: Registry
    preloader: Preloader
    routes: Sequence[Route]


async def make_service(ground: Ground, config: Config, before: Service | None = None) -> Service:
    """Return the service for `config`; upstreams that it leaves as they are come from the one `before`.

    Raises `ConfigError`, and has then changed nothing.
    """
    upstreams = {
        name: before.upstreams[name]
        if before and is_unchanged(name, before.config, config)
        else await ground.opener.open(config, name)
        for name in config.upstreams
    }
    downloads = ground.downloads.renewed(config.fetch, upstreams)
    cache = PullThrough(
        upstreams=upstreams,
        store=ground.store,
        index=ground.index,
        space=ground.space,
        downloads=downloads,
        settings=config.manifests,
        metrics=ground.metrics,
        threads=ground.threads,
        group=ground.group,
        clock=ground.clock,
    )
    listings = Listings(
        upstreams=upstreams,
        store=ground.store,
        index=ground.index,
        ttl=config.manifests.ttl,
        group=ground.group,
        clock=ground.clock,
    )
    search = Search(
        config=config,
        upstreams=upstreams,
        index=ground.index,
        group=ground.group,
        clock=ground.clock,
    )
    names = Names(config.upstreams)
    contents = Contents(ground.store, ground.index, ground.space, names, ground.threads)
    native = of_machine(platform.machine())
    checker = Checker(contents, native)
    preloader = Preloader(
        PreloadTools(
            cache=cache,
            downloads=downloads,
            resolver=Resolver(listings, upstreams, ground.threads),
            checker=checker,
            contents=contents,
            upstreams=upstreams,
            metrics=ground.metrics,
            native=native,
            max_downloads=config.fetch.max_downloads,
            clock=ground.clock,
        )
    )
    prefetch = Prefetch(downloads, ground.index) if config.fetch.prefetch == "layers" else None
    registry = Registry(config.upstreams, cache, listings, prefetch, search, ground.threads)
    # The routes of every feature; how to add one is said in `server/api.py`.
    routes = [
        *admin_schema.routes(),
        *_operations(ground, config, upstreams).routes(),
        *admin_bundles.Operations(Exporter(contents), Importer(contents), ground.threads).routes(),
        *admin_images.Operations(Images(contents), checker, Inspector(contents)).routes(),
        *admin_preload.Operations(preloader).routes(),
        *admin_search.routes(search),
    ]
    return Service(config, upstreams, registry, preloader, routes)


def _operations(
    ground: Ground, config: Config, upstreams: Mapping[str, Upstream]
) -> admin_status.Operations:
    return admin_status.Operations(
        config,
        upstreams,
        ground.space,
        ground.downloads,
        ground.metrics,
        ground.offline,
        ground.check_store,
        ground.addresses,
        ground.admin_addresses,
        ground.started,
    )
