"""The read side of the distribution specification, as clients see it."""

import pytest

from tests.fakes.content import OCI_INDEX, OCI_MANIFEST, digest_of
from tests.fakes.peer import Peer, exchange

LAYER = bytes(range(256)) * 4096


@pytest.mark.parametrize("target", ["/v2/", "/v2"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_api_is_there_and_asks_for_no_login(program, registry, target, method):
    answer = await program.ask(target, method)
    assert answer.status == 200
    assert answer.headers["Docker-Distribution-Api-Version"] == "registry/2.0"
    assert "WWW-Authenticate" not in answer.headers
    assert answer.body == (b"{}" if method == "GET" else b"")
    assert registry.requests == []


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("by", ["tag", "digest"])
async def test_a_manifest_has_exact_headers_on_get_and_head(program, registry, cached, by):
    image = registry.add_image(index=True)
    reference = "latest" if by == "tag" else image.digest
    if cached:
        await program.manifest(image, reference)
    head = await program.manifest(image, reference, method="HEAD")
    answer = await program.manifest(image, reference)
    assert (head.status, answer.status) == (200, 200)
    assert head.body == b""
    for headers in (head.headers, answer.headers):
        assert headers["Content-Type"] == OCI_INDEX
        assert headers["Content-Length"] == str(len(answer.body))
        assert headers["Docker-Content-Digest"] == image.digest
        assert headers["ETag"] == f'"{image.digest}"'
        assert headers["Docker-Distribution-Api-Version"] == "registry/2.0"
        assert "Content-Encoding" not in headers
        assert "Transfer-Encoding" not in headers
    assert answer.digest == image.digest


@pytest.mark.parametrize("cached", [False, True])
async def test_a_blob_has_exact_headers_on_get_and_head(program, registry, cached):
    digest = registry.add_blob(LAYER)
    if cached:
        await program.blob(digest)
    answer = await program.blob(digest)
    head = await program.blob(digest, method="HEAD")
    for headers in (head.headers, answer.headers):
        assert headers["Content-Type"] == "application/octet-stream"
        assert headers["Content-Length"] == str(len(LAYER))
        assert headers["Docker-Content-Digest"] == digest
        assert headers["ETag"] == f'"{digest}"'
        assert headers["Accept-Ranges"] == "bytes"
        assert "immutable" in headers["Cache-Control"]
        assert "Content-Encoding" not in headers
    assert (head.status, head.body) == (200, b"")
    assert (answer.status, answer.body) == (200, LAYER)


async def test_the_head_of_a_blob_that_is_not_here_tells_its_size_or_none(program, registry):
    image = registry.add_image(layers=[LAYER])
    await program.manifest(image)
    before = len(registry.requests)
    head = await program.blob(image.layers[0], method="HEAD")
    assert (head.status, head.headers["Content-Length"]) == (200, str(len(LAYER)))
    assert len(registry.requests) == before
    unknown = registry.add_blob(b"announced by nobody")
    head = await program.blob(unknown, method="HEAD")
    assert head.status == 200
    assert head.headers.get("Content-Length", "19") == "19"
    registry.redirect_heads = False
    head = await program.blob(registry.add_blob(b"sized"), method="HEAD")
    assert (head.status, head.headers["Content-Length"]) == (200, "5")
    assert program.stored() == {image.digest}


@pytest.mark.parametrize("size", [0, 1, 2])
async def test_the_smallest_blobs_come_whole(program, registry, size):
    digest = registry.add_blob(b"x" * size)
    for _ in range(2):
        answer = await program.blob(digest)
        assert (answer.status, answer.body, answer.is_whole) == (200, b"x" * size, True)
        assert answer.headers["Content-Length"] == str(size)


async def test_a_sha512_digest_is_kept_as_given(program, registry):
    digest = registry.add_blob(LAYER, algorithm="sha512")
    for _ in range(2):
        answer = await program.blob(digest)
        assert answer.body == LAYER
        assert answer.headers["Docker-Content-Digest"] == digest
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
async def test_errors_have_the_form_and_the_codes_of_the_specification(
    program, registry, target, status, code
):
    registry.add_image()
    answer = await program.ask(target)
    assert answer.status == status
    assert code is None or answer.code == code
    assert answer.code.isupper()
    assert answer.headers["Docker-Distribution-Api-Version"] == "registry/2.0"
    assert "WWW-Authenticate" not in answer.headers
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
async def test_pushes_are_refused_as_a_read_only_registry_refuses_them(program, method, target):
    answer = await program.ask(target, method)
    assert (answer.status, answer.code) == (405, "UNSUPPORTED")
    assert {part.strip() for part in answer.headers["Allow"].split(",")} == {"GET", "HEAD"}


async def test_a_push_with_a_body_gets_its_answer_and_its_connection_is_closed(program):
    request = (
        b"PUT /v2/library/app/manifests/latest HTTP/1.1\r\nHost: x\r\n"
        b"Content-Length: 50000000\r\n\r\n" + bytes(100_000)
    )
    peer = await Peer.connect(program.url)
    peer.send(request)
    answer = await peer.until_end()
    assert (answer.status, answer.end) == (405, "fin")
    assert b"UNSUPPORTED" in answer.body
    await peer.close()


async def test_conditional_requests_are_answered_304(program, registry):
    image = registry.add_image()
    await program.pull(image)
    layer = image.layers[0]
    for method in ("GET", "HEAD"):
        for condition in (f'"{image.digest}"', f'W/"{image.digest}"', f'"x", "{image.digest}"'):
            answer = await program.manifest(image, method=method, If_None_Match=condition)
            assert (answer.status, answer.body) == (304, b"")
            assert answer.headers["ETag"] == f'"{image.digest}"'
            assert answer.headers["Docker-Content-Digest"] == image.digest
        answer = await program.blob(layer, method=method, If_None_Match=f'"{layer}"')
        assert (answer.status, answer.body) == (304, b"")
        assert answer.headers["ETag"] == f'"{layer}"'
        assert answer.headers["Docker-Content-Digest"] == layer
        assert (await program.manifest(image, method=method, If_None_Match='"x"')).status == 200
        assert (await program.blob(layer, method=method, If_None_Match='"x"')).status == 200


async def test_a_condition_does_not_show_what_a_repository_does_not_hold(program, registry):
    image = registry.add_image("me/secret")
    registry.repository("me/other")
    await program.pull(image)
    for kind, digest in (("manifests", image.digest), ("blobs", image.layers[0])):
        target = f"/v2/me/other/{kind}/{digest}"
        assert (await program.ask(target, If_None_Match="*")).status == 404


@pytest.mark.parametrize(
    "target", ["/v2/library/app/{}", "/v2/app/{}", "/v2/docker.io/library/app/{}"]
)
async def test_the_names_that_people_use_for_docker_hub_are_one(program, registry, target):
    image = registry.add_image()
    await program.manifest(image)
    before = len(registry.requests)
    answer = await program.ask(target.format("manifests/latest"))
    assert (answer.status, answer.digest) == (200, image.digest)
    assert "OCI-Namespace" not in answer.headers
    for namespace in ("docker.io", "index.docker.io", "registry-1.docker.io"):
        answer = await program.ask(f"/v2/library/app/manifests/latest?ns={namespace}")
        assert answer.digest == image.digest
        assert answer.headers["OCI-Namespace"] == "docker.io"
    assert len(registry.requests) == before


async def test_the_types_of_accept_may_come_on_many_lines(program, registry):
    registry.add_image(index=True)
    lines = f"Accept: {OCI_MANIFEST}\r\nAccept: application/json\r\nAccept: {OCI_INDEX}\r\n"
    request = f"GET /v2/library/app/manifests/latest HTTP/1.1\r\nHost: x\r\n{lines}\r\n"
    answer = await exchange(program.url, request.encode())
    assert answer.status == 200
    assert answer.headers["content-type"] == OCI_INDEX
