"""`/api/v1/status` and `/api/v1/offline`: how the daemon is, and the switch that keeps it from dialling out."""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from proxy import __version__
from proxy.config import Config
from proxy.download.manager import Downloads
from proxy.errors import StorageError
from proxy.log import get_logger
from proxy.metrics import CacheState, Metrics
from proxy.server.admin.api import Call, Input, Route
from proxy.storage.space import Space
from proxy.upstream.client import Upstream
from proxy.upstream.offline import Offline

State = Literal["serving", "offline", "degraded"]

log = get_logger(__name__)


class UpstreamStatus(msgspec.Struct, frozen=True):
    """One registry. `problem` is why it is left alone; the numbers are pulls, None if it does not say."""

    name: str
    url: str
    up: bool
    problem: str
    ratelimit_limit: int | None
    ratelimit_remaining: int | None


class StoreStatus(msgspec.Struct, frozen=True):
    """The store, in bytes. `problem` is why it cannot be used, empty if it can."""

    path: str
    used: int
    limit: int
    reserved: int
    pinned: int
    blobs: int
    problem: str


class Served(msgspec.Struct, frozen=True):
    """Manifests and blobs of one cache state."""

    requests: int
    bytes: int


class Status(msgspec.Struct, frozen=True):
    """The whole screen. `uptime` is seconds; what was served is counted since the start.

    `saved_bytes` are what clients got less what upstream sent, and `hit_ratio` is their share, None before the first.
    """

    state: State
    version: str
    uptime: float
    addresses: Sequence[str]
    admin_addresses: Sequence[str]
    offline: bool
    store: StoreStatus
    upstreams: list[UpstreamStatus]
    downloads: int
    served: Mapping[CacheState, Served]
    hit_ratio: float | None
    saved_bytes: int


class OfflineState(Input, frozen=True):
    """Whether the daemon is offline, or is to be."""

    offline: bool


@dataclass(frozen=True, slots=True)
class Operations:
    """What these routes look at."""

    config: Config
    upstreams: Mapping[str, Upstream]
    space: Space
    downloads: Downloads
    metrics: Metrics
    offline: Offline
    check_store: Callable[[], Awaitable[None]]
    addresses: Sequence[str]
    admin_addresses: Sequence[str]
    started: float = field(default_factory=time.monotonic)

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("GET", "/api/v1/status", self.status),
            Route("GET", "/api/v1/offline", self.is_offline),
            Route("PUT", "/api/v1/offline", self.switch),
        ]

    async def status(self, _call: Call) -> Status:
        """Say how the daemon is."""
        store, upstreams = await self._store(), self._upstreams()
        served = {
            state: Served(requests, sent)
            for state, (requests, sent) in self.metrics.served().items()
            if requests
        }
        sent = sum(one.bytes for one in served.values())
        saved = max(0, sent - self.metrics.received())
        return Status(
            state=_state(self.offline, store, upstreams),
            version=__version__,
            uptime=time.monotonic() - self.started,
            addresses=self.addresses,
            admin_addresses=self.admin_addresses,
            offline=bool(self.offline),
            store=store,
            upstreams=upstreams,
            downloads=len(self.downloads),
            served=served,
            hit_ratio=saved / sent if sent else None,
            saved_bytes=saved,
        )

    async def is_offline(self, _call: Call) -> OfflineState:
        """Say whether it is offline."""
        return OfflineState(offline=bool(self.offline))

    async def switch(self, call: Call) -> OfflineState:
        """Go offline or online, for all upstreams at once and until the daemon ends."""
        wanted = await call.document(OfflineState)
        if wanted.offline != bool(self.offline):
            log.info("offline" if wanted.offline else "online")
            self.offline.switch(is_on=wanted.offline)
        return wanted

    async def _store(self) -> StoreStatus:
        problem = ""
        try:
            await self.check_store()
        except StorageError as error:
            problem = str(error)
        return StoreStatus(
            path=str(self.config.store.path),
            used=self.space.stored,
            limit=self.space.max_size,
            reserved=self.space.reserved,
            pinned=self.space.pinned,
            blobs=self.space.blobs,
            problem=problem,
        )

    def _upstreams(self) -> list[UpstreamStatus]:
        return [
            UpstreamStatus(
                name=name,
                url=str(self.config.upstreams[name].url),
                up=not upstream.outage,
                problem=upstream.outage,
                ratelimit_limit=upstream.pulls[0],
                ratelimit_remaining=upstream.pulls[1],
            )
            for name, upstream in self.upstreams.items()
        ]


def _state(is_offline: object, store: StoreStatus, upstreams: list[UpstreamStatus]) -> State:
    if store.problem:
        return "degraded"
    if is_offline:
        return "offline"
    return "serving" if all(upstream.up for upstream in upstreams) else "degraded"
