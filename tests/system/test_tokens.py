"""Debian's docker-registry with a token server: private images, by the login of the cache."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.clients import Client, Containerd, Docker, Podman, Skopeo
from tests.system.images import Image, make_image
from tests.system.processes import eventually
from tests.system.servers import Daemon, Registry
from tests.system.tokens import PASSWORD, USER, TokenServer
from tests.system.wire import Answer, ask

MakeDaemon = Callable[..., Daemon]
# Nothing is fetched but what is asked for, so that the tests say when.
AS_ASKED = {"PULLCACHE_FETCH_PREFETCH": "off"}


@pytest.fixture
def secret(place: Path) -> Image:
    """An image of four blobs."""
    return make_image(place / "secret", repository="me/secret", layer_sizes=(1 << 10, 300 << 10))


@pytest.fixture
def tokens(place: Path, secret: Image) -> Iterator[TokenServer]:
    with TokenServer(place) as server:
        server.repositories.add(secret.repository)
        yield server


@pytest.fixture
def private(registry: Registry, tokens: TokenServer, secret: Image, image: Image) -> Registry:
    """docker-registry with `secret` in it, and `image` that is nobody's."""
    secret.push(registry.address)
    image.push(registry.address)
    registry.stop()
    registry.auth = tokens.auth
    registry.start()
    return registry


@pytest.fixture
def make_private(private: Registry, make_daemon: MakeDaemon) -> MakeDaemon:
    """Start pullcache in front of `private`, with a login."""

    def make(password: str = PASSWORD, **env: str) -> Daemon:
        login = {"USERNAME": USER, "PASSWORD": password}
        named = {f"PULLCACHE_UPSTREAMS_DOCKER_IO_{key}": value for key, value in login.items()}
        return make_daemon(private.url, env={**named, **env})

    return make


def manifest(daemon: Daemon, image: Image, reference: str = "") -> Answer:
    return ask(daemon.url, f"/v2/{image.repository}/manifests/{reference or image.tag}")


def blob(daemon: Daemon, repository: str, digest: str, method: str = "GET") -> Answer:
    return ask(daemon.url, f"/v2/{repository}/blobs/{digest}", method=method)


def said(answer: Answer) -> tuple[str, str]:
    (error,) = json.loads(answer.body)["errors"]
    return error["code"], error["message"]


def test_the_registry_shows_the_image_only_with_a_token(
    private: Registry, tokens: TokenServer, secret: Image
):
    """The control: what follows rests on it."""
    path = f"/v2/{secret.repository}/blobs/{secret.config}"
    assert ask(private.url, path).status == 401
    scope = f"repository:{secret.repository}:pull"
    for user, status in ((USER, 200), ("", 401)):
        bearer = {"Authorization": f"Bearer {tokens.issue(scope, user)}"}
        assert ask(private.url, path, headers=bearer).status == status


@pytest.mark.parametrize(
    "kind", [Docker, Skopeo, Containerd, Podman], ids=lambda kind: kind.__name__
)
def test_a_pull_of_four_blobs_costs_one_token(
    kind: type[Client],
    tokens: TokenServer,
    secret: Image,
    make_private: MakeDaemon,
    make_client: Callable[[type[Client], str], Client],
):
    client = make_client(kind, make_private().address)
    client.pull(secret)
    assert client.run(secret).strip() == secret.prints
    assert [(one.scope, one.user) for one in tokens.requests] == [
        (f"repository:{secret.repository}:pull", USER)
    ]


def test_a_token_that_expires_in_the_midst_of_a_pull_is_renewed(
    private: Registry, tokens: TokenServer, secret: Image, make_private: MakeDaemon
):
    tokens.lifetime = 2
    daemon = make_private(**AS_ASKED)
    assert manifest(daemon, secret).status == 200
    assert manifest(daemon, secret, secret.manifest).status == 200
    (first,) = tokens.requests
    path = f"/v2/{secret.repository}/blobs/{secret.config}"
    bearer = {"Authorization": f"Bearer {first.token}"}
    eventually(lambda: ask(private.url, path, headers=bearer).status == 401, "the token's end")
    tokens.lifetime = 300
    for digest in (secret.config, *secret.layers):
        assert blob(daemon, secret.repository, digest).sha256 == digest
    assert len(tokens.requests) == 2


def test_a_wrong_password_is_said_to_be_the_cache_s_and_no_client_is_asked_for_one(
    tokens: TokenServer, secret: Image, make_private: MakeDaemon
):
    daemon = make_private(password="not the one")
    answers = [
        ask(daemon.url, "/v2/"),
        manifest(daemon, secret),
        manifest(daemon, secret, secret.manifest),
        blob(daemon, secret.repository, secret.config),
    ]
    assert [answer.status for answer in answers] == [200, 404, 404, 404]
    assert not [one for one in answers if "WWW-Authenticate" in one.headers]
    for answer, wanted in zip(answers[1:3], ("NAME_UNKNOWN", "NAME_UNKNOWN"), strict=True):
        code, message = said(answer)
        assert code == wanted
        assert "rejected the configured credentials: incorrect password" in message
    assert {one.user for one in tokens.requests} == {None}
    assert "not the one" not in daemon.log


@pytest.mark.parametrize("may_pull", [True, False], ids=["its own", "nobody's"])
def test_a_private_blob_is_not_served_under_another_name(
    tokens: TokenServer, secret: Image, image: Image, make_private: MakeDaemon, may_pull: bool
):
    if may_pull:
        tokens.repositories.add(image.repository)
    daemon = make_private()
    layer = secret.layers[-1]
    assert manifest(daemon, secret, secret.manifest).status == 200
    assert blob(daemon, secret.repository, layer).sha256 == layer
    assert manifest(daemon, image).status == (200 if may_pull else 404)
    for method in ("GET", "HEAD"):
        assert blob(daemon, image.repository, layer, method).status == 404


def test_a_layer_that_both_hold_costs_a_head_and_no_bytes(
    private: Registry, tokens: TokenServer, secret: Image, image: Image, make_private: MakeDaemon
):
    tokens.repositories.add(image.repository)
    daemon = make_private(**AS_ASKED)
    (shared,) = {*secret.layers} & {*image.layers}
    assert blob(daemon, secret.repository, shared).sha256 == shared
    fetched, asked = daemon.upstream_bytes(), len(private.requests())
    assert blob(daemon, image.repository, shared).sha256 == shared
    assert daemon.upstream_bytes() == fetched
    path = f"/v2/{image.repository}/blobs/{shared}"
    assert {*private.requests()[asked:]} == {f"HEAD {path}"}
