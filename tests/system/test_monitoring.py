"""The dashboard's queries and the rules, evaluated by a real Prometheus that has scraped a real run."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.system.http_client import send_request
from tests.system.images import BuiltImage
from tests.system.processes import eventually
from tests.system.prometheus import Prometheus
from tests.system.servers import Daemon
from tests.test_dashboard import queries

# The values of Grafana's variables. The test takes less time than the range.
VARIABLES = {
    "$job": ".*",
    "$instance": ".*",
    "$upstream": ".*",
    "$__range": "5m",
    "$__rate_interval": "1m",
}

# Panels without data: docker-registry sends no rate limit, no request was retried, there is no policy, no TLS,
# no fleet and no alert; pulls are counted ten minutes after they began.
EMPTY = {
    "Remaining pulls",
    "Retries",
    "Certificate expires in",
    "Decisions of policies",
    "Alerts",
    "Pulls served by the cache per hour",
    "Members of the fleet",
    "Blobs by source in the fleet",
    "Questions to the directory",
    "Directory, 99th percentile",
}
RECORDED = [
    f"instance_upstream:{name}"
    for name in ("pullcache_saved_bytes:rate5m", "pullcache_byte_hit_ratio:rate1h")
]


@pytest.fixture
def prometheus(daemon: Daemon, directory: Path) -> Iterator[Prometheus]:
    server = Prometheus(directory / "prometheus", daemon.address)
    yield server
    server.stop()


def pull(daemon: Daemon, image: BuiltImage) -> int:
    """Request a manifest and a layer; return the size of the bodies."""
    path = f"/v2/{image.repository}"
    paths = [f"{path}/manifests/{image.tag}", f"{path}/blobs/{image.layers[-1]}"]
    responses = [send_request(daemon.url, path) for path in paths]
    assert [response.status for response in responses] == [200, 200]
    return sum(len(response.body) for response in responses)


def insert_variables(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    return query


@pytest.mark.timeout(240)  # about fifty queries, and the start and stop of Prometheus
def test_the_dashboard_and_the_rules_show_a_real_run(
    prometheus: Prometheus, daemon: Daemon, image: BuiltImage
):
    scrapes = "count_over_time(pullcache_build_info[1m])"
    eventually(lambda: prometheus.value(scrapes) >= 2, "two scrapes")
    size = pull(daemon, image)
    hits = partial(daemon.metric, "pullcache_requests_total", kind="blob", cache="hit")
    # Pulls before the first commit join the download and are no hits.
    eventually(lambda: pull(daemon, image) == size and hits() >= 3, "three hits")
    increase = 'sum(increase(pullcache_requests_total{kind="blob",cache="hit"}[1m]))'
    eventually(lambda: prometheus.value(increase) > 2, "a scrape of all pulls")

    eventually(lambda: all(prometheus.value(name) > 0 for name in RECORDED), "savings recorded")

    values: dict[str, list[list[float]]] = {}  # by panel: for each query, the values of its series
    for title, query in queries():
        series = prometheus.query(insert_variables(query))
        values.setdefault(title, []).append([float(one["value"][1]) for one in series])
    assert {title for title, results in values.items() if not all(results)} == EMPTY

    ((ratio,),) = values["Byte hit ratio"]
    assert 0.6 < ratio < 0.9, "one pull of four went upstream"
    ((saved,),) = values["Saved bytes"]
    assert saved > size
    nonzero = (
        "Sent to clients",
        "Received from upstream",
        "Requests by cache status",
        "Bytes",
        "Finished downloads",
    )
    for title in (
        *nonzero,
        "Space",
        "Memory",
        "CPU",
        "Open files",
        "Uptime",
        "Time to first byte from upstream",
    ):
        assert max(max(result) for result in values[title]) > 0, title
    medians = values["Blobs from the cache"] + values["Manifests from the cache"]
    assert [result for result in medians if not all(map(math.isfinite, result))] == []
    assert values["Internal errors"] == [[0.0]] * 4, (
        "errors, account drift, a damaged index and a full prefetch"
    )

    check_rules(prometheus)


def check_rules(prometheus: Prometheus) -> None:
    """Check that no rule fails, and that a healthy cache raises no alert."""
    groups = {group["name"]: group["rules"] for group in prometheus.get("rules")["groups"]}
    assert set(groups) == {"pullcache-savings", "pullcache-alerts"}

    def are_all_healthy() -> bool:
        loaded = prometheus.get("rules")["groups"]
        return all(rule["health"] == "ok" for group in loaded for rule in group["rules"])

    eventually(are_all_healthy, "all rules evaluated without an error")
    assert prometheus.get("alerts")["alerts"] == []
