"""Policies with real clients: what is refused is not pulled by another way, and the client says why."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from tests.fakes.hub import HubRepository
from tests.system.clients import (
    Buildah,
    Client,
    Containerd,
    DockerWithContainerdStore,
    Podman,
    Skopeo,
    SkopeoDirect,
)
from tests.system.http_client import send_request
from tests.system.hub import HubServer
from tests.system.images import BuiltImage, make_image
from tests.system.processes import eventually
from tests.system.servers import Daemon, Registry

MakeClient = Callable[..., Client]
MakeDaemon = Callable[..., Daemon]

StartDaemon = Callable[[str], Daemon]

TRUSTED = """\
[[policy]]
images = ["docker.io/*"]
mode = "{mode}"
trusted = ["official", "verified_publisher"]
"""
RIPE_IN_20_SECONDS = """\
[manifests]
ttl = "0s"

[[policy]]
images = ["*"]
mode = "enforce"
min_age = "20s"
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = HubServer()
    server.hub.repositories += [
        HubRepository("acme/app"),
        HubRepository("grafana/grafana", "verified_publisher", "Grafana Labs"),
    ]
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def community(tmp_path_factory: pytest.TempPathFactory) -> BuiltImage:
    """An image of a publisher that Docker Hub does not vouch for."""
    return make_image(tmp_path_factory.mktemp("community") / "image", repository="acme/app")


@pytest.fixture
def start_daemon(
    upstream: Registry,
    community: BuiltImage,
    hub: HubServer,
    make_daemon: MakeDaemon,
    directory: Path,
) -> StartDaemon:
    """Start a daemon with policies in front of a registry with an official and a community image."""
    community.push(upstream.address)
    numbers = count()

    def start(policies: str) -> Daemon:
        config = directory / f"pullcache{next(numbers)}.toml"
        facts = f'[upstreams."docker.io"]\nurl = "{upstream.url}"\nfacts_url = "{hub.url}"\n'
        config.write_text(f"{policies}\n{facts}")
        return make_daemon(upstream.url, env={"PULLCACHE_CONFIG": str(config)})

    return start


# Every client whose files can restrict it to the cache. Of docker it is the one with the containerd store.
RESTRICTED = (Containerd, DockerWithContainerdStore, Podman, Buildah, Skopeo)


@pytest.fixture
def make_restricted(
    make_client: MakeClient, upstream: Registry
) -> Callable[[type[Client], Daemon], Client]:
    """Return a function that makes a client with the files of `client-config --only`."""

    def make(kind: type[Client], daemon: Daemon) -> Client:
        client = make_client(kind, daemon.address, fallback=upstream.url, only=True)
        if isinstance(client, DockerWithContainerdStore) and client.version() < (28,):
            pytest.skip(
                "docker before 28 does not read hosts.toml, so it cannot be restricted to the cache"
            )
        return client

    return make


def refusal(client: Client, image: BuiltImage) -> str:
    """Return what the client prints when it cannot pull the image."""
    with pytest.raises(AssertionError) as refused:
        client.pull(image)
    return str(refused.value).replace("\\", "")


@pytest.mark.each_client(*RESTRICTED)
def test_a_refused_image_is_pulled_by_no_other_way_and_after_an_exception(
    kind: type[Client],
    upstream: Registry,
    image: BuiltImage,
    community: BuiltImage,
    start_daemon: StartDaemon,
    make_restricted: Callable[[type[Client], Daemon], Client],
):
    daemon = start_daemon(TRUSTED.format(mode="enforce"))
    client = make_restricted(kind, daemon)
    direct = upstream.direct_requests()
    client.pull(image)
    assert client.run(image).strip() == image.prints
    for refused in (community, replace(community, tag="")):
        printed = refusal(client, refused)
        assert 'policy 1 ("docker.io/*") refuses acme/app' in printed
        assert "it is neither official, nor of a verified publisher" in printed
    name = f"acme/app@{community.index}"
    daemon.run("policy except", name, "--for", "1h", "--reason", "a fix")
    client.pull(community)
    assert client.run(community).strip() == community.prints
    assert upstream.direct_requests() == direct


def test_without_the_files_a_client_goes_to_the_registry_for_what_is_refused(
    upstream: Registry,
    community: BuiltImage,
    start_daemon: StartDaemon,
    make_client: MakeClient,
):
    """The control of the test above, and the reason for `--only`."""
    daemon = start_daemon(TRUSTED.format(mode="enforce"))
    client = make_client(Containerd, daemon.address, fallback=upstream.url)
    direct = len(upstream.direct_requests())
    client.pull(community)
    assert len(upstream.direct_requests()) > direct


@pytest.mark.each_client(*RESTRICTED)
def test_audit_serves_everything_and_tells_what_would_be_refused(
    kind: type[Client],
    image: BuiltImage,
    community: BuiltImage,
    start_daemon: StartDaemon,
    make_restricted: Callable[[type[Client], Daemon], Client],
):
    daemon = start_daemon(TRUSTED.format(mode="audit"))
    client = make_restricted(kind, daemon)
    for pulled in (image, community):
        client.pull(pulled)
        assert client.run(pulled).strip() == pulled.prints
    decisions = json.loads(daemon.run("policy decisions", "--json"))
    assert {one["decision"] for one in decisions} == {"would_deny"}
    assert "docker.io/acme/app:latest" in {one["image"] for one in decisions}
    assert all(one["image"].startswith("docker.io/acme/app") for one in decisions)


@pytest.mark.each_client(SkopeoDirect, DockerWithContainerdStore)
def test_facts_let_another_cache_decide_offline(
    kind: type[Client],
    upstream: Registry,
    image: BuiltImage,
    community: BuiltImage,
    hub: HubServer,
    start_daemon: StartDaemon,
    make_restricted: Callable[[type[Client], Daemon], Client],
    directory: Path,
):
    verified = replace(community, repository="grafana/grafana")
    verified.push(upstream.address)
    here = start_daemon(TRUSTED.format(mode="audit"))
    names = ("hello", "acme/app", "grafana/grafana")
    here.run("preload", "--all-platforms", *names)
    # Docker Hub is asked one question after another.
    eventually(lambda: "verified" in here.run("images", "grafana/*"), "facts about grafana/grafana")
    bundle = directory / "images.tar"
    here.run("export", "--facts", *names, "-o", bundle)
    upstream.stop()
    hub.hub.log.requests.clear()
    offline = start_daemon("offline = true\n" + TRUSTED.format(mode="enforce"))
    offline.run("import", bundle)
    client = make_restricted(kind, offline)
    for allowed in (image, verified):
        client.pull(allowed)
    assert "it is neither official, nor of a verified publisher" in refusal(client, community)
    inspected = offline.run("inspect", "grafana/grafana")
    assert re.search(
        r"trust\s+verified \(Grafana Labs\) \(bundle of 20..-..-.., .* ago\)", inspected
    )
    assert not hub.hub.requests


def test_a_tag_that_moves_means_its_old_content_until_the_new_one_is_old_enough(
    registry: Registry, start_daemon: StartDaemon, make_client: MakeClient, directory: Path
):
    old = make_image(directory / "old", repository="library/app", tag="v1", prints="old")
    new = make_image(directory / "new", repository="library/app", tag="v1", prints="new")
    old.push(registry.address)
    daemon = start_daemon(RIPE_IN_20_SECONDS)
    client = make_client(SkopeoDirect, daemon.address)

    def pulled() -> str:
        client.pull(old)
        printed = client.run(old).strip()
        client.remove(old)
        return printed

    def warning() -> str:
        response = send_request(daemon.url, "/v2/library/app/manifests/v1")
        return response.headers.get("Warning", "")

    assert pulled() == "old"
    new.push(registry.address)
    assert pulled() == "old"
    assert re.search(
        r"299 - \"app:v1 has moved; its earlier content is served until \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ "
        r"\(policy 1 \('\*'\): it is \d+s old \(first seen here\), and min_age is 20s\)\"",
        warning(),
    )
    # An index that is refused by its tag is refused by its digest, and so is its child.
    for digest in (new.index, new.manifest):
        answer = send_request(daemon.url, f"/v2/library/app/manifests/{digest}")
        assert answer.status == 403
        assert "it may be pulled from" in answer.body.decode()
    daemon.run("preload", "app:v1")
    daemon.stop()
    registry.stop()
    daemon.start()
    daemon.run("offline", "on")
    assert "has moved" in warning()
    assert pulled() == "old"
    eventually(lambda: pulled() == "new", "the new content is served")
    assert "has moved" not in warning()
    assert send_request(daemon.url, f"/v2/library/app/manifests/{new.manifest}").status == 200
