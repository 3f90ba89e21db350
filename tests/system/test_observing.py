"""A real Prometheus that scraped a real run: the dashboard's queries and the rules, asked there."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.system.images import Image
from tests.system.processes import eventually
from tests.system.prometheus import Prometheus
from tests.system.servers import Daemon
from tests.system.wire import ask
from tests.test_dashboard import queries

# What Grafana puts in. The run is short, so all of it is in the range.
VARIABLES = {"$instance": ".*", "$__range": "5m", "$__rate_interval": "1m"}

# Docker-registry names no limits, and nothing of the run was sent twice: these have nothing to show.
EMPTY = {"Pulls left", "Retries", "Certificate ends in"}


@pytest.fixture
def prometheus(daemon: Daemon, place: Path) -> Iterator[Prometheus]:
    server = Prometheus(place / "prometheus", daemon.address)
    yield server
    server.stop()


def pull(daemon: Daemon, image: Image) -> int:
    """Ask as a client does; return how many bytes came."""
    path = f"/v2/{image.repository}"
    paths = [f"{path}/manifests/{image.tag}", f"{path}/blobs/{image.layers[-1]}"]
    answers = [ask(daemon.url, path) for path in paths]
    assert [answer.status for answer in answers] == [200, 200]
    return sum(len(answer.body) for answer in answers)


def filled_in(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    return query


@pytest.mark.timeout(240)  # half a hundred queries, and Prometheus's own start and end
def test_the_dashboard_and_the_rules_tell_of_a_real_run(
    prometheus: Prometheus, daemon: Daemon, image: Image
):
    scraped = "count_over_time(pullcache_build_info[1m])"
    eventually(lambda: prometheus.number(scraped) >= 2, "two scrapes")
    size = pull(daemon, image)
    hits = partial(daemon.metric, "pullcache_requests_total", kind="blob", cache="hit")
    # As long as the first is not committed, it is joined.
    eventually(lambda: pull(daemon, image) == size and hits() >= 3, "three hits")
    increase = 'sum(increase(pullcache_requests_total{kind="blob",cache="hit"}[1m]))'
    eventually(lambda: prometheus.number(increase) > 2, "a scrape of all pulls")

    shown: dict[str, list[list[float]]] = {}
    for title, query in queries():
        result = prometheus.query(filled_in(query))
        shown.setdefault(title, []).append([float(one["value"][1]) for one in result])
    assert {title for title, parts in shown.items() if not all(parts)} == EMPTY

    ((ratio,),) = shown["Byte hit ratio"]
    assert 0.6 < ratio < 0.9, "one pull of four went upstream"
    ((saved,),) = shown["Saved"]
    assert saved > size
    busy = (
        "Sent to clients",
        "Received from upstream",
        "Requests by cache state",
        "Bytes",
        "Ended",
    )
    for title in (*busy, "Room", "Memory", "CPU", "Open files", "Up for", "First byte of upstream"):
        assert max(max(part) for part in shown[title]) > 0, title
    medians = shown["Blobs out of the cache"] + shown["Manifests out of the cache"]
    assert [part for part in medians if not all(map(math.isfinite, part))] == []
    assert shown["Bugs met"] == [[0.0]]

    check_rules(prometheus)


def check_rules(prometheus: Prometheus) -> None:
    """Every rule is evaluated without an error, a healthy cache raises no alert, and savings are recorded."""
    groups = {group["name"]: group["rules"] for group in prometheus.get("rules")["groups"]}
    assert set(groups) == {"pullcache-savings", "pullcache-alerts"}

    def evaluated() -> bool:
        loaded = prometheus.get("rules")["groups"]
        return all(rule["health"] == "ok" for group in loaded for rule in group["rules"])

    eventually(evaluated, "all rules evaluated without an error")
    assert prometheus.get("alerts")["alerts"] == []
    savings = ("pullcache_saved_bytes:rate5m", "pullcache_byte_hit_ratio:rate1h")
    recorded = [f"instance_upstream:{name}" for name in savings]
    eventually(lambda: all(prometheus.number(name) > 0 for name in recorded), "savings recorded")
