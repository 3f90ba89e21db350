"""`/api/v1/upstreams`: the state of each registry, and whether it answers now and accepts the login."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from proxy.config import UpstreamSettings
from proxy.download.manager import DownloadManager
from proxy.errors import ProxyError, StorageError, UpstreamUnauthorizedError, error_code
from proxy.server.admin.api import AdminRequest, Route
from proxy.server.admin.status import MissingFeatureStatus, describe_features
from proxy.server.admin.traffic import TrafficSummary
from proxy.storage.records.traffic import TrafficRecords
from proxy.timestamps import to_seconds
from proxy.traffic import TrafficCounts
from proxy.upstream.client import Upstream
from proxy.upstream.offline import OfflineSwitch
from proxy.upstream.registry_report import RegistryReport


class UpstreamCheck(msgspec.Struct, frozen=True):
    """The answer of a registry: `problem` is empty if there is none, `code` is that of the error."""

    name: str
    has_login: bool
    code: str
    problem: str


class PauseStatus(msgspec.Struct, frozen=True):
    """Requests that are not sent before `until`, because the registry limits them.

    `repository` is empty for all.
    """

    repository: str
    requests: str
    until: int
    reason: str


class RegistryStatus(msgspec.Struct, frozen=True):
    """A registry or mirror; `RegistryReport` explains the fields."""

    url: str
    up: bool
    outage: str
    down_since: int | None
    retry_at: int | None
    last_success_at: int | None
    last_failure_at: int | None
    last_failure: str
    pull_limit: int | None
    pulls_left: int | None
    limit_renewed_at: int | None
    pauses: list[PauseStatus]


class UpstreamDetail(msgspec.Struct, frozen=True):
    """An upstream, which is `up` if its registry or a mirror is.

    `offline` means that the daemon asks no upstream. `downloads` are under way.
    """

    name: str
    up: bool
    offline: bool
    has_login: bool
    credentials_problem: str
    registry: RegistryStatus
    mirrors: list[RegistryStatus]
    missing_features: list[MissingFeatureStatus]
    downloads: int
    today: TrafficSummary
    week: TrafficSummary


@dataclass(frozen=True, slots=True)
class UpstreamHandlers:
    """The handlers of these routes."""

    upstreams: Mapping[str, Upstream]
    settings: Mapping[str, UpstreamSettings]
    offline: OfflineSwitch
    downloads: DownloadManager
    traffic: TrafficRecords
    write_totals: Callable[[], Awaitable[None]]

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("GET", "/api/v1/upstreams", self.list_upstreams),
            Route("POST", "/api/v1/upstreams/check", self.check, is_read=True),
        ]

    async def list_upstreams(self, _request: AdminRequest) -> list[UpstreamDetail]:
        """Return the state of each upstream, those with a problem first."""
        with suppress(StorageError):  # then the last seconds are missing
            await self.write_totals()
        running = Counter(one.source.upstream_name for one in self.downloads.running())
        found = [
            self._describe(name, upstream, running[name])
            for name, upstream in self.upstreams.items()
        ]
        return sorted(found, key=lambda one: one.up and not one.credentials_problem)

    def _describe(self, name: str, upstream: Upstream, downloads: int) -> UpstreamDetail:
        registry, *mirrors = map(_describe_registry, upstream.reports)
        today, week = self._sum_traffic(name)
        return UpstreamDetail(
            name=name,
            up=upstream.is_up,
            offline=bool(self.offline),
            has_login=_has_login(self.settings[name]),
            credentials_problem=upstream.credentials_problem,
            registry=registry,
            mirrors=mirrors,
            missing_features=describe_features(upstream),
            downloads=downloads,
            today=today,
            week=week,
        )

    def _sum_traffic(self, name: str) -> tuple[TrafficSummary, TrafficSummary]:
        """Return the traffic of an upstream today, and in the last seven days."""
        summaries = []
        for days in (1, 7):
            counts = TrafficCounts()
            with suppress(StorageError):
                for one in self.traffic.by_day(days):
                    if one.name == name:
                        counts.add(one.counts)
            summaries.append(TrafficSummary.of(counts, days=days))
        return summaries[0], summaries[1]

    async def check(self, _request: AdminRequest) -> list[UpstreamCheck]:
        """Ask each registry for the version of its API, with the configured login."""
        return await asyncio.gather(*(self._check(name) for name in self.upstreams))

    async def _check(self, name: str) -> UpstreamCheck:
        settings = self.settings[name]
        has_login = _has_login(settings)
        try:
            await self.upstreams[name].check()
        except UpstreamUnauthorizedError as error:
            # Without a login, some registries refuse this request, and let public images be pulled.
            problem = str(error) if has_login else ""
            return UpstreamCheck(name, has_login, error_code(error) if problem else "", problem)
        except ProxyError as error:
            return UpstreamCheck(name, has_login, error_code(error), str(error))
        return UpstreamCheck(name, has_login, "", "")


def _has_login(settings: UpstreamSettings) -> bool:
    return bool(settings.username or settings.credential_helper or settings.docker_config)


def _describe_registry(report: RegistryReport) -> RegistryStatus:
    return RegistryStatus(
        url=report.url,
        up=report.is_up,
        outage=report.outage_reason,
        down_since=to_seconds(report.down_since),
        retry_at=to_seconds(report.retry_at),
        last_success_at=to_seconds(report.last_success_at),
        last_failure_at=to_seconds(report.last_failure_at),
        last_failure=report.last_failure,
        pull_limit=report.pull_limit,
        pulls_left=report.pulls_left,
        limit_renewed_at=to_seconds(report.limit_renewed_at),
        pauses=[
            PauseStatus(one.repository, one.requests, to_seconds(one.until), one.reason)
            for one in report.pauses
        ],
    )
