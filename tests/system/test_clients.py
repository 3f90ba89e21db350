"""Real clients pull and run an image through the cache, then again without its upstream."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.clients import CLIENTS, Client, Containerd, Docker, Podman
from tests.system.images import Image, make_image
from tests.system.servers import Daemon, Registry

MakeClient = Callable[[type[Client], str], Client]
ALWAYS_ASK = {"PULLCACHE_MANIFESTS_TTL": "0s"}  # but for `latest`, which has a TTL of its own
each_client = pytest.mark.parametrize("kind", CLIENTS, ids=lambda kind: kind.__name__)


@each_client
def test_the_image_runs_without_us(
    kind: type[Client], upstream: Registry, image: Image, make_client: MakeClient
):
    """The control: when this fails, the machine's client or registry is at fault."""
    client = make_client(kind, upstream.address)
    client.pull(image)
    assert client.run(image).strip() == image.prints


@each_client
def test_a_pulled_image_runs_again_after_the_upstream_is_gone(
    kind: type[Client], upstream: Registry, daemon: Daemon, image: Image, make_client: MakeClient
):
    client = make_client(kind, daemon.address)
    client.pull(image)
    assert client.run(image).strip() == image.prints
    asked, fetched = upstream.requests(), daemon.upstream_bytes()
    assert fetched > sum(len(image.bytes_of(layer)) for layer in image.layers)
    client.remove(image)
    upstream.stop()
    client.pull(image)
    assert client.run(image).strip() == image.prints
    assert daemon.upstream_bytes() == fetched
    assert upstream.requests() == asked


@pytest.mark.parametrize("kind", [Docker, Containerd, Podman], ids=lambda kind: kind.__name__)
def test_a_tag_that_expired_is_served_while_the_upstream_is_gone(
    kind: type[Client],
    registry: Registry,
    make_daemon: Callable[..., Daemon],
    make_client: MakeClient,
    place: Path,
):
    image = make_image(place / "stable", tag="stable")
    image.push(registry.address)
    daemon = make_daemon(registry.url, env=ALWAYS_ASK)
    client = make_client(kind, daemon.address)
    client.pull(image)
    client.remove(image)
    registry.stop()
    client.pull(image)
    assert client.run(image).strip() == image.prints
    assert daemon.metric("pullcache_requests_total", kind="manifest", cache="stale") >= 1


def test_a_tag_that_moved_is_pulled_anew(
    registry: Registry,
    make_daemon: Callable[..., Daemon],
    make_client: MakeClient,
    place: Path,
):
    daemon = make_daemon(registry.url, env=ALWAYS_ASK)
    client = make_client(Docker, daemon.address)
    for version in ("first", "second"):
        image = make_image(place / version, tag="stable", prints=version)
        image.push(registry.address)
        client.pull(image)
        assert client.run(image).strip() == version
