"""Private images of docker-registry with a token server, pulled with the cache's credentials."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.clients import Client, Containerd, Docker, Podman, Skopeo
from tests.system.http_client import HttpResponse, send_request
from tests.system.images import BuiltImage, make_image
from tests.system.processes import eventually
from tests.system.servers import Daemon, Registry
from tests.system.token_server import PASSWORD, USER, TokenServer

MakeDaemon = Callable[..., Daemon]
NO_PREFETCH = {"PULLCACHE_FETCH_PREFETCH": "off"}


@pytest.fixture
def private_image(directory: Path) -> BuiltImage:
    """An image of four blobs."""
    return make_image(
        directory / "secret", repository="me/secret", layer_sizes=(1 << 10, 300 << 10)
    )


@pytest.fixture
def tokens(directory: Path, private_image: BuiltImage) -> Iterator[TokenServer]:
    with TokenServer(directory) as server:
        server.repositories.add(private_image.repository)
        yield server


@pytest.fixture
def private_registry(
    registry: Registry, tokens: TokenServer, private_image: BuiltImage, image: BuiltImage
) -> Registry:
    """docker-registry with two images: `USER` has access to `private_image`, but not to `image`."""
    private_image.push(registry.address)
    image.push(registry.address)
    registry.stop()
    registry.auth = tokens.auth
    registry.start()
    return registry


@pytest.fixture
def make_daemon_with_login(private_registry: Registry, make_daemon: MakeDaemon) -> MakeDaemon:
    """Start a daemon with `private_registry` as docker.io, and with credentials for it."""

    def make(password: str = PASSWORD, **env: str) -> Daemon:
        credentials = {
            "PULLCACHE_UPSTREAMS_DOCKER_IO_USERNAME": USER,
            "PULLCACHE_UPSTREAMS_DOCKER_IO_PASSWORD": password,
        }
        return make_daemon(private_registry.url, env={**credentials, **env})

    return make


def get_manifest(daemon: Daemon, image: BuiltImage, reference: str = "") -> HttpResponse:
    return send_request(daemon.url, f"/v2/{image.repository}/manifests/{reference or image.tag}")


def get_blob(daemon: Daemon, repository: str, digest: str, method: str = "GET") -> HttpResponse:
    return send_request(daemon.url, f"/v2/{repository}/blobs/{digest}", method=method)


def code_and_message(response: HttpResponse) -> tuple[str, str]:
    (error,) = json.loads(response.body)["errors"]
    return error["code"], error["message"]


def test_the_registry_serves_the_image_only_with_a_token(
    private_registry: Registry, tokens: TokenServer, private_image: BuiltImage
):
    """The control for the other tests."""
    path = f"/v2/{private_image.repository}/blobs/{private_image.config}"
    assert send_request(private_registry.url, path).status == 401
    scope = f"repository:{private_image.repository}:pull"
    for user, status in ((USER, 200), ("", 401)):
        bearer = {"Authorization": f"Bearer {tokens.issue(scope, user)}"}
        assert send_request(private_registry.url, path, headers=bearer).status == status


@pytest.mark.parametrize(
    "kind", [Docker, Skopeo, Containerd, Podman], ids=lambda kind: kind.__name__
)
def test_a_pull_of_four_blobs_needs_one_token(
    kind: type[Client],
    tokens: TokenServer,
    private_image: BuiltImage,
    make_daemon_with_login: MakeDaemon,
    make_client: Callable[[type[Client], str], Client],
):
    client = make_client(kind, make_daemon_with_login().address)
    client.pull(private_image)
    assert client.run(private_image).strip() == private_image.prints
    assert [(one.scope, one.user) for one in tokens.requests] == [
        (f"repository:{private_image.repository}:pull", USER)
    ]


def test_a_token_that_expires_during_a_pull_is_renewed(
    private_registry: Registry,
    tokens: TokenServer,
    private_image: BuiltImage,
    make_daemon_with_login: MakeDaemon,
):
    tokens.lifetime = 2
    daemon = make_daemon_with_login(**NO_PREFETCH)
    assert get_manifest(daemon, private_image).status == 200
    assert get_manifest(daemon, private_image, private_image.manifest).status == 200
    (first,) = tokens.requests
    path = f"/v2/{private_image.repository}/blobs/{private_image.config}"
    bearer = {"Authorization": f"Bearer {first.token}"}
    eventually(
        lambda: send_request(private_registry.url, path, headers=bearer).status == 401,
        "the token expires",
    )
    tokens.lifetime = 300
    for digest in (private_image.config, *private_image.layers):
        assert get_blob(daemon, private_image.repository, digest).sha256 == digest
    assert len(tokens.requests) == 2


def test_a_wrong_password_is_reported_as_the_cache_s_and_clients_are_not_asked_for_theirs(
    tokens: TokenServer, private_image: BuiltImage, make_daemon_with_login: MakeDaemon
):
    daemon = make_daemon_with_login(password="wrong password")
    responses = [
        send_request(daemon.url, "/v2/"),
        get_manifest(daemon, private_image),
        get_manifest(daemon, private_image, private_image.manifest),
        get_blob(daemon, private_image.repository, private_image.config),
    ]
    assert [response.status for response in responses] == [200, 404, 404, 404]
    assert not [one for one in responses if "WWW-Authenticate" in one.headers]
    for response in responses[1:3]:
        code, message = code_and_message(response)
        assert code == "NAME_UNKNOWN"
        assert "rejected the configured credentials: incorrect password" in message
    assert {one.user for one in tokens.requests} == {None}
    assert "wrong password" not in daemon.log


@pytest.mark.parametrize("has_access", [True, False], ids=["with access", "without access"])
def test_a_blob_is_not_served_in_a_repository_that_does_not_have_it(
    tokens: TokenServer,
    private_image: BuiltImage,
    image: BuiltImage,
    make_daemon_with_login: MakeDaemon,
    has_access: bool,
):
    if has_access:
        tokens.repositories.add(image.repository)
    daemon = make_daemon_with_login()
    layer = private_image.layers[-1]
    assert get_manifest(daemon, private_image, private_image.manifest).status == 200
    assert get_blob(daemon, private_image.repository, layer).sha256 == layer
    assert get_manifest(daemon, image).status == (200 if has_access else 404)
    for method in ("GET", "HEAD"):
        assert get_blob(daemon, image.repository, layer, method).status == 404


def test_a_layer_shared_by_two_repositories_costs_a_proof_and_no_transfer(
    private_registry: Registry,
    tokens: TokenServer,
    private_image: BuiltImage,
    image: BuiltImage,
    make_daemon_with_login: MakeDaemon,
):
    tokens.repositories.add(image.repository)
    daemon = make_daemon_with_login(**NO_PREFETCH)
    (shared,) = {*private_image.layers} & {*image.layers}
    assert get_blob(daemon, private_image.repository, shared).sha256 == shared
    fetched, requests = daemon.upstream_bytes(), len(private_registry.requests())
    assert get_blob(daemon, image.repository, shared).sha256 == shared
    assert daemon.upstream_bytes() == fetched
    path = f"/v2/{image.repository}/blobs/{shared}"
    assert {*private_registry.requests()[requests:]} == {f"GET {path}"}
