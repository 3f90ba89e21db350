"""The upstream of a request, the allowed repositories, and offline mode."""

import pytest

from tests.fakes.content import digest_of
from tests.fakes.raw_client import exchange
from tests.fakes.registry import FakeRegistry
from tests.support.program import Program


@pytest.fixture
async def github():
    async with FakeRegistry() as other:
        yield other


@pytest.fixture
async def both(registry, github, make_program):
    """A program with two registries that contain the same repository name."""
    registry.add_image("me/app", layers=[b"of docker hub"])
    github.add_image("me/app", layers=[b"of github"])
    settings = {"url": github.url, "hosts": ["ghcr.local"]}
    return await make_program(upstreams={"ghcr.io": settings})


def digests(registry: FakeRegistry) -> str:
    return registry.repository("me/app").tags["latest"]


async def ask(program, target: str, host: str) -> str:
    request = f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    answer = await exchange(program.url, request)
    assert answer.status == 200, answer.body
    return answer.headers["docker-content-digest"]


@pytest.mark.parametrize(
    ("target", "host"),
    [
        ("/v2/ghcr.io/me/app/manifests/latest", "127.0.0.1"),
        ("/v2/me/app/manifests/latest?ns=ghcr.io", "127.0.0.1"),
        ("/v2/me/app/manifests/latest?ns=GHCR.IO", "127.0.0.1"),
        ("/v2/me/app/manifests/latest", "ghcr.local"),
        ("/v2/me/app/manifests/latest", "GHCR.local:5000"),
    ],
)
async def test_a_registry_is_named_by_namespace_by_host_or_by_path(both, github, target, host):
    assert await ask(both, target, host) == digests(github)


@pytest.mark.parametrize(
    ("target", "host"),
    [
        ("/v2/me/app/manifests/latest", "127.0.0.1"),
        ("/v2/me/app/manifests/latest", "elsewhere.local"),
        ("/v2/docker.io/me/app/manifests/latest", "127.0.0.1"),
        ("/v2/me/app/manifests/latest?ns=docker.io", "ghcr.local"),
    ],
)
async def test_the_default_registry_is_docker_hub(both, registry, target, host):
    assert await ask(both, target, host) == digests(registry)


@pytest.mark.parametrize(
    ("target", "host"),
    [
        ("/v2/docker.io/me/app/manifests/latest?ns=ghcr.io", "127.0.0.1"),
        ("/v2/docker.io/me/app/manifests/latest?ns=ghcr.io", "ghcr.local"),
        ("/v2/docker.io/me/app/manifests/latest", "ghcr.local"),
    ],
)
async def test_where_the_registry_is_named_the_whole_path_is_the_repository(
    both, registry, github, target, host
):
    image = github.add_image("docker.io/me/app", layers=[b"a project called docker.io"])
    assert await ask(both, target, host) == image.digest
    assert registry.requests == []


async def test_a_registry_that_is_named_twice_is_refused(both, registry, github):
    target = "/v2/me/app/manifests/latest?ns=ghcr.io&n=1&%6es=docker.io"
    answer = await both.ask(target)
    assert (answer.status, answer.code) == (400, "NAME_INVALID")
    assert not registry.requests
    assert not github.requests


async def test_only_docker_hub_has_a_library(both, registry, github):
    registry.add_image("library/app")
    assert (await both.ask("/v2/app/manifests/latest")).status == 200
    assert (await both.ask("/v2/ghcr.io/app/manifests/latest")).status == 404
    assert github.seen("/v2/app/manifests")
    assert not github.seen("library")


async def test_a_part_of_a_name_may_equal_a_word_of_the_api(program, registry):
    image = registry.add_image("me/blobs/manifests/tags", layers=[b"x"])
    await program.pull(image)
    assert (await program.ask("/v2/me/blobs/manifests/tags/tags/list")).json["tags"] == ["latest"]


async def test_allow_and_deny_rules_apply(registry, make_program):
    rules = {"url": registry.url, "allow": ["library/*", "me/*"], "deny": ["me/secret*"]}
    program = await make_program(upstreams={"docker.io": rules})
    for name in ("library/app", "me/app", "me/secret", "you/app"):
        image = registry.add_image(name)
        answer = await program.manifest(name)
        blob = await program.blob(image.config, name)
        tags = await program.ask(f"/v2/{name}/tags/list")
        if name in ("library/app", "me/app"):
            assert (answer.status, blob.status, tags.status) == (200, 200, 200)
        else:
            assert {one.code for one in (answer, blob, tags)} == {"DENIED"}
            assert {one.status for one in (answer, blob, tags)} == {403}
    assert not registry.seen("secret|you")


async def test_a_cache_in_between_does_not_undo_a_denial(registry, make_program, tmp_path):
    registry.add_image("corp/secret")
    upper = await make_program()
    rules = {"url": upper.url, "deny": ["corp/secret"]}
    lower = Program(tmp_path / "lower", registry, upstreams={"docker.io": rules})
    await lower.start()
    try:
        for name in ("corp/secret", "docker.io/corp/secret", "docker.io/docker.io/corp/secret"):
            answer = await lower.manifest(name)
            assert (answer.status, answer.code) == (403, "DENIED")
        assert registry.requests == []
    finally:
        await lower.stop()


async def test_the_catalog_leaves_out_what_is_denied_now(registry, program):
    for name in ("me/app", "me/secret"):
        await program.pull(registry.add_image(name))
    program.upstreams["docker.io"]["deny"] = ["me/secret"]
    await program.restart()
    assert (await program.ask("/v2/_catalog")).json == {"repositories": ["me/app"]}


class TestOffline:
    """Offline: no connections to upstreams, only cached content."""

    @pytest.fixture
    async def offline(self, registry, program):
        image = registry.add_image("me/app", layers=[b"x"], index=True)
        await program.pull(image)
        await program.wait_for_downloads()
        await program.restart(offline=True)
        program.clock.advance(100 * 24 * 3600)
        registry.requests.clear()
        return image

    async def test_cached_content_is_served_whatever_its_age(self, registry, program, offline):
        await program.pull(offline)
        assert registry.requests == []

    async def test_content_that_is_not_cached_fails_at_once_without_a_request(
        self, registry, program, offline
    ):
        registry.add_image("me/other")
        answers = [
            await program.manifest("me/other"),
            await program.manifest("me/app", "other"),
            await program.manifest("me/app", digest_of(b"x")),
            await program.blob(digest_of(b"none"), "me/app"),
            await program.blob(digest_of(b"none"), "me/app", method="HEAD"),
            await program.ask(f"/v2/me/app/referrers/{offline.digest}"),
        ]
        assert {answer.status for answer in answers} <= {404, 503}
        assert "offline" in answers[0].json["errors"][0]["message"]
        assert (await program.ask("/v2/me/app/tags/list")).json["tags"] == ["latest"]
        assert registry.requests == []
