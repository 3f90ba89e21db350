"""Pulls by the distribution specification, from the client's side."""

import json

import pytest

from tests.fakes.content import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    descriptor,
    digest_of,
)
from tests.fakes.raw_client import RawClient, exchange

LAYER = bytes(range(256)) * 4096


@pytest.mark.parametrize("target", ["/v2/", "/v2"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_version_check_succeeds_without_a_login(program, registry, target, method):
    response = await program.ask(target, method)
    assert response.status == 200
    assert response.headers["Docker-Distribution-Api-Version"] == "registry/2.0"
    assert "WWW-Authenticate" not in response.headers
    assert response.body == (b"{}" if method == "GET" else b"")
    assert registry.requests == []


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("reference_type", ["tag", "digest"])
async def test_a_manifest_has_exact_headers_on_get_and_head(
    program, registry, cached, reference_type
):
    image = registry.add_image(index=True)
    reference = "latest" if reference_type == "tag" else image.digest
    if cached:
        await program.manifest(image, reference)
    head = await program.manifest(image, reference, method="HEAD")
    response = await program.manifest(image, reference)
    assert (head.status, response.status) == (200, 200)
    assert head.body == b""
    for headers in (head.headers, response.headers):
        assert headers["Content-Type"] == OCI_INDEX
        assert headers["Content-Length"] == str(len(response.body))
        assert headers["Docker-Content-Digest"] == image.digest
        assert headers["ETag"] == f'"{image.digest}"'
        assert headers["Docker-Distribution-Api-Version"] == "registry/2.0"
        assert "Content-Encoding" not in headers
        assert "Transfer-Encoding" not in headers
    assert response.digest == image.digest


@pytest.mark.parametrize("cached", [False, True])
async def test_a_blob_has_exact_headers_on_get_and_head(program, registry, cached):
    digest = registry.add_blob(LAYER)
    if cached:
        await program.blob(digest)
    response = await program.blob(digest)
    head = await program.blob(digest, method="HEAD")
    for headers in (head.headers, response.headers):
        assert headers["Content-Type"] == "application/octet-stream"
        assert headers["Content-Length"] == str(len(LAYER))
        assert headers["Docker-Content-Digest"] == digest
        assert headers["ETag"] == f'"{digest}"'
        assert headers["Accept-Ranges"] == "bytes"
        assert "immutable" in headers["Cache-Control"]
        assert "Content-Encoding" not in headers
    assert (head.status, head.body) == (200, b"")
    assert (response.status, response.body) == (200, LAYER)


@pytest.mark.parametrize("redirect_heads", [True, False])
async def test_head_of_a_blob_that_is_not_stored_has_the_size_that_upstream_sends(
    program, registry, redirect_heads
):
    registry.redirect_heads = redirect_heads
    image = registry.add_image(layers=[LAYER])
    await program.manifest(image)
    for digest, size in ((image.layers[0], len(LAYER)), (registry.add_blob(b"sized"), 5)):
        head = await program.blob(digest, method="HEAD")
        assert (head.status, head.headers["Content-Length"]) == (200, str(size))
    assert program.stored() == {image.digest}


@pytest.mark.parametrize("stated", [0, 5, 10_000_000_000])
async def test_head_states_the_size_that_get_sends_whatever_a_manifest_says(
    program, registry, stated
):
    layer = registry.add_blob(LAYER)
    entry = {**descriptor(LAYER, OCI_LAYER), "size": stated}
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": [entry]}
    config = descriptor(b"{}", OCI_CONFIG)
    content = json.dumps({**document, "config": config}).encode()
    registry.add_manifest("library/app", "wrong", content, OCI_MANIFEST)
    assert (await program.manifest("library/app", "wrong")).status == 200
    for _ in range(2):
        head, answer = await program.blob(layer, method="HEAD"), await program.blob(layer)
        assert head.headers["Content-Length"] == answer.headers["Content-Length"]
        assert answer.body == LAYER
        await program.wait_for_downloads()


async def test_head_of_a_blob_that_get_cannot_send_is_an_error_too(registry, make_program):
    program = await make_program()
    image = registry.add_image(layers=[LAYER])
    await program.manifest(image)
    await program.reload(offline=True)
    head, answer = (
        await program.blob(image.layers[0], method="HEAD"),
        await program.blob(image.layers[0]),
    )
    assert head.status == answer.status == 404


@pytest.mark.parametrize("size", [0, 1, 2])
async def test_the_smallest_blobs_are_complete(program, registry, size):
    digest = registry.add_blob(b"x" * size)
    for _ in range(2):
        response = await program.blob(digest)
        assert (response.status, response.body, response.is_whole) == (200, b"x" * size, True)
        assert response.headers["Content-Length"] == str(size)


async def test_a_sha512_digest_is_returned_as_requested(program, registry):
    digest = registry.add_blob(LAYER, algorithm="sha512")
    for _ in range(2):
        response = await program.blob(digest)
        assert response.body == LAYER
        assert response.headers["Docker-Content-Digest"] == digest
    assert registry.count(registry.body_of(digest)) == 1


@pytest.mark.parametrize(
    ("target", "status", "code"),
    [
        ("/v2/library/app/manifests/none", 404, "MANIFEST_UNKNOWN"),
        (f"/v2/library/app/manifests/{digest_of(b'none')}", 404, "MANIFEST_UNKNOWN"),
        (f"/v2/library/app/blobs/{digest_of(b'none')}", 404, "BLOB_UNKNOWN"),
        ("/v2/library/none/manifests/latest", 404, "NAME_UNKNOWN"),
        ("/v2/library/none/tags/list", 404, "NAME_UNKNOWN"),
        (f"/v2/library/none/blobs/{digest_of(b'none')}", 404, "BLOB_UNKNOWN"),
        ("/v2/ghcr.io/owner/app/manifests/latest", 403, "DENIED"),
        ("/v2/library/app/manifests/latest?ns=evil.example", 403, "DENIED"),
        ("/v2/library/app/manifests/.x", 400, "TAG_INVALID"),
        ("/v2/library/app/manifests/sha256:xyz", 400, "DIGEST_INVALID"),
        ("/v2/library/app/blobs/sha256:xyz", 400, "DIGEST_INVALID"),
        ("/v2/library/app/referrers/latest", 400, "DIGEST_INVALID"),
        ("/v2/Library/App/manifests/latest", 400, "NAME_INVALID"),
        ("/v2/library/app/blobs/uploads/", 404, None),
        ("/v2/library/app/nothing/x", 404, None),
        ("/v2//manifests/latest", 404, None),
        ("/v2/library/app/manifests/latest/", 404, None),
        ("/v3/", 404, None),
    ],
)
async def test_errors_have_the_format_and_codes_of_the_specification(
    program, registry, target, status, code
):
    registry.add_image()
    response = await program.ask(target)
    assert response.status == status
    assert code is None or response.code == code
    assert response.code.isupper()
    assert response.headers["Docker-Distribution-Api-Version"] == "registry/2.0"
    assert "WWW-Authenticate" not in response.headers
    head = await program.ask(target, "HEAD")
    assert (head.status, head.body) == (status, b"")


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/v2/library/app/blobs/uploads/"),
        ("POST", "/v2/library/app/blobs/uploads/?mount=sha256:x&from=y"),
        ("PATCH", "/v2/library/app/blobs/uploads/1234"),
        ("PUT", "/v2/library/app/blobs/uploads/1234?digest=sha256:x"),
        ("DELETE", "/v2/library/app/blobs/uploads/1234"),
        ("PUT", "/v2/library/app/manifests/latest"),
        ("DELETE", "/v2/library/app/manifests/latest"),
        ("DELETE", f"/v2/library/app/blobs/{digest_of(b'')}"),
        ("PUT", "/v2/"),
        ("OPTIONS", "/v2/"),
    ],
)
async def test_pushes_are_rejected_as_by_a_read_only_registry(program, method, target):
    response = await program.ask(target, method)
    assert (response.status, response.code) == (405, "UNSUPPORTED")
    assert {part.strip() for part in response.headers["Allow"].split(",")} == {"GET", "HEAD"}


async def test_a_push_with_a_body_gets_a_response_and_its_connection_is_closed(program):
    request = (
        b"PUT /v2/library/app/manifests/latest HTTP/1.1\r\nHost: x\r\n"
        b"Content-Length: 50000000\r\n\r\n" + bytes(100_000)
    )
    peer = await RawClient.connect(program.url)
    peer.send(request)
    response = await peer.read_to_end()
    assert (response.status, response.end) == (405, "fin")
    assert b"UNSUPPORTED" in response.body
    await peer.close()


async def test_conditional_requests_get_304(program, registry):
    image = registry.add_image()
    await program.pull(image)
    layer = image.layers[0]
    for method in ("GET", "HEAD"):
        for condition in (f'"{image.digest}"', f'W/"{image.digest}"', f'"x", "{image.digest}"'):
            response = await program.manifest(image, method=method, If_None_Match=condition)
            assert (response.status, response.body) == (304, b"")
            assert response.headers["ETag"] == f'"{image.digest}"'
            assert response.headers["Docker-Content-Digest"] == image.digest
        response = await program.blob(layer, method=method, If_None_Match=f'"{layer}"')
        assert (response.status, response.body) == (304, b"")
        assert response.headers["ETag"] == f'"{layer}"'
        assert response.headers["Docker-Content-Digest"] == layer
        assert (await program.manifest(image, method=method, If_None_Match='"x"')).status == 200
        assert (await program.blob(layer, method=method, If_None_Match='"x"')).status == 200


async def test_a_condition_does_not_reveal_content_of_another_repository(program, registry):
    image = registry.add_image("me/secret")
    registry.repository("me/other")
    await program.pull(image)
    for kind, digest in (("manifests", image.digest), ("blobs", image.layers[0])):
        target = f"/v2/me/other/{kind}/{digest}"
        assert (await program.ask(target, If_None_Match="*")).status == 404


@pytest.mark.parametrize(
    "target", ["/v2/library/app/{}", "/v2/app/{}", "/v2/docker.io/library/app/{}"]
)
async def test_all_names_of_a_docker_hub_repository_are_equivalent(program, registry, target):
    image = registry.add_image()
    await program.manifest(image)
    requests_before = len(registry.requests)
    response = await program.ask(target.format("manifests/latest"))
    assert (response.status, response.digest) == (200, image.digest)
    assert "OCI-Namespace" not in response.headers
    for namespace in ("docker.io", "index.docker.io", "registry-1.docker.io"):
        response = await program.ask(f"/v2/library/app/manifests/latest?ns={namespace}")
        assert response.digest == image.digest
        assert response.headers["OCI-Namespace"] == "docker.io"
    assert len(registry.requests) == requests_before


async def test_accept_may_have_several_lines(program, registry):
    registry.add_image(index=True)
    lines = f"Accept: {OCI_MANIFEST}\r\nAccept: application/json\r\nAccept: {OCI_INDEX}\r\n"
    request = f"GET /v2/library/app/manifests/latest HTTP/1.1\r\nHost: x\r\n{lines}\r\n"
    response = await exchange(program.url, request.encode())
    assert response.status == 200
    assert response.headers["content-type"] == OCI_INDEX
