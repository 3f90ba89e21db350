"""Two real registries, one of them private, behind one cache."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.system.clients import Buildah, Client, Containerd, Docker, Podman, Skopeo
from tests.system.http_client import has_status, send_request
from tests.system.images import BuiltImage, make_image
from tests.system.processes import eventually
from tests.system.servers import Daemon, Registry, htpasswd_auth

NAME = "private.test"
UPSTREAMS = """\
[upstreams."docker.io"]
url = "{public}"
[upstreams."private.test"]
url = "{private}"
username = "puller"
password_file = "{password}"
"""


@pytest.fixture
def private_registry(directory: Path) -> Iterator[tuple[Registry, BuiltImage]]:
    """A registry that requires a login, and an image in it."""
    server = Registry(directory / "private")
    server.start()
    image = make_image(directory / "secret", prints="a private image")
    image.push(server.address)
    server.stop()
    server.auth = htpasswd_auth(directory)
    server.start()
    yield server, image
    server.stop()


@pytest.fixture
def both(
    directory: Path,
    upstream: Registry,
    private_registry: tuple[Registry, BuiltImage],
    make_daemon: Callable[..., Daemon],
) -> Daemon:
    """A daemon with both registries as upstreams."""
    password, config = directory / "password", directory / "pullcache.toml"
    password.write_text("pull me\n")
    server, _ = private_registry
    config.write_text(UPSTREAMS.format(public=upstream.url, private=server.url, password=password))
    return make_daemon(upstream.url, env={"PULLCACHE_CONFIG": str(config)})


def test_the_private_registry_denies_access_without_a_login(
    private_registry: tuple[Registry, BuiltImage],
):
    """The control: the image needs the cache's credentials."""
    server, image = private_registry
    path = f"/v2/{image.repository}/manifests/{image.tag}"
    assert send_request(server.url, path).status == 401


def test_two_registries_are_served_each_with_its_own_credentials(
    both: Daemon, image: BuiltImage, private_registry: tuple[Registry, BuiltImage]
):
    _, secret = private_registry
    for path, expected in (
        (f"/v2/{image.repository}/manifests/{image.tag}", image),
        (f"/v2/{NAME}/{secret.repository}/manifests/{secret.tag}", secret),
        (f"/v2/{secret.repository}/manifests/{secret.tag}?ns={NAME}", secret),
    ):
        response = send_request(both.url, path)
        assert response.status == 200
        assert response.headers["Docker-Content-Digest"] == expected.index
    assert "pull me" not in both.log


def test_a_private_layer_is_not_served_under_a_public_name(
    both: Daemon, image: BuiltImage, private_registry: tuple[Registry, BuiltImage]
):
    _, secret = private_registry
    layer = max({secret.config, *secret.layers} - set(image.layers))
    private_path = f"/v2/{NAME}/{secret.repository}/blobs/{layer}"
    assert (
        send_request(both.url, f"/v2/{NAME}/{secret.repository}/manifests/{secret.manifest}").status
        == 200
    )
    assert send_request(both.url, private_path).status == 200
    for method in ("GET", "HEAD"):
        public_path = f"/v2/{image.repository}/blobs/{layer}"
        assert send_request(both.url, public_path, method=method).status == 404


@pytest.mark.parametrize(
    "kind", [Containerd, Podman, Buildah, Skopeo], ids=lambda kind: kind.__name__
)
def test_clients_pull_from_the_second_registry(
    kind: type[Client],
    both: Daemon,
    private_registry: tuple[Registry, BuiltImage],
    make_client: Callable[[type[Client], str], Client],
):
    """containerd names the upstream by `ns=`, the other clients by the path."""
    server, secret = private_registry
    secret = replace(secret, registry=NAME)
    client = make_client(kind, both.address)
    for _ in range(2):
        client.pull(secret)
        assert client.run(secret).strip() == secret.prints
        client.remove(secret)
        server.stop()
    assert both.metric("pullcache_requests_total", upstream=NAME, kind="blob") >= 1


@pytest.mark.parametrize("kind", [Docker, Podman], ids=lambda kind: kind.__name__)
def test_a_pull_fails_at_once_while_the_upstream_is_down_and_then_works_again(
    kind: type[Client],
    upstream: Registry,
    daemon: Daemon,
    image: BuiltImage,
    make_client: Callable[[type[Client], str], Client],
):
    client = make_client(kind, daemon.address)
    upstream.stop()
    with pytest.raises(AssertionError):
        client.pull(image)
    assert daemon.metric("pullcache_requests_total", kind="manifest", status="503") >= 1
    upstream.start()
    path = f"/v2/{image.repository}/manifests/{image.tag}"
    eventually(lambda: has_status(daemon.url, path), "the daemon notices that upstream is up")
    client.pull(image)
    assert client.run(image).strip() == image.prints
