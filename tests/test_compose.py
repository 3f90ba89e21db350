"""The compose files, checked against the image they run and the files they mount."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.config import load

FOLDER = Path(__file__).parents[1] / "config" / "container"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
FILES = ("compose.yaml", "compose.monitoring.yaml")


def services(name: str) -> dict[str, Any]:
    document = yaml.safe_load((FOLDER / name).read_text())
    return dict(document["services"])


def instruction(name: str) -> str:
    """Return the arguments of the last instruction of that name in the Dockerfile."""
    arguments: list[str] = re.findall(rf"^{name} (.*)$", DOCKERFILE, re.MULTILINE)
    return arguments[-1]


def mounts(name: str) -> dict[str, str]:
    """Return the source of each path that is mounted in the containers of the services."""
    split = [one.split(":") for service in services(name).values() for one in service["volumes"]]
    return {target: source for source, target, *_ in split}


@pytest.mark.parametrize("name", FILES)
def test_every_mounted_file_and_volume_exists(name: str):
    document = yaml.safe_load((FOLDER / name).read_text())
    for source in mounts(name).values():
        if source.startswith("."):
            file = FOLDER / source
            assert file.is_file(), source
        else:
            assert source in document["volumes"]


def test_the_cache_is_built_from_the_dockerfile_and_uses_its_port_and_paths():
    cache = services("compose.yaml")["cache"]
    assert (FOLDER / cache["build"]["context"] / cache["build"]["dockerfile"]).resolve() == (
        FOLDER / "Dockerfile"
    )
    (port,) = cache["ports"]
    assert port.endswith(f":{instruction('EXPOSE')}")
    assert mounts("compose.yaml") == {
        instruction("VOLUME"): "store",
        "/etc/pullcache/pullcache.toml": "./pullcache.toml",
    }
    assert "PULLCACHE_CONFIG=/etc/pullcache/pullcache.toml" in DOCKERFILE
    assert cache["read_only"] is True
    assert cache["cap_drop"] == ["ALL"]


def test_the_cache_listens_and_stores_where_the_image_expects_and_stops_in_time():
    cache = services("compose.yaml")["cache"]
    # Compose passes an unset variable as an empty one.
    unset = dict.fromkeys(cache["environment"], "")
    config = load(FOLDER / "pullcache.toml", unset, {})
    assert [one.port for one in config.server.listen] == [int(instruction("EXPOSE"))]
    assert not config.server.listen[0].is_loopback
    assert str(config.store.path) == instruction("VOLUME")
    seconds = int(cache["stop_grace_period"].removesuffix("s"))
    assert seconds > config.server.shutdown_timeout + 2


def test_every_port_is_published_on_loopback_by_default():
    for name in FILES:
        for service in services(name).values():
            for port in service["ports"]:
                assert re.match(r"127\.0\.0\.1:|\$\{CACHE_ADDRESS:-127\.0\.0\.1\}:", port), port


def test_prometheus_scrapes_the_cache_and_grafana_queries_prometheus():
    scraping = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (job,) = scraping["scrape_configs"]
    (target,) = job["static_configs"]
    assert target["targets"] == [f"cache:{instruction('EXPOSE')}"]
    directory = Path("/etc/prometheus")
    rules = {str(directory / name) for name in scraping["rule_files"]}
    assert rules <= set(mounts("compose.monitoring.yaml"))
    (source,) = yaml.safe_load((FOLDER / "grafana" / "datasources.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((FOLDER / "grafana" / "dashboards.yaml").read_text())["providers"]
    boards = Path(provider["options"]["path"]) / "pullcache.json"
    assert mounts("compose.monitoring.yaml")[str(boards)] == "../grafana/pullcache.json"
