"""Preload with a real registry, the real command, and a kill in its midst."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.images import Image, make_image
from tests.system.processes import Process, run
from tests.system.relay import Relay
from tests.system.servers import Daemon, Registry

pytestmark = pytest.mark.timeout(120)

MB = 1_000_000
MakeDaemon = Callable[..., Daemon]


@pytest.fixture
def large(registry: Registry, place: Path) -> Image:
    """An image of 33 MB, most of it one layer."""
    made = make_image(place / "large", repository="me/large", layer_sizes=(2 * MB, 30 * MB))
    made.push(registry.address)
    return made


@pytest.fixture
def config(place: Path) -> Callable[[str], Path]:
    def write(url: str) -> Path:
        path = place / "pullcache.toml"
        path.write_text(
            f'store = {{path = "{place}/store", min_free = "0B"}}\n'
            f'upstreams."docker.io".url = "{url}"\n'
        )
        return path

    return write


def arriving(store: Path) -> int:
    """Return how many bytes of the largest unfinished download a process that goes on could use."""
    found = [0]
    for path in (store / "ingest").glob("*.state"):
        try:
            state = json.loads(path.read_bytes().rstrip(b"\0 "))
        except ValueError:
            continue  # it is being written
        found.append(state["have"] + sum(stop - start for start, stop in state["ahead"]))
    return max(found)


def test_after_a_kill_only_the_rest_comes(
    registry: Registry, large: Image, place: Path, config: Callable[[str], Path]
):
    command = [sys.executable, "-m", "proxy", "preload", "me/large:latest"]
    with Relay(registry.address, 5 * MB) as relay:
        argv = [*command, "-c", str(config(relay.url))]
        process = Process(place, "preload", argv)
        process.wait_until(lambda: arriving(place / "store") > 10 * MB, "the middle of a layer")
        process.kill()
        kept = arriving(place / "store")
        assert 10 * MB < kept < 30 * MB
        relay.rate = 0
        before = relay.received
        lines = run(*argv, "--json").splitlines()
        came = relay.received - before
        again = json.loads(run(*argv, "--json").splitlines()[-1])
        cost = relay.received - before - came
    totals = json.loads(lines[-1])
    assert (totals["event"], totals["fetched_images"], totals["failed"]) == ("totals", 1, 0)
    assert came < 34 * MB - kept
    assert totals["fetched"] <= came
    assert (again["up_to_date"], again["fetched"]) == (1, 0)
    assert cost < 20_000
    blobs = place / "store" / "blobs" / "sha256"
    run("sh", "-c", f'cd {blobs} && for file in *; do echo "$file  $file"; done | sha256sum -c')


def test_a_compose_file_of_two_platforms_is_pulled_without_the_registry(
    upstream: Registry, daemon: Daemon, image: Image, place: Path
):
    second = make_image(place / "second", repository="me/second", tag="v2")
    second.push(upstream.address)
    compose = place / "compose.yaml"
    compose.write_text(
        f"services:\n  one: {{image: {image.reference}}}\n  two: {{image: me/second:v2}}\n"
    )
    platforms = ["--platform", "linux/amd64", "--platform", "linux/arm64"]
    said = daemon.run("preload", "-f", compose, *platforms, "--lock", place / "images.lock")
    assert said.count("Pull complete") == 2
    daemon.run("check-offline", "-f", compose, *platforms)
    daemon.run("check-offline", "-f", place / "images.lock")
    upstream.stop()
    for one in (image, second):
        source = f"docker://{daemon.address}/{one.repository}:{one.tag}"
        run("skopeo", "copy", "--all", "--src-tls-verify=false", source, f"dir:{place}/{one.tag}")
        manifest = json.loads((place / one.tag / "manifest.json").read_text())
        assert len(manifest["manifests"]) == 2
