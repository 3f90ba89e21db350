"""Responses that no registry should send (faults, table U), against the whole program."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.fakes.content import OCI_MANIFEST, digest_of
from tests.fakes.faults import HTML, Fault
from tests.fakes.raw_server import HEAD_END, RawUpstream, RecvUntil, Send, Step
from tests.support.program import Program

MakeProgram = Callable[..., Awaitable[Program]]

MANIFEST = (
    b'{"schemaVersion":2,"mediaType":"%s","config":{"mediaType":"application/json","size":2,'
    b'"digest":"%s"},"layers":[]}'
) % (OCI_MANIFEST.encode(), digest_of(b"{}").encode())
TYPE = b"Content-Type: %s\r\n" % OCI_MANIFEST.encode()
LENGTH = b"Content-Length: %d\r\n" % len(MANIFEST)
OK = b"HTTP/1.1 200 OK\r\n"
CLOSE = b"Connection: close\r\n"


def respond(response: bytes) -> list[Step]:
    return [RecvUntil(HEAD_END), Send(response)]


async def start_program(raw: RawUpstream, make_program: MakeProgram, **sections: Any) -> Program:
    """Start the program with a raw upstream."""
    return await make_program(upstreams={"docker.io": {"url": raw.url}}, **sections)


@pytest.mark.parametrize(
    "challenge",
    [
        b"",
        b"WWW-Authenticate: \r\n",
        b"WWW-Authenticate: Bearer\r\n",
        b'WWW-Authenticate: Bearer realm="\r\n',
        b'WWW-Authenticate: Bearer realm=""\r\n',
        b"WWW-Authenticate: Basic\r\n",
        b"WWW-Authenticate: Negotiate YII==\r\n",
        b"WWW-Authenticate: Bearer %s\r\n" % (b'x="y",' * 1700),
        b"WWW-Authenticate: \xff\xfe\r\n" * 3,
    ],
    ids=range(9),
)
async def test_u16_an_unusable_challenge_is_an_error_after_at_most_two_requests(
    make_program, challenge
):
    head = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n"
    async with RawUpstream(respond(head + challenge + CLOSE + b"\r\n")) as raw:
        program = await start_program(raw, make_program)
        response = await program.manifest("library/app")
        assert response.status in (404, 502)
        assert response.code in ("NAME_UNKNOWN", "UNKNOWN")
        assert "WWW-Authenticate" not in response.headers
        assert raw.connections <= 2


async def test_u16_a_registry_that_rejects_every_token_gets_two_requests(registry, program):
    registry.add_image()
    refused = {"WWW-Authenticate": f'Bearer realm="{registry.url}/token",service="x"'}
    registry.fail("/v2/", Fault(status=401, body=b"", headers=refused), times=None)
    response = await program.manifest("library/app")
    assert (response.status, response.code) == (404, "NAME_UNKNOWN")
    assert registry.count("/v2/") == 2
    assert registry.count("/token") == 1


@pytest.mark.parametrize("status", [403, 404, 451])
async def test_u21_a_refusal_is_passed_on_and_removes_no_cached_digest(registry, program, status):
    image = registry.add_image()
    await program.manifest(image)
    registry.fail("/manifests/|/blobs/", Fault(status=status, body=b""), times=None)
    for request in (program.manifest(image, "other"), program.blob(digest_of(b"none"))):
        response = await request
        assert (response.status, response.code[-8:]) == (404, "_UNKNOWN")
    program.clock.advance(3600)
    await program.manifest(image)
    assert (await program.manifest(image, image.digest)).status == 200


async def test_u23_a_manifest_with_another_digest_is_fetched_once_more(registry, program):
    image = registry.add_image()
    await program.manifest(image)
    program.clock.advance(3600)
    moved = registry.add_image(layers=[b"new"])
    registry.fail(f"^GET .*{moved.digest}", Fault(flip_at=30))
    response = await program.manifest(image)
    assert (response.status, response.digest) == (200, moved.digest)
    assert "Warning" not in response.headers
    assert registry.count(f"^GET .*{moved.digest}") == 2


EMPTY = Fault(status=200, body=b"")


@pytest.mark.parametrize("has_token", [True, False])
async def test_u14_a_login_page_is_neither_a_manifest_nor_a_blob(registry, program, has_token):
    await assert_no_content_is_stored(registry, program, HTML, has_token=has_token)


@pytest.mark.parametrize("has_token", [True, False])
async def test_u15_an_empty_response_is_neither_a_manifest_nor_a_blob(registry, program, has_token):
    await assert_no_content_is_stored(registry, program, EMPTY, has_token=has_token)


async def assert_no_content_is_stored(
    registry, program: Program, fault: Fault, *, has_token: bool
) -> None:
    """Let upstream, its token server and its CDN respond to everything with `fault`."""
    image = registry.add_image()
    if has_token:
        await program.manifest(image, "none")  # which gets a token
    registry.fail("", fault, times=None)
    manifest = await program.manifest(image)
    assert (manifest.status, manifest.code) == (502, "UNKNOWN")
    assert "did not send a manifest" in manifest.json["errors"][0]["message"]
    assert (await program.manifest(image, image.digest)).status == 502
    blob = await program.blob(image.config)
    assert not blob.is_whole or (blob.status, blob.code) == (404, "BLOB_UNKNOWN")
    await program.wait_for_downloads()
    assert program.stored() == set()


async def test_u22_a_tag_that_moves_during_a_pull_does_not_mix_images(registry, program):
    old = registry.add_image(index=True, layers=[b"old"])
    head = await program.manifest(old, method="HEAD")
    assert head.headers["Docker-Content-Digest"] == old.digest
    new = registry.add_image(index=True, layers=[b"new"])
    program.clock.advance(3600)
    moved = await program.manifest(new)
    assert moved.digest == moved.headers["Docker-Content-Digest"] == new.digest
    # A client that began with the old image continues with it, by digest.
    for image in (old, new):
        for digest in (image.digest, *image.manifests.values()):
            response = await program.manifest(image, digest)
            assert (response.status, response.digest) == (200, digest)
        for digest in image.blobs:
            assert (await program.blob(digest)).digest == digest


GOOD_CHUNKS = {
    "one": [MANIFEST],
    "a byte each": [MANIFEST[n : n + 1] for n in range(len(MANIFEST))],
}
BAD_CHUNKS = {
    "negative": b"-5\r\nhello\r\n0\r\n\r\n",
    "no number": b"xyz\r\nhello\r\n0\r\n\r\n",
    "too long": b"FFFFFFFFFFFFFFFFFFFF\r\nhello\r\n0\r\n\r\n",
    "too short": b"2\r\nhello\r\n0\r\n\r\n",
    "no end": b"5\r\nhello\r\n",
    "endless extension": b"5;" + b"x" * 100_000 + b"\r\nhello\r\n0\r\n\r\n",
}
CHUNKED = OK + TYPE + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("chunks", GOOD_CHUNKS.values(), ids=GOOD_CHUNKS)
@pytest.mark.parametrize("trailer", [b"", b"X-Checksum: 1\r\nDocker-Content-Digest: no\r\n"])
async def test_u28_chunks_of_any_size_and_trailers_are_accepted(make_program, chunks, trailer):
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    async with RawUpstream(respond(CHUNKED + body + b"0\r\n" + trailer + b"\r\n")) as raw:
        program = await start_program(raw, make_program)
        for reference in ("latest", digest_of(MANIFEST)):
            response = await program.manifest("library/app", reference)
            assert (response.status, response.body) == (200, MANIFEST)
            assert "X-Checksum" not in response.headers


@pytest.mark.parametrize("body", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
async def test_u28_invalid_chunks_are_an_error_and_nothing_is_stored(make_program, body):
    async with RawUpstream(respond(CHUNKED + body)) as raw:
        program = await start_program(raw, make_program)
        manifest = await program.manifest("library/app")
        assert (manifest.status, manifest.code) in {(502, "UNKNOWN"), (503, "UNAVAILABLE")}
        blob = await program.blob(digest_of(b"hello!"))
        assert blob.status == 404 or not blob.is_whole
        await program.wait_for_downloads()
        assert program.stored() == set()


async def test_u29_an_unrequested_encoding_is_not_decoded(make_program):
    encoded = OK + TYPE + LENGTH + CLOSE + b"Content-Encoding: gzip\r\n\r\n" + MANIFEST
    async with RawUpstream(respond(encoded)) as raw:
        program = await start_program(raw, make_program)
        blob = await program.blob(digest_of(MANIFEST))
        for response in (blob, await program.manifest("library/app")):
            assert (response.status, response.body) == (200, MANIFEST)
            assert "Content-Encoding" not in response.headers


HEADERS = {
    "9 KB": b"X-Long: " + b"y" * 9000 + b"\r\n",
    "control": b"X-Odd: a\x01b\r\n",
    "not ascii": b"X-Odd: \xff\xfe\r\n",
    "folded": b"X-Folded: a\r\n b\r\n",
    "many": b"".join(b"X-Header-%d: y\r\n" % n for n in range(200)),
    "no colon": b"X-Nothing\r\n",
    "cookie": b"Set-Cookie: session=secret; Path=/\r\n",
    "odd digest": b"Docker-Content-Digest: \xff\x01\r\nETag: \x01\r\n",
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
async def test_u30_odd_headers_never_reach_a_client(make_program, headers):
    async with RawUpstream(
        respond(OK + TYPE + LENGTH + CLOSE + headers + b"\r\n" + MANIFEST)
    ) as raw:
        program = await start_program(raw, make_program)
        response = await program.manifest("library/app")
        assert (response.status, response.body) == (200, MANIFEST) or response.status in (502, 503)
        names = {*response.headers} - {"X-Content-Type-Options"}
        assert not [name for name in names if name.startswith(("X-", "Set-"))]
        for value in response.headers.values():
            assert value.isascii()
            assert value.isprintable()


@pytest.mark.parametrize("interim", [b"100 Continue", b"103 Early Hints"])
async def test_u31_interim_responses_are_skipped(make_program, interim):
    head = b"HTTP/1.1 %s\r\nLink: </x>\r\n\r\n" % interim
    async with RawUpstream(respond(head + OK + TYPE + LENGTH + CLOSE + b"\r\n" + MANIFEST)) as raw:
        program = await start_program(raw, make_program)
        response = await program.manifest("library/app")
        assert (response.status, response.body) == (200, MANIFEST)


@pytest.mark.parametrize(
    "head",
    [
        b"204 No Content\r\n",
        b"205 Reset Content\r\nContent-Length: 0\r\n",
        b"304 Not Modified\r\n",
        b"206 Partial Content\r\nContent-Length: 5\r\nContent-Range: bytes 5-9/100\r\n",
        b"206 Partial Content\r\nContent-Length: 5\r\n",
    ],
    ids=["204", "205", "304", "206", "206 of nothing"],
)
async def test_u31_responses_to_other_requests_are_errors_and_nothing_is_stored(make_program, head):
    body = b"hello" if head.startswith(b"206") else b""
    async with RawUpstream(respond(b"HTTP/1.1 " + head + CLOSE + TYPE + b"\r\n" + body)) as raw:
        program = await start_program(raw, make_program)
        manifest = await program.manifest("library/app")
        assert manifest.status in (502, 503)
        blob = await program.blob(digest_of(b"hello"))
        assert (blob.status, blob.code) == (404, "BLOB_UNKNOWN")
        await program.wait_for_downloads()
        assert program.stored() == set()
