"""The core: the objects that live as long as the daemon, across reloads.

It is the store with its index, the downloads, the factory of upstreams, the metrics and the group
of all background tasks.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from proxy import __version__
from proxy.concurrency import run_in_thread, start_threads
from proxy.conditions import report_entry
from proxy.config import Config, FleetSettings, StatisticsSettings
from proxy.contents.process import ContentsWorker
from proxy.download.manager import DownloadManager
from proxy.download.writer import StorageDeps
from proxy.errors import StorageError
from proxy.fleet.directory import Directory
from proxy.fleet.opening import open_directory
from proxy.fleet.transfers import PeerTransfers
from proxy.images.table import ImageTableKeeper
from proxy.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.parsing import DocumentParser
from proxy.repository_rules import RepositoryRules
from proxy.server.activity.downloads import DownloadMonitor
from proxy.server.pages.links import PageLinks
from proxy.server.pages.sessions import SessionStore
from proxy.server.pulls import PullTracker
from proxy.storage.blobs import BlobStore
from proxy.storage.index import Index
from proxy.storage.records.contents import ContentsRecords
from proxy.storage.records.policies import PolicyRecords
from proxy.storage.records.traffic import TrafficRecords
from proxy.storage.records.trail import AuditTrail
from proxy.storage.scrub import Scrubber
from proxy.storage.space import SpaceManager
from proxy.upstream.factory import UpstreamFactory
from proxy.upstream.offline import OfflineSwitch
from proxy.upstream.peers import (
    PeerClient,
    create_peer_tls_context,
    fleet_token,
    open_peer_session,
)
from proxy.upstream.webhook import Webhook

# Threads for disk I/O; name lookups have the threads of the loop.
DISK_THREADS = 8


@dataclass(frozen=True, slots=True)
class Core:
    """The objects of the core. The addresses are added once the servers listen.

    `clock` returns Unix time; `started_at` is by the monotonic clock. `daemon_id` tells upstream caches
    apart (`proxy/hops.py`).
    """

    store: BlobStore
    index: Index
    policy_records: PolicyRecords
    traffic_records: TrafficRecords
    pulls: PullTracker
    monitor: DownloadMonitor
    trail: AuditTrail
    webhook: Webhook
    space: SpaceManager
    scrubber: Scrubber
    metrics: Metrics
    offline: OfflineSwitch
    upstream_factory: UpstreamFactory
    downloads: DownloadManager
    directory: Directory
    peer_transfers: PeerTransfers
    peers: PeerClient | None
    disk_threads: ThreadPoolExecutor
    parser: DocumentParser
    contents_worker: ContentsWorker
    contents_records: ContentsRecords
    group: asyncio.TaskGroup
    clock: Callable[[], float]
    daemon_id: str
    page_links: PageLinks
    image_tables: ImageTableKeeper
    addresses: list[str] = field(default_factory=list)
    admin_addresses: list[str] = field(default_factory=list)
    started_at: float = field(default_factory=time.monotonic)

    async def check_store(self) -> None:
        """Raise `StorageError` if the store or its index cannot be used."""
        await run_in_thread(self.disk_threads, self.store.check_writable)
        await self.index.check_usable()

    async def write_traffic(self, settings: StatisticsSettings) -> None:
        """Write what was counted of clients' pulls to the index. Raises `StorageError`."""
        self.pulls.settle()
        await self.traffic_records.write(
            max_size=self.space.max_size, keeps_clients=settings.clients
        )


async def open_core(stack: AsyncExitStack, config: Config, clock: Callable[[], float]) -> Core:
    """Open the store and the objects that use it; the stack closes them in reverse order.

    Raises `StorageError` and `ConfigError`.
    """
    threads = start_threads(DISK_THREADS, "disk")
    stack.callback(threads.shutdown)
    parser = DocumentParser()
    stack.callback(parser.close)
    contents_worker = ContentsWorker()
    stack.callback(contents_worker.close)
    store = BlobStore(config.store.path, group_access=config.store.group_access)
    stack.callback(store.close)
    index = Index(store.root / "index.sqlite", clock)
    stack.callback(index.close)
    metrics = Metrics(config.upstreams, __version__, clock)
    space = SpaceManager(
        store,
        index,
        metrics,
        max_size=config.store.max_size.to_bytes(store.total_bytes()),
        min_free=config.store.min_free,
        clock=clock,
    )
    space.set_rules(RepositoryRules(config))
    await space.open()
    scrubber = Scrubber(store, index, space, metrics, clock)
    stack.callback(scrubber.close)
    daemon_id = secrets.token_hex(8)
    # Entered before the group, so that downloads that are cancelled can still be taken from the directory.
    directory = await stack.enter_async_context(
        open_directory(
            # A command without a daemon serves no other node.
            config.fleet if config.server.listen else FleetSettings(),
            metrics,
            instance=daemon_id,
            version=__version__,
            list_holdings=partial(_list_blobs, index),
        )
    )
    space.on_stored = directory.add_holdings
    space.on_removed = directory.remove_holdings
    # Entered before the group, so that the sessions of upstreams outlive the tasks that use them.
    sessions = await stack.enter_async_context(AsyncExitStack())
    group = await stack.enter_async_context(_background_tasks())
    image_tables = ImageTableKeeper(group)
    sessions.callback(image_tables.close)
    offline = OfflineSwitch(config.offline)
    peers = await _open_peers(sessions, config, directory, metrics, daemon_id)
    upstream_factory = UpstreamFactory(
        metrics, offline, parser, group, clock, daemon_id, directory if peers else None
    )
    sessions.push_async_callback(upstream_factory.close)
    group.create_task(upstream_factory.close_unused())
    group.create_task(index.check_integrity(threads))
    storage = StorageDeps(store, index, space, metrics, threads, open_ingests=set())
    downloads = DownloadManager(storage, config.fetch, group, peers)
    metrics.register_gauges(_LiveGauges(space, index, scrubber, downloads))
    webhook = Webhook(config.notify, offline, metrics, clock)
    group.create_task(webhook.run())
    stack.push_async_callback(webhook.drain)
    stack.callback(contents_worker.stop)  # tasks of the group wait for it
    trail = AuditTrail(index, space.evictions, clock, lambda: space.max_size)
    trail.on_record = partial(report_entry, webhook)
    return Core(
        store=store,
        index=index,
        policy_records=PolicyRecords(index),
        traffic_records=TrafficRecords(index, metrics.traffic),
        pulls=PullTracker(metrics, index, downloads.age, clock),
        monitor=DownloadMonitor(downloads),
        trail=trail,
        webhook=webhook,
        space=space,
        scrubber=scrubber,
        metrics=metrics,
        offline=offline,
        upstream_factory=upstream_factory,
        downloads=downloads,
        directory=directory,
        peer_transfers=PeerTransfers(config.fleet.children),
        peers=peers,
        disk_threads=threads,
        parser=parser,
        contents_worker=contents_worker,
        contents_records=ContentsRecords(index, space, clock),
        group=group,
        clock=clock,
        daemon_id=daemon_id,
        page_links=PageLinks(SessionStore()),
        image_tables=image_tables,
    )


async def _open_peers(
    stack: AsyncExitStack, config: Config, directory: Directory, metrics: Metrics, daemon_id: str
) -> PeerClient | None:
    """Return the client for the other nodes of the fleet; None without a fleet, or for a command."""
    if not (config.fleet.is_on and config.server.listen):
        return None
    token = await asyncio.to_thread(config.fleet.read_token)
    tls = await asyncio.to_thread(create_peer_tls_context, config.fleet)
    return PeerClient(
        await stack.enter_async_context(open_peer_session(tls)),
        directory,
        metrics,
        token=fleet_token(config.fleet, token),
        node_id=daemon_id,
        stall_timeout=config.fleet.stall_timeout,
        min_rate=config.fetch.min_rate,
        min_rate_window=2 * config.fetch.stall_timeout,
    )


def _list_blobs(index: Index, after: str, count: int) -> list[Digest]:
    """Return the stored digests that follow one; none while the index cannot be read."""
    try:
        return [digest for digest, _ in index.blobs_after(after, count)]
    except StorageError:
        return []


class _Shutdown(Exception):  # noqa: N818 (not an error: it cancels the tasks of the group)
    """Ends the group of background tasks."""


@asynccontextmanager
async def _background_tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """Yield the group of all background tasks; at the end cancel them, and wait for them.

    An exception of the block is raised as it is, and not in an exception group.
    """
    failure: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            try:
                yield group
            except BaseException as error:  # noqa: BLE001 (raised below, outside the group)
                failure = error
            raise _Shutdown
    except BaseExceptionGroup as ended:
        _, crashes = ended.split(_Shutdown)
        if crashes is not None:
            raise crashes from None
    if failure is not None:
        raise failure


@dataclass(frozen=True, slots=True)
class _LiveGauges:
    """Reads the gauges of the metrics from the objects of the core."""

    space: SpaceManager
    index: Index
    scrubber: Scrubber
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
    def scrub_late_seconds(self) -> float:
        return self.scrubber.late_seconds

    @property
    def index_damaged(self) -> int:
        return self.index.is_damaged

    @property
    def downloads_in_progress(self) -> int:
        return len(self.downloads)
