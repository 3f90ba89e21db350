"""`/api/v1/status` and `/api/v1/offline`: the state of the daemon, and its offline switch."""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from proxy import __version__
from proxy.config import Config
from proxy.download.manager import DownloadManager
from proxy.errors import StorageError
from proxy.log import get_logger
from proxy.metrics import CacheState, Metrics
from proxy.server.admin.api import AdminRequest, RequestModel, Route
from proxy.server.admin.traffic import TrafficSummary, summarize_periods
from proxy.storage.records.traffic import TrafficRecords
from proxy.storage.records.trail import Action, AuditTrail
from proxy.storage.scrub import Scrubber
from proxy.storage.space import SpaceManager
from proxy.timestamps import to_seconds
from proxy.upstream.client import Upstream
from proxy.upstream.features import Feature
from proxy.upstream.offline import OfflineSwitch

DaemonState = Literal["serving", "offline", "degraded"]

log = get_logger(__name__)


class MissingFeatureStatus(msgspec.Struct, frozen=True):
    """A feature that `repositories` lack, until `retry_at` (Unix time) at least."""

    feature: Feature
    repositories: int
    retry_at: int


class UpstreamStatus(msgspec.Struct, frozen=True):
    """One upstream. `problem` is why it is down, or rejects the credentials; limits count pulls, None if unknown.

    `retry_at` is when it is asked again, None while it is up; `ratelimit_renewed_at` is when pulls are
    allowed again, None if unknown. Both are Unix time.
    """

    name: str
    url: str
    up: bool
    problem: str
    ratelimit_limit: int | None
    ratelimit_remaining: int | None
    ratelimit_renewed_at: int | None
    retry_at: int | None
    missing_features: list[MissingFeatureStatus]


class StoreStatus(msgspec.Struct, frozen=True):
    """The store, in bytes; `problem` is why it cannot be used, empty if it can."""

    path: str
    used: int
    limit: int
    reserved: int
    pinned: int
    blobs: int
    problem: str


class ScrubStatus(msgspec.Struct, frozen=True):
    """The scrub. `period` is in seconds, 0 if it is disabled; `progress` is the share of a round.

    `started_at` is when the round began, `finished_at` when the one before ended, in Unix time;
    `damaged` are the blobs found in this round.
    """

    period: int
    progress: float
    started_at: int
    finished_at: int | None
    damaged: int


class ServedCounts(msgspec.Struct, frozen=True):
    """Manifests and blobs served with one cache state."""

    requests: int
    bytes: int


class DaemonStatus(msgspec.Struct, frozen=True):
    """The state of the daemon. `uptime` is in seconds; with `is_tls`, clients pull by https.

    `traffic` has today, 7 and 30 days. The other counts begin at the start of the daemon: `saved_bytes`
    are the bytes sent to clients minus the bytes from upstream, `hit_ratio` is the share of the former
    that was not fetched for clients, None before the first byte.
    """

    state: DaemonState
    version: str
    uptime: int
    addresses: Sequence[str]
    admin_addresses: Sequence[str]
    is_tls: bool
    offline: bool
    store: StoreStatus
    scrub: ScrubStatus
    upstreams: list[UpstreamStatus]
    downloads: int
    served: Mapping[CacheState, ServedCounts]
    hit_ratio: float | None
    saved_bytes: int
    traffic: list[TrafficSummary]


class OfflineState(RequestModel, frozen=True):
    """Whether the daemon is offline, or should be."""

    offline: bool


@dataclass(frozen=True, slots=True)
class StatusHandlers:
    """The handlers of these routes."""

    config: Config
    upstreams: Mapping[str, Upstream]
    space: SpaceManager
    scrubber: Scrubber
    downloads: DownloadManager
    metrics: Metrics
    offline: OfflineSwitch
    check_store: Callable[[], Awaitable[None]]
    addresses: Sequence[str]
    admin_addresses: Sequence[str]
    traffic: TrafficRecords
    write_totals: Callable[[], Awaitable[None]]
    trail: AuditTrail
    started_at: float = field(default_factory=time.monotonic)

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("GET", "/api/v1/status", self.status),
            Route("GET", "/api/v1/offline", self.get_offline),
            Route("PUT", "/api/v1/offline", self.set_offline),
        ]

    async def status(self, _request: AdminRequest) -> DaemonStatus:
        """Return the state of the daemon."""
        store, upstreams = await self._store_status(), self._upstream_statuses()
        served = {
            state: ServedCounts(requests, byte_count)
            for state, (requests, byte_count) in self.metrics.served_totals().items()
            if requests
        }
        sent = sum(counts.bytes for counts in served.values())
        fetched = self.metrics.received_bytes(for_clients=True)
        saved = max(0, sent - self.metrics.received_bytes(for_clients=False))
        return DaemonStatus(
            state=_daemon_state(self.offline, store, upstreams),
            version=__version__,
            uptime=int(time.monotonic() - self.started_at),
            addresses=self.addresses,
            admin_addresses=self.admin_addresses,
            is_tls=bool(self.config.server.tls_certificate),
            offline=bool(self.offline),
            store=store,
            scrub=self._scrub_status(),
            upstreams=upstreams,
            downloads=len(self.downloads),
            served=served,
            hit_ratio=max(0.0, 1 - fetched / sent) if sent else None,
            saved_bytes=saved,
            traffic=await self._traffic(),
        )

    async def get_offline(self, _request: AdminRequest) -> OfflineState:
        """Return whether the daemon is offline."""
        return OfflineState(offline=bool(self.offline))

    async def set_offline(self, request: AdminRequest) -> OfflineState:
        """Go offline or online, for all upstreams at once and until the daemon stops."""
        new_state = await request.read_json(OfflineState)
        if new_state.offline != bool(self.offline):
            log.info("offline_enabled" if new_state.offline else "offline_disabled")
            action: Action = "offline" if new_state.offline else "online"
            async with self.trail.recording(action, request.actor):
                self.offline.set_offline(is_offline=new_state.offline)
        return new_state

    async def _store_status(self) -> StoreStatus:
        problem = ""
        try:
            await self.check_store()
        except StorageError as error:
            problem = str(error)
        return StoreStatus(
            path=str(self.config.store.path),
            used=self.space.stored_bytes,
            limit=self.space.max_size,
            reserved=self.space.reserved_bytes,
            pinned=self.space.pinned_bytes,
            blobs=self.space.blob_count,
            problem=problem,
        )

    async def _traffic(self) -> list[TrafficSummary]:
        try:
            await self.write_totals()
            return summarize_periods(self.traffic)
        except StorageError:  # `problem` of the store says why
            return []

    def _scrub_status(self) -> ScrubStatus:
        state = self.scrubber.state
        return ScrubStatus(
            period=int(self.config.store.scrub),
            progress=self.scrubber.progress,
            started_at=to_seconds(state.started_at),
            finished_at=to_seconds(state.finished_at or None),
            damaged=state.damaged,
        )

    def _upstream_statuses(self) -> list[UpstreamStatus]:
        return [
            UpstreamStatus(
                name=name,
                url=str(self.config.upstreams[name].url),
                up=not upstream.outage_reason,
                problem=upstream.outage_reason or upstream.credentials_problem,
                ratelimit_limit=upstream.pull_quota[0],
                ratelimit_remaining=upstream.pull_quota[1],
                ratelimit_renewed_at=to_seconds(upstream.pulls_renewed_at),
                retry_at=to_seconds(upstream.retry_at),
                missing_features=describe_features(upstream),
            )
            for name, upstream in self.upstreams.items()
        ]


def describe_features(upstream: Upstream) -> list[MissingFeatureStatus]:
    """Return what the registry was recently found unable to do."""
    return [
        MissingFeatureStatus(one.feature, one.repositories, to_seconds(one.retry_at))
        for one in upstream.missing_features
    ]


def _daemon_state(
    is_offline: object, store: StoreStatus, upstreams: list[UpstreamStatus]
) -> DaemonState:
    if store.problem:
        return "degraded"
    if is_offline:
        return "offline"
    return "serving" if all(upstream.up for upstream in upstreams) else "degraded"
