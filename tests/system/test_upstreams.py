"""Two real registries at once, one of them private, behind one address."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.system.clients import Buildah, Client, Containerd, Docker, Podman, Skopeo
from tests.system.images import Image, make_image
from tests.system.servers import Daemon, Registry, by_password
from tests.system.wire import ask

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
def private(place: Path) -> Iterator[tuple[Registry, Image]]:
    """A registry that nobody reads without a login, and an image in it."""
    server = Registry(place / "private")
    server.start()
    image = make_image(place / "secret", prints="for those who may")
    image.push(server.address)
    server.stop()
    server.auth = by_password(place)
    server.start()
    yield server, image
    server.stop()


@pytest.fixture
def both(
    place: Path,
    upstream: Registry,
    private: tuple[Registry, Image],
    make_daemon: Callable[..., Daemon],
) -> Daemon:
    """pullcache before both registries."""
    password, config = place / "password", place / "pullcache.toml"
    password.write_text("pull me\n")
    server, _ = private
    config.write_text(UPSTREAMS.format(public=upstream.url, private=server.url, password=password))
    return make_daemon(upstream.url, env={"PULLCACHE_CONFIG": str(config)})


def test_a_private_registry_refuses_who_has_no_login(private: tuple[Registry, Image]):
    """The control: without the cache's login nobody gets the image."""
    server, image = private
    path = f"/v2/{image.repository}/manifests/{image.tag}"
    assert ask(server.url, path).status == 401


def test_two_registries_are_served_at_once_each_with_its_own_login(
    both: Daemon, image: Image, private: tuple[Registry, Image]
):
    _, secret = private
    for path, wanted in (
        (f"/v2/{image.repository}/manifests/{image.tag}", image),
        (f"/v2/{NAME}/{secret.repository}/manifests/{secret.tag}", secret),
        (f"/v2/{secret.repository}/manifests/{secret.tag}?ns={NAME}", secret),
    ):
        answer = ask(both.url, path)
        assert answer.status == 200
        assert answer.headers["Docker-Content-Digest"] == wanted.index
    assert "pull me" not in both.log


def test_a_private_layer_is_not_served_under_a_public_name(
    both: Daemon, image: Image, private: tuple[Registry, Image]
):
    _, secret = private
    layer = max({secret.config, *secret.layers} - set(image.layers))
    theirs = f"/v2/{NAME}/{secret.repository}/blobs/{layer}"
    assert (
        ask(both.url, f"/v2/{NAME}/{secret.repository}/manifests/{secret.manifest}").status == 200
    )
    assert ask(both.url, theirs).status == 200
    for method in ("GET", "HEAD"):
        ours = f"/v2/{image.repository}/blobs/{layer}"
        assert ask(both.url, ours, method=method).status == 404


@pytest.mark.parametrize(
    "kind", [Containerd, Podman, Buildah, Skopeo], ids=lambda kind: kind.__name__
)
def test_a_client_of_a_second_registry_gets_its_image(
    kind: type[Client],
    both: Daemon,
    private: tuple[Registry, Image],
    make_client: Callable[[type[Client], str], Client],
):
    """containerd names the registry by `ns=`, the others by the path."""
    server, secret = private
    secret = replace(secret, registry=NAME)
    client = make_client(kind, both.address)
    for _ in range(2):
        client.pull(secret)
        assert client.run(secret).strip() == secret.prints
        client.remove(secret)
        server.stop()
    assert both.metric("pullcache_requests_total", upstream=NAME, kind="blob") >= 1


@pytest.mark.parametrize("kind", [Docker, Podman], ids=lambda kind: kind.__name__)
def test_a_client_whose_mirror_has_no_upstream_is_told_at_once(
    kind: type[Client],
    upstream: Registry,
    daemon: Daemon,
    image: Image,
    make_client: Callable[[type[Client], str], Client],
):
    client = make_client(kind, daemon.address)
    upstream.stop()
    with pytest.raises(AssertionError):
        client.pull(image)
    assert daemon.metric("pullcache_requests_total", kind="manifest", status="503") >= 1
    upstream.start()
    while ask(daemon.url, f"/v2/{image.repository}/manifests/{image.tag}").status != 200:
        pass
    client.pull(image)
    assert client.run(image).strip() == image.prints
