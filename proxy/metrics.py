"""All metrics of the program, and their text format.

The values of labels are bounded: upstreams and numbers of policies come from the configuration, most
other labels have the types below, and repositories are never labels. Children of hot counters are cached, because
`labels()` costs more than counting.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import accumulate
from typing import Any, Literal, Protocol, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from proxy.traffic import PullResult, Purpose, TrafficTally

RequestKind = Literal[
    "manifest", "blob", "tags", "referrers", "search", "facts", "catalog", "ping", "other"
]
CacheState = Literal["hit", "miss", "collapsed", "peer", "stale", "revalidated", "bypass", "none"]
DownloadResult = Literal["stored", "failed", "mismatch", "bypass"]
DownloadSource = Literal["upstream", "peer"]
PeerResult = Literal["whole", "growing", "unknown", "failed"]
PeerDirection = Literal["in", "out"]
FailoverReason = Literal["refused", "stalled", "broken", "wrong"]
EvictionReason = Literal["size", "min_free", "quota", "index_full", "idle", "corrupt", "removed"]
UncachedReason = Literal["too_large", "no_space", "pinned", "index_full", "disk_error"]
NotificationResult = Literal["sent", "failed", "dropped"]
FleetOperation = Literal[
    "beat", "members", "locate", "renew", "finish", "holdings", "tag", "limit", "lead"
]
FleetSource = Literal["peer", "upstream", "duplicate"]
FleetResult = Literal["ok", "failed", "blind"]
ScrubResult = Literal["intact", "corrupt", "missing", "unreadable"]

# Series that exist from the start, so that `rate()` sees the first increment.
_INITIAL_SERIES: tuple[tuple[RequestKind, tuple[CacheState, ...]], ...] = (
    ("manifest", ("hit", "miss", "collapsed", "peer", "revalidated", "stale", "bypass")),
    ("blob", ("hit", "miss", "collapsed", "peer", "bypass")),
)
_DOWNLOAD_RESULTS: tuple[DownloadResult, ...] = ("stored", "failed", "mismatch", "bypass")
_DOWNLOAD_SOURCES: tuple[DownloadSource, ...] = get_args(DownloadSource)
_PEER_RESULTS: tuple[PeerResult, ...] = get_args(PeerResult)
_PEER_DIRECTIONS: tuple[PeerDirection, ...] = get_args(PeerDirection)
_FAILOVER_REASONS: tuple[FailoverReason, ...] = get_args(FailoverReason)
_EVICTION_REASONS: tuple[EvictionReason, ...] = get_args(EvictionReason)
_UNCACHED_REASONS: tuple[UncachedReason, ...] = get_args(UncachedReason)
_SCRUB_RESULTS: tuple[ScrubResult, ...] = get_args(ScrubResult)
_NOTIFICATION_RESULTS: tuple[NotificationResult, ...] = get_args(NotificationResult)
_PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
_PULL_RESULTS: tuple[PullResult, ...] = get_args(PullResult)
# Bytes that clients have caused, and not preloads or repairs.
_CLIENT_PURPOSES: tuple[Purpose, ...] = ("client", "prefetch")
_REQUEST_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10, 30, 120, 600)
_FLEET_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5)
_FIRST_BYTE_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

# Cache states of responses that were served from the store.
_HIT_STATES = ("hit", "revalidated", "stale")

_RequestLabels = tuple[str, RequestKind, int, CacheState]


class GaugeSource(Protocol):
    """Supplies the values of the gauges at each scrape."""

    @property
    def store_bytes(self) -> int:
        """Bytes of all blobs in the store."""

    @property
    def store_limit_bytes(self) -> int:
        """Maximum size of the store."""

    @property
    def store_blobs(self) -> int:
        """Blobs in the store."""

    @property
    def store_reserved_bytes(self) -> int:
        """Bytes reserved for running downloads."""

    @property
    def store_pinned_bytes(self) -> int:
        """Bytes of blobs of pinned images."""

    @property
    def store_oldest_use(self) -> float:
        """Last use of the blob that is evicted next, in Unix seconds; 0 if the store is empty."""

    @property
    def scrub_late_seconds(self) -> float:
        """Seconds that the scrub is behind its schedule."""

    @property
    def index_damaged(self) -> int:
        """1 if the index is damaged, else 0."""

    @property
    def downloads_in_progress(self) -> int:
        """Running downloads."""


class GaugeCollector(Collector):
    """Exports the gauges of a `GaugeSource` as they were at the last `read`."""

    def __init__(self, source: GaugeSource) -> None:
        self._source = source
        self._families: list[Metric] = []

    def read(self) -> None:
        """Read the current values. To be called in the event loop, where they change."""
        self._families = [*self._read()]

    def collect(self) -> Iterable[Metric]:
        """Return the gauges."""
        return self._families

    def _read(self) -> Iterator[Metric]:
        for name, text in (
            ("store_bytes", "Bytes of all blobs in the store."),
            ("store_limit_bytes", "Maximum size of the store."),
            ("store_blobs", "Blobs in the store."),
            ("store_reserved_bytes", "Bytes reserved for running downloads."),
            ("store_pinned_bytes", "Bytes of blobs of pinned images."),
            ("scrub_late_seconds", "How far the scrub is behind its schedule."),
            ("index_damaged", "1 if the index of the store is damaged, else 0."),
            ("downloads_in_progress", "Running downloads."),
        ):
            yield _gauge_family(name, text, getattr(self._source, name))
        yield _gauge_family(
            "store_oldest_use_timestamp_seconds",
            "Time of the last use of the blob that is evicted next; 0 if the store is empty.",
            self._source.store_oldest_use,
        )


def _gauge_family(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"pullcache_{name}", text, value=value)


class RegistryProxyCollector(Collector):
    """Exports the proxy metrics of distribution (registry/proxy/proxymetrics.go) while `is_on`.

    `served_totals` returns the requests and response bytes of a kind by cache state,
    `upstream_bytes` the bytes of a kind received from upstream.
    """

    def __init__(
        self,
        served_totals: Callable[[str], Mapping[Any, tuple[int, int]]],
        upstream_bytes: Callable[[str], float],
    ) -> None:
        self.is_on = False
        self._served_totals = served_totals
        self._upstream_bytes = upstream_bytes

    def collect(self) -> Iterator[Metric]:
        """Yield the totals of blobs and manifests, the only kinds that distribution counts."""
        if not self.is_on:
            return
        families = {
            name: CounterMetricFamily(f"registry_proxy_{name}", text, labels=("type",))
            for name, text in (
                ("requests", "Requests served."),
                ("hits", "Requests served from the store."),
                ("misses", "Requests that needed upstream."),
                ("pulled_bytes", "Bytes received from upstream."),
                ("pushed_bytes", "Bytes sent to clients."),
            )
        }
        for kind in ("blob", "manifest"):
            served = self._served_totals(kind)
            requests = sum(count for count, _ in served.values())
            hits = sum(served[state][0] for state in _HIT_STATES if state in served)
            for name, value in (
                ("requests", requests),
                ("hits", hits),
                ("misses", requests - hits),
                ("pulled_bytes", self._upstream_bytes(kind)),
                ("pushed_bytes", sum(sent for _, sent in served.values())),
            ):
                families[name].add_metric((kind,), value)
        yield from families.values()


class Metrics:
    """Counts what the other modules report, in a registry of its own.

    `traffic` holds the totals by day until they are written. `clock` returns Unix time.
    """

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(
        self, upstreams: Iterable[str], version: str, clock: Callable[[], float] = time.time
    ) -> None:
        self.traffic = TrafficTally(clock)
        # The `_created` series would be half of all, and nothing uses them.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._gauges: GaugeCollector | None = None
        self._requests = RequestCollector()
        self._registry.register(self._requests)
        self._pulls = self._counter(
            "pulls",
            "Pulls of images by clients, by whether content came from upstream.",
            "upstream",
            "result",
        )
        self._avoided = self._counter(
            "ratelimited_avoided",
            "Manifests served from the store while upstream allowed no more pulls.",
            "upstream",
        )
        self._promised = self._counter(
            "promised_bytes",
            "Bytes among pullcache_response_bytes that nginx was told to send.",
            "upstream",
        )
        self._declare_upstream()
        self._registry_proxy = RegistryProxyCollector(
            self._requests.totals, self._upstream_bytes_of_kind
        )
        self._registry.register(self._registry_proxy)
        self._declare_store()
        self._connections = self._gauge("connections", "Open client connections.")
        self._connections_rejected = self._counter(
            "connections_refused", "Client connections rejected because of a limit."
        )
        self._certificate_expiries = self._gauge(
            "tls_certificate_expiry_timestamp_seconds",
            "Time when the certificate for clients expires.",
            "certificate",
        )
        self._internal_errors = self._counter("internal_errors", "Unexpected internal errors.")
        self._declare_reloads()
        self._declare_peers()
        build = self._gauge("build_info", "Always 1; the version is a label.", "version")
        build.labels(version).set(1)
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        # Each `cache` replaces `labels()` by one lookup in a dict.
        self._upstream_children = cache(self._upstream_requests.labels)
        self._promised_children = cache(self._promised.labels)
        self._first_byte_children = cache(self._upstream_first_byte.labels)
        self._upstream_bytes_children = cache(self._upstream_bytes.labels)
        for upstream in upstreams:
            self._create_upstream_series(upstream)

    def _declare_upstream(self) -> None:
        self._upstream_requests = self._counter(
            "upstream_requests",
            'Requests sent to upstream; status "error" means no response.',
            "upstream",
            "kind",
            "status",
        )
        self._upstream_first_byte = Histogram(
            "pullcache_upstream_first_byte_seconds",
            "Time from an upstream request to the first byte of its response.",
            ("upstream", "kind"),
            buckets=_FIRST_BYTE_BUCKETS,
            registry=self._registry,
        )
        self._upstream_bytes = self._counter(
            "upstream_bytes",
            "Response body bytes received from upstream, by what they were fetched for.",
            "upstream",
            "kind",
            "purpose",
        )
        self._upstream_retries = self._counter(
            "upstream_retries", "Retried upstream requests.", "upstream", "reason"
        )
        self._ratelimit_limit = self._gauge(
            "upstream_ratelimit_limit",
            "Pulls that upstream allows per rate limit window.",
            "upstream",
        )
        self._ratelimit_remaining = self._gauge(
            "upstream_ratelimit_remaining", "Pulls remaining in the rate limit window.", "upstream"
        )
        self._upstream_up = self._gauge(
            "upstream_up",
            (
                "1 while upstream or a mirror is used; 0 while all of their circuit breakers are "
                "open."
            ),
            "upstream",
        )
        self._mismatches = self._counter(
            "digest_mismatches",
            "Responses from upstream that did not match their digest.",
            "upstream",
        )

    def _declare_store(self) -> None:
        self._downloads = self._counter(
            "downloads",
            "Finished downloads, by result and by who has sent the bytes.",
            "result",
            "source",
        )
        self._evictions = self._counter(
            "evictions", "Blobs removed from the store, by reason.", "reason"
        )
        self._evicted_bytes = self._counter(
            "evicted_bytes", "Bytes of blobs removed from the store, by reason.", "reason"
        )
        self._policy_decisions = self._counter(
            "policy_decisions",
            "Decisions of policies about images that were not decided already, by policy.",
            "policy",
            "decision",
        )
        self._uncached = self._counter(
            "uncached", "Blobs served without being stored, by reason.", "reason"
        )
        self._notifications = self._counter(
            "notifications", "Events for the webhook, by result.", "result"
        )
        self._drift = self._counter(
            "store_drift",
            "Differences between the account of the store and its files, found and corrected.",
        )
        self._prefetch_dropped = self._counter(
            "prefetch_dropped",
            "Blobs that were not prefetched because too many were waiting.",
        )
        self._preloaded = self._counter(
            "preloaded_images", "Preloaded images, by result.", "result"
        )
        self._scrubbed = self._counter(
            "scrubbed_blobs", "Blobs that the scrub has read, by result.", "result"
        )
        self._scrubbed_bytes = self._counter(
            "scrubbed_bytes", "Bytes of the blobs that the scrub has read."
        )
        for notification_result in _NOTIFICATION_RESULTS:
            self._notifications.labels(notification_result)
        for download_result in _DOWNLOAD_RESULTS:
            for source in _DOWNLOAD_SOURCES:
                self._downloads.labels(download_result, source)
        for eviction_reason in _EVICTION_REASONS:
            self._evictions.labels(eviction_reason)
            self._evicted_bytes.labels(eviction_reason)
        for uncached_reason in _UNCACHED_REASONS:
            self._uncached.labels(uncached_reason)
        for scrub_result in _SCRUB_RESULTS:
            self._scrubbed.labels(scrub_result)
        for preload_result in ("complete", "failed"):
            self._preloaded.labels(preload_result)

    def _declare_peers(self) -> None:
        self._peer_requests = self._counter(
            "peer_requests", "Requests for content to peers of the fleet, by result.", "result"
        )
        self._peer_bytes = self._counter(
            "peer_bytes", "Bytes of content exchanged with peers of the fleet.", "direction"
        )
        self._peer_failovers = self._counter(
            "peer_failovers", "Transfers that a peer of the fleet did not finish.", "reason"
        )
        for result in _PEER_RESULTS:
            self._peer_requests.labels(result)
        for direction in _PEER_DIRECTIONS:
            self._peer_bytes.labels(direction)
        for reason in _FAILOVER_REASONS:
            self._peer_failovers.labels(reason)

    def _declare_reloads(self) -> None:
        self._reloads = self._counter(
            "config_reloads", "Configuration reloads, by result.", "result"
        )
        self._last_reload_successful = self._gauge(
            "config_last_reload_successful", "1 if the last configuration reload succeeded."
        )
        self._last_reload_time = self._gauge(
            "config_last_reload_success_timestamp_seconds",
            "Time when the configuration was last loaded successfully.",
        )
        for result in ("success", "failure"):
            self._reloads.labels(result)
        self._last_reload_successful.set(1)
        self._last_reload_time.set_to_current_time()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"pullcache_{name}_total", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"pullcache_{name}", text, labels, registry=self._registry)

    def _create_upstream_series(self, upstream: str) -> None:
        for kind, states in _INITIAL_SERIES:
            self._upstream_children(upstream, kind, "200")
            self._upstream_children(upstream, kind, "error")
            self._first_byte_children(upstream, kind)
            for purpose in _PURPOSES:
                self._upstream_bytes_children(upstream, kind, purpose)
            for state in states:
                self._requests.create_tally((upstream, kind, 200, state))
        for result in _PULL_RESULTS:
            self._pulls.labels(upstream, result)
        self._avoided.labels(upstream)
        self._promised_children(upstream)
        self._mismatches.labels(upstream)
        self._upstream_up.labels(upstream).set(1)

    def count_request(
        self,
        *,
        upstream: str,
        kind: RequestKind,
        status: int,
        cache: CacheState,
        seconds: float,
        sent: int,
    ) -> None:
        """Count an answered request; `upstream` is "none" for requests without an upstream."""
        self._requests.record((upstream, kind, status, cache), seconds, sent)

    def served_totals(self) -> dict[CacheState, tuple[int, int]]:
        """Return the requests for manifests and blobs, and their response bytes, by cache state."""
        return self._requests.totals("manifest", "blob")

    def received_bytes(self, *, for_clients: bool) -> int:
        """Return the bytes of manifests and blobs from upstream; all, or those fetched for clients."""
        purposes = _CLIENT_PURPOSES if for_clients else _PURPOSES
        return int(
            self._upstream_bytes_of_kind("manifest", purposes)
            + self._upstream_bytes_of_kind("blob", purposes)
        )

    def count_pulls(self, upstream: str, result: PullResult, count: int) -> None:
        """Count pulls that have ended."""
        self._pulls.labels(upstream, result).inc(count)

    def count_promised(self, upstream: str, size: int) -> None:
        """Count bytes of a blob that nginx was told to send (`server.accel_redirect`)."""
        self._promised_children(upstream).inc(size)

    def count_avoided(self, upstream: str, count: int) -> None:
        """Count manifests served from the store while upstream allowed no more pulls."""
        self._avoided.labels(upstream).inc(count)

    def count_upstream_request(
        self, upstream: str, kind: str, status: int | Literal["error"]
    ) -> None:
        """Count an upstream request by the status of its response; "error" if there was none."""
        self._upstream_children(upstream, kind, str(status)).inc()

    def observe_upstream_first_byte(self, upstream: str, kind: str, seconds: float) -> None:
        """Record the time to the first byte of an upstream response."""
        self._first_byte_children(upstream, kind).observe(seconds)

    def count_upstream_bytes(
        self,
        upstream: str,
        kind: RequestKind,
        size: int,
        purpose: Purpose = "client",
        repository: str = "",
    ) -> None:
        """Count body bytes received from upstream; with the repository if they are content."""
        self._upstream_bytes_children(upstream, kind, purpose).inc(size)
        if repository:
            self.traffic.count_received(upstream, repository, purpose, size)

    def _upstream_bytes_of_kind(
        self, kind: str, purposes: tuple[Purpose, ...] = _PURPOSES
    ) -> float:
        (family,) = self._upstream_bytes.collect()
        return sum(
            sample.value
            for sample in family.samples
            if sample.labels["kind"] == kind and sample.labels["purpose"] in purposes
        )

    def enable_registry_proxy(self, *, is_on: bool) -> None:
        """Switch the export of distribution's `registry_proxy_*` metrics on or off."""
        self._registry_proxy.is_on = is_on

    def count_upstream_retry(self, upstream: str, reason: str) -> None:
        """Count a retried upstream request; `reason` is one of a small fixed set."""
        self._upstream_retries.labels(upstream, reason).inc()

    def set_ratelimit(self, upstream: str, limit: int, get_remaining: Callable[[], float]) -> None:
        """Record the rate limit that upstream has sent; what remains is read at each scrape."""
        self._ratelimit_limit.labels(upstream).set(limit)
        self._ratelimit_remaining.labels(upstream).set_function(get_remaining)

    def register_upstream(self, upstream: str, is_up: Callable[[], bool]) -> None:
        """Add the series of an upstream; `is_up` is called at each scrape."""
        self._create_upstream_series(upstream)
        self._upstream_up.labels(upstream).set_function(is_up)

    def unregister_upstream(self, upstream: str) -> None:
        """Remove the gauges of an upstream that is no longer configured; its counters stay."""
        for gauge in (self._upstream_up, self._ratelimit_limit, self._ratelimit_remaining):
            gauge.remove(upstream)

    def enable_fleet(self, is_up: Callable[[], float], count_members: Callable[[], float]) -> None:
        """Add the series of a fleet; both are called at each scrape."""
        self._fleet_requests = self._counter(
            "fleet_requests",
            "Questions to the directory of the fleet, by result; blind: it was not asked.",
            "operation",
            "result",
        )
        self._fleet_durations = Histogram(
            "pullcache_fleet_request_duration_seconds",
            "Time until the directory of the fleet has answered.",
            ("operation",),
            buckets=_FLEET_BUCKETS,
            registry=self._registry,
        )
        for operation in get_args(FleetOperation):
            self._fleet_durations.labels(operation)
            for result in get_args(FleetResult):
                self._fleet_requests.labels(operation, result)
        self._fleet_downloads = self._counter(
            "fleet_downloads",
            "Blobs that this node has fetched and stored, by source.",
            "source",
        )
        for source in get_args(FleetSource):
            self._fleet_downloads.labels(source)
        self._gauge(
            "fleet_up", "1 while the directory of the fleet answers, 0 while the node works alone."
        ).set_function(is_up)
        self._gauge(
            "fleet_members", "Live members of the fleet that this node knows, with itself."
        ).set_function(count_members)

    def count_fleet_request(
        self, operation: FleetOperation, result: FleetResult, seconds: float | None = None
    ) -> None:
        """Count a question to the directory; with `seconds` if it has answered."""
        self._fleet_requests.labels(operation, result).inc()
        if seconds is not None:
            self._fleet_durations.labels(operation).observe(seconds)

    def count_fleet_download(self, source: FleetSource) -> None:
        """Count a blob that this node has fetched and stored."""
        self._fleet_downloads.labels(source).inc()

    def count_reload(self, *, is_success: bool) -> None:
        """Count a reload of the configuration."""
        self._reloads.labels("success" if is_success else "failure").inc()
        self._last_reload_successful.set(is_success)
        if is_success:
            self._last_reload_time.set_to_current_time()

    def count_download(self, result: DownloadResult, source: DownloadSource = "upstream") -> None:
        """Count a finished download; its source is "peer" if a peer has sent any of its bytes."""
        self._downloads.labels(result, source).inc()

    def count_peer_request(self, result: PeerResult) -> None:
        """Count the answer of a peer of the fleet."""
        self._peer_requests.labels(result).inc()

    def count_peer_bytes(self, direction: PeerDirection, size: int) -> None:
        """Count bytes of content received from peers, or sent to them."""
        self._peer_bytes.labels(direction).inc(size)

    def count_peer_failover(self, reason: FailoverReason) -> None:
        """Count that content is fetched in another way because a peer failed."""
        self._peer_failovers.labels(reason).inc()

    def count_digest_mismatch(self, upstream: str) -> None:
        """Count content from upstream that did not match its digest."""
        self._mismatches.labels(upstream).inc()

    def count_evicted(self, reason: EvictionReason, count: int, size: int) -> None:
        """Count blobs removed from the store: `count` of them, `size` bytes in all."""
        self._evictions.labels(reason).inc(count)
        self._evicted_bytes.labels(reason).inc(size)

    def count_notification(self, result: NotificationResult) -> None:
        """Count an event for the webhook."""
        self._notifications.labels(result).inc()

    def count_prefetch_dropped(self, count: int) -> None:
        """Count blobs that the full queue of the prefetch did not take."""
        self._prefetch_dropped.inc(count)

    def count_drift(self) -> None:
        """Count a difference between the store's account and its files: a bug, or a lost write."""
        self._drift.inc()

    def count_policy_decision(self, policy: int, decision: str) -> None:
        """Count a decision of the policy with this number."""
        self._policy_decisions.labels(str(policy), decision).inc()

    def count_uncached(self, reason: UncachedReason) -> None:
        """Count a blob that was served without being stored."""
        self._uncached.labels(reason).inc()

    def count_scrubbed(self, result: ScrubResult, size: int) -> None:
        """Count a blob of `size` bytes that the scrub has read."""
        self._scrubbed.labels(result).inc()
        self._scrubbed_bytes.inc(size)

    def count_preloaded(self, *, has_failed: bool) -> None:
        """Count a preloaded image."""
        self._preloaded.labels("failed" if has_failed else "complete").inc()

    def register_connections(self, count: Callable[[], float]) -> None:
        """Have `count` return the open client connections at each scrape."""
        self._connections.set_function(count)

    def count_rejected_connection(self) -> None:
        """Count a client connection rejected over the limit."""
        self._connections_rejected.inc()

    def set_certificate_expiries(self, expiries: Mapping[str, float]) -> None:
        """Export when each certificate expires, in Unix seconds by file; others are removed."""
        self._certificate_expiries.clear()
        for file, expiry in expiries.items():
            self._certificate_expiries.labels(file).set(expiry)

    def count_internal_error(self) -> None:
        """Count an unexpected internal error."""
        self._internal_errors.inc()

    def register_gauges(self, source: GaugeSource) -> None:
        """Export the gauges of `source`; to be called once."""
        self._gauges = GaugeCollector(source)
        self._registry.register(self._gauges)

    def read_gauges(self) -> None:
        """Read the gauges for the next `render`. To be called in the event loop, where they change."""
        if self._gauges:
            self._gauges.read()

    def render(self) -> bytes:
        """Return all metrics in the text format of Prometheus. May be called in a thread."""
        return generate_latest(self._registry)


class RequestCollector(Collector):
    """Counts client requests in plain lists, and builds the metrics at each scrape.

    The library's counters and histogram, each with a lock, would add a third to the time of a
    request.
    """

    def __init__(self) -> None:
        # Each tally: requests, bytes, seconds, then the requests of each duration bucket.
        self._tallies: dict[_RequestLabels, list[float]] = {}

    def create_tally(self, labels: _RequestLabels) -> list[float]:
        """Return the tally of these labels; create it if it does not exist."""
        return self._tallies.setdefault(labels, [0] * (4 + len(_REQUEST_BUCKETS)))

    def record(self, labels: _RequestLabels, seconds: float, sent: int) -> None:
        """Count a request that took `seconds` and whose response had `sent` bytes."""
        tally = self._tallies.get(labels) or self.create_tally(labels)
        tally[0] += 1
        tally[1] += sent
        tally[2] += seconds
        tally[3 + bisect_left(_REQUEST_BUCKETS, seconds)] += 1

    def totals(self, *kinds: str) -> dict[CacheState, tuple[int, int]]:
        """Return the successful requests of these kinds and their bytes, by cache state."""
        sums: dict[CacheState, tuple[int, int]] = {}
        for (_, kind, status, state), tally in list(self._tallies.items()):
            if kind in kinds and status < 400:
                count, sent = sums.get(state, (0, 0))
                sums[state] = (count + int(tally[0]), sent + int(tally[1]))
        return sums

    def collect(self) -> Iterator[Metric]:
        """Yield the counters of requests and bytes, and the histogram of durations."""
        requests = CounterMetricFamily(
            "pullcache_requests",
            "Client requests, by cache status.",
            labels=("upstream", "kind", "status", "cache"),
        )
        sent = CounterMetricFamily(
            "pullcache_response_bytes",
            "Response body bytes sent to clients.",
            labels=("upstream", "kind", "cache"),
        )
        durations = HistogramMetricFamily(
            "pullcache_request_duration_seconds",
            "Time from receiving a request to the last byte of its response.",
            labels=("kind", "cache"),
        )
        bytes_by_labels: dict[tuple[str, ...], float] = {}
        durations_by_labels: dict[tuple[str, ...], list[float]] = {}
        for (upstream, kind, status, state), tally in list(self._tallies.items()):
            requests.add_metric((upstream, kind, str(status), state), tally[0])
            labels = (upstream, kind, state)
            bytes_by_labels[labels] = bytes_by_labels.get(labels, 0) + tally[1]
            total = durations_by_labels.setdefault((kind, state), [0] * (len(tally) - 2))
            durations_by_labels[kind, state] = [
                a + b for a, b in zip(total, tally[2:], strict=True)
            ]
        for byte_labels, size in bytes_by_labels.items():
            sent.add_metric(byte_labels, size)
        limits = [*map(floatToGoString, _REQUEST_BUCKETS), "+Inf"]
        for duration_labels, (seconds, *counts) in durations_by_labels.items():
            buckets = list(zip(limits, accumulate(counts), strict=True))
            durations.add_metric(duration_labels, buckets, seconds)
        yield from (requests, sent, durations)
