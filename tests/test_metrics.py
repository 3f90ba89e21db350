"""Metrics: what is counted, which series exist from the start, and that promtool accepts them."""

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.metrics import Metrics
from proxy.server.health import HealthEndpoints


@dataclass
class Gauges:
    """A `GaugeSource` whose values tests set."""

    store_bytes: int = 0
    store_limit_bytes: int = 100
    store_blobs: int = 0
    store_reserved_bytes: int = 0
    store_pinned_bytes: int = 0
    store_oldest_use: float = 0
    scrub_late_seconds: float = 0
    index_damaged: int = 0
    downloads_in_progress: int = 0


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(["docker.io", "ghcr.io"], "1.2.3")


def samples(metrics: Metrics) -> dict[str, float]:
    metrics.read_gauges()
    return {
        sample.name + "".join(f",{key}={sample.labels[key]}" for key in sorted(sample.labels)): (
            sample.value
        )
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def set_all_metrics(metrics: Metrics) -> None:
    metrics.register_gauges(Gauges())
    metrics.read_gauges()
    metrics.count_request(
        upstream="docker.io", kind="blob", status=206, cache="hit", seconds=0.2, sent=10
    )
    metrics.count_request(upstream="none", kind="ping", status=200, cache="none", seconds=0, sent=2)
    metrics.count_upstream_request("docker.io", "blob", 307)
    metrics.count_upstream_request("docker.io", "token", "error")
    metrics.observe_upstream_first_byte("docker.io", "blob", 0.3)
    metrics.count_upstream_bytes("docker.io", "blob", 1000)
    metrics.count_pulls("docker.io", "hit", 2)
    metrics.count_avoided("docker.io", 1)
    metrics.count_promised("docker.io", 10)
    metrics.count_notification("sent")
    metrics.count_upstream_retry("docker.io", "stalled")
    metrics.set_ratelimit("docker.io", 100, lambda: 7)
    metrics.count_download("stored")
    metrics.count_peer_request("whole")
    metrics.count_peer_bytes("in", 5)
    metrics.count_peer_failover("stalled")
    metrics.count_digest_mismatch("docker.io")
    metrics.count_evicted("size", 3, 3000)
    metrics.count_uncached("too_large")
    metrics.count_policy_decision(1, "deny")
    metrics.count_scrubbed("intact", 500)
    metrics.count_rejected_connection()
    metrics.set_certificate_expiries({"/etc/pullcache/cache.pem": 2_000_000_000})
    metrics.count_internal_error()
    metrics.enable_fleet(lambda: True, lambda: 3)
    metrics.count_fleet_request("locate", "ok", 0.0002)
    metrics.count_fleet_download("peer")


def test_a_request_is_counted_once_with_its_time_and_its_bytes(metrics):
    for _ in range(2):
        metrics.count_request(
            upstream="docker.io", kind="blob", status=200, cache="hit", seconds=0.02, sent=500
        )
    found = samples(metrics)
    served = "cache=hit,kind=blob"
    assert found[f"pullcache_requests_total,{served},status=200,upstream=docker.io"] == 2
    assert found[f"pullcache_response_bytes_total,{served},upstream=docker.io"] == 1000
    assert found[f"pullcache_request_duration_seconds_count,{served}"] == 2
    assert found[f"pullcache_request_duration_seconds_sum,{served}"] == pytest.approx(0.04)
    assert found[f"pullcache_requests_total,{served},status=200,upstream=ghcr.io"] == 0


def test_upstream_requests_are_counted_by_upstream(metrics):
    set_all_metrics(metrics)
    found = samples(metrics)
    hub = "upstream=docker.io"
    assert found[f"pullcache_upstream_requests_total,kind=blob,status=307,{hub}"] == 1
    assert found[f"pullcache_upstream_requests_total,kind=token,status=error,{hub}"] == 1
    assert found[f"pullcache_upstream_first_byte_seconds_sum,kind=blob,{hub}"] == 0.3
    assert found[f"pullcache_upstream_bytes_total,kind=blob,purpose=client,{hub}"] == 1000
    assert found[f"pullcache_pulls_total,result=hit,{hub}"] == 2
    assert found[f"pullcache_ratelimited_avoided_total,{hub}"] == 1
    assert found[f"pullcache_upstream_retries_total,reason=stalled,{hub}"] == 1
    assert found[f"pullcache_upstream_ratelimit_limit,{hub}"] == 100
    assert found[f"pullcache_upstream_ratelimit_remaining,{hub}"] == 7
    assert found[f"pullcache_digest_mismatches_total,{hub}"] == 1


def test_events_of_the_store_are_counted_by_reason(metrics):
    set_all_metrics(metrics)
    found = samples(metrics)
    assert found["pullcache_downloads_total,result=stored,source=upstream"] == 1
    assert found["pullcache_evictions_total,reason=size"] == 3
    assert found["pullcache_evicted_bytes_total,reason=size"] == 3000
    assert found["pullcache_uncached_total,reason=too_large"] == 1
    assert found["pullcache_scrubbed_blobs_total,result=intact"] == 1
    assert found["pullcache_scrubbed_bytes_total"] == 500
    assert found["pullcache_internal_errors_total"] == 1


@pytest.mark.parametrize(
    "series",
    [
        "pullcache_requests_total,cache=miss,kind=blob,status=200,upstream=ghcr.io",
        "pullcache_requests_total,cache=stale,kind=manifest,status=200,upstream=docker.io",
        "pullcache_response_bytes_total,cache=hit,kind=manifest,upstream=docker.io",
        "pullcache_upstream_requests_total,kind=blob,status=error,upstream=docker.io",
        "pullcache_upstream_bytes_total,kind=manifest,purpose=preload,upstream=ghcr.io",
        "pullcache_pulls_total,result=partial,upstream=ghcr.io",
        "pullcache_ratelimited_avoided_total,upstream=docker.io",
        "pullcache_digest_mismatches_total,upstream=docker.io",
        "pullcache_downloads_total,result=failed,source=peer",
        "pullcache_peer_failovers_total,reason=wrong",
        "pullcache_evictions_total,reason=corrupt",
        "pullcache_evicted_bytes_total,reason=min_free",
        "pullcache_uncached_total,reason=pinned",
        "pullcache_uncached_total,reason=disk_error",
        "pullcache_internal_errors_total",
        "pullcache_notifications_total,result=dropped",
    ],
)
def test_series_exist_at_zero_before_anything_is_counted(metrics, series):
    assert samples(metrics)[series] == 0


async def test_a_scrape_reads_the_gauges_in_the_event_loop_where_they_change(metrics):
    """A thread that iterates over a set while the loop changes it fails."""
    threads = []

    class Source(Gauges):
        def __getattribute__(self, name: str) -> object:
            threads.append(threading.get_ident())
            return super().__getattribute__(name)

    async def check_store() -> None: ...

    metrics.register_gauges(Source())
    with ThreadPoolExecutor(1) as executor:
        endpoints = HealthEndpoints(metrics, check_store, executor)
        response = await endpoints.handle("GET", "/metrics")
    assert isinstance(response.body, bytes)
    assert b"pullcache_store_limit_bytes 100" in response.body
    assert set(threads) == {threading.get_ident()}


def test_gauges_are_read_at_each_scrape(metrics):
    source = Gauges()
    metrics.register_gauges(source)
    assert samples(metrics)["pullcache_store_bytes"] == 0
    source.store_bytes = 70
    source.store_oldest_use = 1.7e9
    source.downloads_in_progress = 2
    found = samples(metrics)
    assert found["pullcache_store_bytes"] == 70
    assert found["pullcache_store_limit_bytes"] == 100
    assert found["pullcache_store_oldest_use_timestamp_seconds"] == 1.7e9
    assert found["pullcache_downloads_in_progress"] == 2


def test_two_programs_in_one_process_share_no_counters(metrics):
    other = Metrics(["docker.io"], "1.2.3")
    metrics.count_download("stored")
    assert samples(other)["pullcache_downloads_total,result=stored,source=upstream"] == 0


def test_version_process_and_garbage_collection_are_exported(metrics):
    found = samples(metrics)
    assert found["pullcache_build_info,version=1.2.3"] == 1
    assert found["process_resident_memory_bytes"] > 0
    assert "python_gc_collections_total,generation=0" in found
    assert not [name for name in found if "_created" in name]


def test_distributions_metrics_are_exported_only_if_enabled(metrics):
    set_all_metrics(metrics)
    assert "registry_proxy" not in metrics.render().decode()
    metrics.enable_registry_proxy(is_on=True)
    for name in ("requests", "hits", "misses", "pulled_bytes", "pushed_bytes"):
        for kind in ("blob", "manifest"):
            assert f"registry_proxy_{name}_total,type={kind}" in samples(metrics)
    metrics.enable_registry_proxy(is_on=False)
    assert "registry_proxy" not in metrics.render().decode()


def test_distributions_metrics_distinguish_hits_from_misses(metrics):
    metrics.enable_registry_proxy(is_on=True)
    for cache in ("hit", "stale", "revalidated", "miss", "collapsed", "collapsed"):
        metrics.count_request(
            upstream="ghcr.io", kind="manifest", status=200, cache=cache, seconds=0, sent=10
        )
    metrics.count_request(
        upstream="ghcr.io", kind="tags", status=200, cache="hit", seconds=0, sent=7
    )
    metrics.count_request(
        upstream="ghcr.io", kind="manifest", status=404, cache="none", seconds=0, sent=7
    )
    metrics.count_upstream_bytes("ghcr.io", "manifest", 10)
    metrics.count_upstream_bytes("docker.io", "manifest", 20)
    metrics.count_upstream_bytes("docker.io", "blob", 500)
    found = samples(metrics)
    assert {
        name: found[f"registry_proxy_{name}_total,type=manifest"]
        for name in ("requests", "hits", "misses", "pulled_bytes", "pushed_bytes")
    } == {"requests": 6, "hits": 3, "misses": 3, "pulled_bytes": 30, "pushed_bytes": 60}
    assert found["registry_proxy_pulled_bytes_total,type=blob"] == 500


@pytest.mark.system
def test_promtool_has_no_complaints(metrics):
    set_all_metrics(metrics)
    metrics.enable_registry_proxy(is_on=True)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics.render(), capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
