"""Metrics that are made when somebody scrapes: how the store is, and other names for what is counted."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# Answers that came out of the store.
_HITS = ("hit", "revalidated", "stale")


class Source(Protocol):
    """What the gauges are read from whenever someone scrapes."""

    @property
    def store_bytes(self) -> int:
        """Bytes of the blobs in the store."""

    @property
    def store_limit_bytes(self) -> int:
        """The most the store may hold."""

    @property
    def store_blobs(self) -> int:
        """Blobs in the store."""

    @property
    def store_reserved_bytes(self) -> int:
        """Bytes held free for running downloads."""

    @property
    def store_pinned_bytes(self) -> int:
        """Bytes of the blobs that no eviction takes."""

    @property
    def store_oldest_use(self) -> float:
        """When the blob that goes next was last used, in Unix seconds; 0 in an empty store."""

    @property
    def downloads_in_progress(self) -> int:
        """Downloads that are running."""


class SourceCollector(Collector):
    """The gauges that are read from the store."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        """Ask the source."""
        for name, text in (
            ("store_bytes", "Bytes of the blobs in the store."),
            ("store_limit_bytes", "The most the store may hold."),
            ("store_blobs", "Blobs in the store."),
            ("store_reserved_bytes", "Bytes held free for running downloads."),
            ("store_pinned_bytes", "Bytes of the blobs that pinned images hold."),
            ("downloads_in_progress", "Downloads that are running."),
        ):
            yield _gauge_family(name, text, getattr(self._source, name))
        yield _gauge_family(
            "store_oldest_use_timestamp_seconds",
            "When the blob that goes next was last used; 0 in an empty store.",
            self._source.store_oldest_use,
        )


def _gauge_family(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"pullcache_{name}", text, value=value)


class RegistryProxy(Collector):
    """Distribution's metrics of its proxy (registry/proxy/proxymetrics.go), made of ours while `is_on`.

    `served` gives by cache state how many requests of a kind were answered, and their bytes; `pulled`
    the bytes of a kind that came from upstream.
    """

    def __init__(
        self,
        served: Callable[[str], Mapping[Any, tuple[int, int]]],
        pulled: Callable[[str], float],
    ) -> None:
        self.is_on = False
        self._served = served
        self._pulled = pulled

    def collect(self) -> Iterator[Metric]:
        """Sum up; blobs and manifests are all that distribution knows."""
        if not self.is_on:
            return
        families = {
            name: CounterMetricFamily(f"registry_proxy_{name}", text, labels=("type",))
            for name, text in (
                ("requests", "Requests answered."),
                ("hits", "Requests answered out of the store."),
                ("misses", "Requests that upstream was asked for."),
                ("pulled_bytes", "Bytes received from upstream."),
                ("pushed_bytes", "Bytes sent to clients."),
            )
        }
        for kind in ("blob", "manifest"):
            served = self._served(kind)
            requests = sum(count for count, _ in served.values())
            hits = sum(served[state][0] for state in _HITS if state in served)
            for name, value in (
                ("requests", requests),
                ("hits", hits),
                ("misses", requests - hits),
                ("pulled_bytes", self._pulled(kind)),
                ("pushed_bytes", sum(sent for _, sent in served.values())),
            ):
                families[name].add_metric((kind,), value)
        yield from families.values()
