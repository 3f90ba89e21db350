"""Preloads with a real registry and the real command, also after a kill."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.images import BuiltImage, make_image
from tests.system.processes import Process, run
from tests.system.relay import Relay
from tests.system.servers import Daemon, Registry, resumable_bytes

pytestmark = pytest.mark.timeout(120)

MB = 1_000_000
MakeDaemon = Callable[..., Daemon]


@pytest.fixture
def large_image(registry: Registry, directory: Path) -> BuiltImage:
    """An image of 33 MB, most of it in one layer."""
    image = make_image(directory / "large", repository="me/large", layer_sizes=(2 * MB, 30 * MB))
    image.push(registry.address)
    return image


@pytest.fixture
def write_config(directory: Path) -> Callable[[str], Path]:
    def write(url: str) -> Path:
        path = directory / "pullcache.toml"
        path.write_text(
            f'store = {{path = "{directory}/store", min_free = "0B"}}\n'
            f'upstreams."docker.io".url = "{url}"\n'
        )
        return path

    return write


def test_a_preload_after_a_kill_fetches_only_the_missing_bytes(
    registry: Registry,
    large_image: BuiltImage,
    directory: Path,
    write_config: Callable[[str], Path],
):
    command = [sys.executable, "-m", "proxy", "preload", "me/large:latest"]
    with Relay(registry.address, 5 * MB) as relay:
        argv = [*command, "-c", str(write_config(relay.url))]
        process = Process(directory, "preload", argv)
        try:
            process.wait_until(
                lambda: resumable_bytes(directory / "store") > 10 * MB, "the middle of a layer"
            )
        finally:
            process.kill()
        kept = resumable_bytes(directory / "store")
        assert 10 * MB < kept < 30 * MB
        relay.rate = 0
        before = relay.received
        lines = run(*argv, "--json").splitlines()
        fetched = relay.received - before
        again = json.loads(run(*argv, "--json").splitlines()[-1])
        fetched_again = relay.received - before - fetched
    totals = json.loads(lines[-1])
    assert (totals["event"], totals["fetched_images"], totals["failed"]) == ("totals", 1, 0)
    assert fetched < 34 * MB - kept
    assert totals["fetched"] <= fetched
    assert (again["up_to_date"], again["fetched"]) == (1, 0)
    assert fetched_again < 20_000
    blobs = directory / "store" / "blobs" / "sha256"
    run("sh", "-c", f'cd {blobs} && for file in *; do echo "$file  $file"; done | sha256sum -c')


def test_a_preloaded_compose_file_is_pulled_for_two_platforms_without_the_registry(
    upstream: Registry, daemon: Daemon, image: BuiltImage, directory: Path
):
    second = make_image(directory / "second", repository="me/second", tag="v2")
    second.push(upstream.address)
    compose = directory / "compose.yaml"
    compose.write_text(
        f"services:\n  one: {{image: {image.reference}}}\n  two: {{image: me/second:v2}}\n"
    )
    platforms = ["--platform", "linux/amd64", "--platform", "linux/arm64"]
    output = daemon.run("preload", "-f", compose, *platforms, "--lock", directory / "images.lock")
    assert output.count("Pull complete") == 2
    daemon.run("check-offline", "-f", compose, *platforms)
    daemon.run("check-offline", "-f", directory / "images.lock")
    upstream.stop()
    for one in (image, second):
        source = f"docker://{daemon.address}/{one.repository}:{one.tag}"
        run(
            "skopeo",
            "copy",
            "--all",
            "--src-tls-verify=false",
            source,
            f"dir:{directory}/{one.tag}",
        )
        manifest = json.loads((directory / one.tag / "manifest.json").read_text())
        assert len(manifest["manifests"]) == 2
