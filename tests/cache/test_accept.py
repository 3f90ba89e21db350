"""A client's Accept header is judged by the cache; upstream is always sent the full one."""

import pytest

from tests.fakes.content import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    digest_of,
)

SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"


@pytest.mark.parametrize("docker", [True, False])
@pytest.mark.parametrize("accept", [None, "*/*", "application/*", f"{DOCKER_LIST}, {OCI_INDEX}"])
async def test_a_client_that_accepts_everything_gets_the_index(registry, program, docker, accept):
    image = registry.add_image(index=True, docker=docker)
    headers = {"Accept": accept} if accept else {}
    answer = await program.manifest(image, **headers)
    assert (answer.status, answer.digest) == (200, image.digest)
    assert answer.headers["Content-Type"] == image.media_type


@pytest.mark.parametrize("docker", [True, False])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_client_that_accepts_no_index_gets_the_linux_amd64_manifest_under_its_own_digest(
    registry, program, docker, method
):
    image = registry.add_image(
        index=True, docker=docker, platforms=["linux/arm64", "linux/amd64", "windows/amd64"]
    )
    expected = image.manifests["linux/amd64"]
    media_type = DOCKER_MANIFEST if docker else OCI_MANIFEST
    answer = await program.manifest(image, method=method, Accept=media_type)
    assert answer.status == 200
    assert answer.headers["Docker-Content-Digest"] == expected
    assert answer.headers["ETag"] == f'"{expected}"'
    assert answer.headers["Content-Type"] == media_type
    if method == "GET":
        assert answer.digest == expected
    assert (await program.manifest(image)).digest == image.digest


@pytest.mark.parametrize("accept", [SCHEMA1, "text/html", "application/json", "x" * 8000])
async def test_a_client_that_accepts_nothing_available_gets_404(registry, program, accept):
    image = registry.add_image(index=True)
    answer = await program.manifest(image, Accept=accept)
    assert (answer.status, answer.code) == (404, "MANIFEST_UNKNOWN")


async def test_an_index_without_the_default_platform_is_404_for_a_client_that_accepts_no_index(
    registry, program
):
    image = registry.add_image(index=True, platforms=["windows/amd64"])
    assert (await program.manifest(image, Accept=OCI_MANIFEST)).code == "MANIFEST_UNKNOWN"


@pytest.mark.parametrize("accept", [OCI_MANIFEST, SCHEMA1, "text/html", "*/*;q=0"])
async def test_by_digest_a_manifest_is_served_whatever_the_accept_header_says(
    registry, program, accept
):
    image = registry.add_image(index=True)
    for _ in range(2):
        answer = await program.manifest(image, image.digest, Accept=accept)
        assert (answer.status, answer.digest) == (200, image.digest)
        assert answer.headers["Content-Type"] == OCI_INDEX


async def test_different_accept_headers_cause_no_second_copy_or_request(registry, program):
    image = registry.add_image(index=True, docker=True)
    for accept in ("*/*", DOCKER_LIST, f"{DOCKER_MANIFEST}, {DOCKER_LIST}", "application/*"):
        assert (await program.manifest(image, Accept=accept)).digest == image.digest
    assert registry.pulls == 1
    assert DOCKER_MANIFEST in registry.seen("/manifests/")[-1].headers["Accept"]


async def test_m10_a_schema_1_manifest_from_upstream_is_refused(registry, program):
    content = b'{"schemaVersion":1,"name":"library/app","fsLayers":[]}'
    registry.add_manifest("library/app", "old", content, SCHEMA1)
    answer = await program.manifest("library/app", "old")
    assert answer.status in (404, 502)
    assert program.stored() == set()
    assert digest_of(content) not in answer.headers.get("Docker-Content-Digest", "")
