"""Access: content is served only in repositories that have it upstream; a digest is not enough."""

import asyncio

import pytest

from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.fakes.registry import FakeRegistry


@pytest.fixture
async def secret(registry, program):
    """A cached private image, and a public repository."""
    image = registry.add_image("me/secret", layers=[b"secret layer"])
    registry.add_image("me/public", layers=[b"public layer"])
    await program.pull(image)
    await program.wait_for_downloads()
    registry.requests.clear()
    return image


def target(repository: str, digest: str, image) -> str:
    kind = "manifests" if digest == image.digest else "blobs"
    return f"/v2/{repository}/{kind}/{digest}"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_repository_that_does_not_hold_the_content_is_not_served_it(
    registry, program, secret, method
):
    for digest in (secret.digest, *secret.blobs):
        answer = await program.ask(target("me/public", digest, secret), method)
        assert answer.status == 404
    assert registry.bytes_sent("/v2/.*/blobs/|/registry-v2/") < 1000


async def test_while_upstream_is_down_only_the_linked_repository_is_served(
    registry, program, secret
):
    async with registry.down():
        for digest in (secret.digest, *secret.blobs):
            answer = await program.ask(target("me/public", digest, secret))
            assert answer.status in (404, 503)
            assert b"secret layer" not in answer.body
            answer = await program.ask(target("me/secret", digest, secret))
            assert answer.status == 200


async def test_a_blob_that_another_repository_holds_too_costs_one_byte(registry, program, secret):
    layer = secret.layers[0]
    registry.add_blob(b"secret layer", "me/public")
    for _ in range(3):
        answer = await program.blob(layer, "me/public")
        assert (answer.status, answer.body) == (200, b"secret layer")
    assert registry.count(f"GET /v2/.*{layer}") == 1
    assert [seen.bytes_sent for seen in registry.seen("/registry-v2/")] == [1]


async def test_a_manifest_that_another_repository_holds_too_costs_one_head(
    registry, program, secret
):
    manifest = registry.repository("me/secret").manifests[secret.digest]
    registry.add_manifest("me/public", None, manifest.content, manifest.media_type)
    for _ in range(3):
        answer = await program.manifest("me/public", secret.digest)
        assert (answer.status, answer.digest) == (200, secret.digest)
    assert registry.pulls == 1
    assert registry.count(f"HEAD .*{secret.digest}") == 1


async def test_links_survive_a_restart(registry, program, secret):
    registry.add_blob(b"secret layer", "me/public")
    await program.blob(secret.layers[0], "me/public")
    await program.restart()
    async with registry.down():
        assert (await program.blob(secret.layers[0], "me/public")).status == 200
        assert (await program.blob(secret.layers[0], "me/secret")).status == 200
        assert (await program.blob(secret.config, "me/public")).status != 200


async def test_a_running_download_is_shared_only_with_a_repository_that_holds_the_blob(
    registry, program, secret
):
    blob = registry.add_blob(b"x" * 200_000, "me/secret")
    release = asyncio.Event()
    registry.fail(registry.body_of(blob), Fault(stall_at=100_000, until=release))
    async with program.opened(f"/v2/me/secret/blobs/{blob}") as response:
        assert response.status == 200
        assert (await program.blob(blob, "me/public")).status == 404
        registry.add_blob(b"x" * 200_000, "me/public")
        async with program.opened(f"/v2/me/public/blobs/{blob}") as shared:
            assert shared.status == 200
            assert len(await shared.content.readexactly(50_000)) == 50_000
            release.set()
    assert registry.bytes_sent(registry.body_of(blob)) < 2 * 200_000


async def test_the_same_name_at_another_registry_is_another_repository(registry, make_program):
    async with FakeRegistry() as other:
        program = await make_program(upstreams={"ghcr.io": {"url": other.url}})
        image = registry.add_image("me/app", layers=[b"from docker hub"])
        other.add_image("me/app", layers=[b"from github"])
        await program.pull(image)
        for digest in image.blobs:
            assert (await program.ask(f"/v2/ghcr.io/me/app/blobs/{digest}")).status == 404
        by_path = await program.ask("/v2/ghcr.io/me/app/manifests/latest")
        assert (by_path.status, by_path.digest == image.digest) == (200, False)
        by_namespace = await program.ask("/v2/me/app/manifests/latest?ns=ghcr.io")
        assert by_namespace.digest == by_path.digest
        assert by_namespace.headers["OCI-Namespace"] == "ghcr.io"


async def test_a_blob_that_no_manifest_names_is_linked_when_it_is_fetched(registry, program):
    digest = registry.add_blob(b"loose")
    assert (await program.blob(digest)).status == 200
    await program.wait_for_downloads()
    async with registry.down():
        assert (await program.blob(digest)).status == 200
        assert (await program.blob(digest_of(b"other"))).status == 404
