"""Real clients pull and run an image through the cache, with and without its upstream."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.clients import Client, Containerd, Docker, Podman
from tests.system.images import BuiltImage, make_image
from tests.system.servers import Daemon, Registry

MakeClient = Callable[[type[Client], str], Client]
ALWAYS_REVALIDATE = {"PULLCACHE_MANIFESTS_TTL": "0s"}  # not for `latest`, whose TTL is another key


@pytest.mark.each_client
def test_the_image_runs_without_the_cache(
    kind: type[Client], upstream: Registry, image: BuiltImage, make_client: MakeClient
):
    """The control: if this fails, the client or the registry of this machine is at fault."""
    client = make_client(kind, upstream.address)
    client.pull(image)
    assert client.run(image).strip() == image.prints


@pytest.mark.each_client
def test_a_cached_image_is_pulled_and_run_again_without_the_upstream(
    kind: type[Client],
    upstream: Registry,
    daemon: Daemon,
    image: BuiltImage,
    make_client: MakeClient,
):
    client = make_client(kind, daemon.address)
    client.pull(image)
    assert client.run(image).strip() == image.prints
    requests, fetched = upstream.requests(), daemon.upstream_bytes()
    assert fetched > sum(len(image.bytes_of(layer)) for layer in image.layers)
    client.remove(image)
    upstream.stop()
    client.pull(image)
    assert client.run(image).strip() == image.prints
    assert daemon.upstream_bytes() == fetched
    assert upstream.requests() == requests


@pytest.mark.each_client.with_args(Docker)
def test_a_build_takes_its_base_image_from_the_cache_also_without_the_upstream(
    kind: type[Client],
    upstream: Registry,
    daemon: Daemon,
    image: BuiltImage,
    make_client: MakeClient,
    directory: Path,
):
    context = directory / "context"
    context.mkdir()
    # A layer of its own, so that the base image is needed.
    (context / "Dockerfile").write_text("FROM hello\nCOPY Dockerfile /\n")
    client = make_client(kind, daemon.address)
    assert isinstance(client, Docker)
    client.build(context, "built")
    fetched = daemon.upstream_bytes()
    assert fetched > sum(len(image.bytes_of(layer)) for layer in image.layers)
    upstream.stop()
    client.build(context, "built")
    assert daemon.upstream_bytes() == fetched
    assert daemon.metric("pullcache_requests_total", kind="blob", cache="hit") >= 1


@pytest.mark.each_client(Docker, Containerd, Podman)
def test_an_expired_tag_is_served_stale_without_the_upstream(
    kind: type[Client],
    registry: Registry,
    make_daemon: Callable[..., Daemon],
    make_client: MakeClient,
    directory: Path,
):
    image = make_image(directory / "stable", tag="stable")
    image.push(registry.address)
    daemon = make_daemon(registry.url, env=ALWAYS_REVALIDATE)
    client = make_client(kind, daemon.address)
    client.pull(image)
    client.remove(image)
    registry.stop()
    client.pull(image)
    assert client.run(image).strip() == image.prints
    assert daemon.metric("pullcache_requests_total", kind="manifest", cache="stale") >= 1


def test_a_moved_tag_is_pulled_again(
    registry: Registry,
    make_daemon: Callable[..., Daemon],
    make_client: MakeClient,
    directory: Path,
):
    daemon = make_daemon(registry.url, env=ALWAYS_REVALIDATE)
    client = make_client(Docker, daemon.address)
    for version in ("first", "second"):
        image = make_image(directory / version, tag="stable", prints=version)
        image.push(registry.address)
        client.pull(image)
        assert client.run(image).strip() == version


def test_docker_pulls_all_tags_of_a_repository_and_a_tag_with_its_digest(
    upstream: Registry, daemon: Daemon, image: BuiltImage, make_client: MakeClient
):
    for tag in ("v1", "v2"):
        image.push(upstream.address, tag)
    client = make_client(Docker, daemon.address)
    assert isinstance(client, Docker)
    pulled = client.pull_name("--all-tags", "hello")
    assert sorted(line.split()[0] for line in pulled.splitlines()) == ["latest", "v1", "v2"]
    client = make_client(Docker, daemon.address)
    assert isinstance(client, Docker)
    assert image.index in client.pull_name(f"hello:v1@{image.index}")
