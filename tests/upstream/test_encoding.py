"""gzip that was not requested is undone, unless it is the form that a blob has itself."""

import gzip
import json
import threading
import zlib
from contextlib import suppress

import pytest
from hypothesis import given, strategies as st

from proxy.errors import UpstreamError
from proxy.upstream import responses
from proxy.upstream.body import MAX_ENCODED_BLOB
from proxy.upstream.encoding import MAX_MEMBERS, gunzip, is_gzip_encoded
from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.fakes.registry import FakeRegistry
from tests.fakes.search import ListedRepository
from tests.support.admin_api import APP
from tests.support.program import Program

TEXT = b"content " * 1000


def encoded(content: bytes, encoding: str = "gzip", **changes: object) -> Fault:
    """Return a response with this content in gzip, as a CDN or proxy makes it on the way."""
    body = gzip.compress(content)
    return Fault(body=body, headers={"Content-Encoding": encoding}, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content",
    [gzip.compress(TEXT), gzip.compress(TEXT[:7]) + gzip.compress(TEXT[7:])],
    ids=["one member", "two members"],
)
def test_a_body_is_decoded_with_all_its_members(content):
    assert gunzip(content, len(TEXT)) == TEXT
    with pytest.raises(UpstreamError, match="more than"):
        gunzip(content, len(TEXT) - 1)
    with pytest.raises(UpstreamError, match="ends early"):
        gunzip(content[:-1], len(TEXT))
    with pytest.raises(UpstreamError, match="damaged"):
        gunzip(content[:10] + b"\xff" * 10, len(TEXT))


@pytest.mark.parametrize("content", [b"", b"{}", TEXT, b"\x1f", zlib.compress(TEXT)], ids=range(5))
def test_a_body_that_only_claims_to_be_encoded_is_returned_as_it_is(content):
    assert gunzip(content, 100_000) == content


def test_l02_an_encoding_of_very_many_members_is_refused():
    member = gzip.compress(b"")
    assert gunzip(member * MAX_MEMBERS, 10) == b""
    with pytest.raises(UpstreamError, match="more than 100 members"):
        gunzip(member * 200_000, 10)


BOMBS = {
    "large": gzip.compress(bytes(50 << 20)),
    "members": gzip.compress(b"") * 100_000,
    "zeros": gzip.compress(bytes(4 << 20)),
}


@pytest.mark.parametrize("bomb", BOMBS)
async def test_l02_encoded_bombs_of_an_upstream_are_refused(registry, program, bomb, monkeypatch):
    registry.auth = False
    decoded_in: set[str] = set()

    def decode_and_record(content: bytes, limit: int) -> bytes:
        decoded_in.add(threading.current_thread().name)
        return gunzip(content, limit)

    monkeypatch.setattr(responses, "gunzip", decode_and_record)
    fault = Fault(status=200, body=BOMBS[bomb], headers={"Content-Encoding": "gzip"})
    registry.fail("/(manifests|tags|referrers|token)", fault, times=None)
    for target in ("manifests/latest", "tags/list"):
        assert (await program.ask(f"/v2/{APP}/{target}")).status == 502
    assert (await program.ask(f"/v2/{APP}/referrers/{digest_of(b'x')}")).status in (404, 502)
    challenge = {"WWW-Authenticate": f'Bearer realm="{registry.url}/token"'}
    registry.fail("/other", Fault(status=401, body=b"", headers=challenge))
    assert (await program.manifest(APP, "other")).status == 502
    assert decoded_in
    assert threading.main_thread().name not in decoded_in


def test_what_follows_the_last_member_is_ignored():
    assert gunzip(gzip.compress(TEXT) + bytes(512), len(TEXT)) == TEXT


@given(st.binary())
def test_no_body_raises_another_error(content):
    for body in (content, b"\x1f\x8b" + content, gzip.compress(content)[: len(content)]):
        with suppress(UpstreamError):
            gunzip(body, 100)


def test_the_header_may_have_other_names_for_it():
    for value in ("gzip", "GZIP", "x-gzip", "identity, gzip"):
        assert is_gzip_encoded({"Content-Encoding": value})
    assert not is_gzip_encoded({"Content-Encoding": "identity"})
    assert not is_gzip_encoded({})


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP"])
@pytest.mark.parametrize("send_length", [True, False])
async def test_manifests_lists_and_tokens_are_decoded(registry, program, encoding, send_length):
    image = registry.add_image(index=True)
    registry.auth = False
    manifests = registry.repository(APP).manifests
    for reference, digest in {"latest": image.digest, **dict.fromkeys(manifests)}.items():
        content = manifests[digest or reference].content
        fault = encoded(content, encoding, send_length=send_length)
        registry.fail(f"GET .*/manifests/{reference}", fault, times=None)
        answer = await program.manifest(APP, reference)
        assert (answer.status, answer.body) == (200, content)
        assert answer.headers["Docker-Content-Digest"] == digest_of(content)
        assert "Content-Encoding" not in answer.headers
    assert program.stored() == set(manifests)
    tags = encoded(b'{"tags":["a"]}', encoding, send_length=send_length)
    registry.fail("tags/list", tags)
    assert (await program.ask(f"/v2/{APP}/tags/list")).json["tags"] == ["a"]
    referrers = encoded(b'{"manifests":[]}', encoding, send_length=send_length)
    registry.fail("referrers", referrers)
    assert (await program.ask(f"/v2/{APP}/referrers/{image.digest}")).json["manifests"] == []
    challenge = {"WWW-Authenticate": f'Bearer realm="{registry.url}/token"'}
    registry.fail("/other", Fault(status=401, body=b"", headers=challenge))
    token = json.dumps({"token": "abc"}).encode()
    registry.fail("/token", encoded(token, encoding, status=200, send_length=send_length))
    await program.manifest(APP, "other")
    assert registry.requests[-1].headers["Authorization"] == "Bearer abc"


async def test_searches_and_errors_are_decoded(registry, make_program):
    registry.catalogue = [ListedRepository("library/app")]
    program = await make_program(upstreams={"docker.io": {"url": registry.url}})
    plain = await program.ask("/v1/search?q=app")
    assert plain.json["num_results"] == 1
    results = json.dumps({"num_results": 0, "results": []}).encode()
    registry.fail("/v1/search", encoded(results))
    assert (await program.ask("/v1/search?q=other")).json["num_results"] == 0
    registry.add_image()
    message = json.dumps({"errors": [{"code": "DENIED", "message": "pay first"}]}).encode()
    registry.fail("/manifests/", encoded(message, status=400), times=None)
    assert "pay first" in (await program.manifest(APP)).json["errors"][0]["message"]


@pytest.mark.parametrize("cdn", [True, False])
@pytest.mark.parametrize("send_length", [True, False])
@pytest.mark.parametrize("has_manifest", [True, False])
async def test_a_config_is_decoded(registry, program, cdn, send_length, has_manifest):
    registry.cdn = cdn
    image = registry.add_image()
    config = registry.repository(APP).blobs[image.config]
    registry.fail(
        registry.body_of(image.config), encoded(config, send_length=send_length), times=None
    )
    if has_manifest:
        await program.manifest(image)
    for _ in range(2):
        answer = await program.blob(image.config)
        assert (answer.status, answer.body, answer.is_whole) == (200, config, True)
        assert "Content-Encoding" not in answer.headers
        await program.wait_for_downloads()
    assert image.config in program.stored()


async def test_the_size_of_an_encoded_blob_is_not_taken_from_its_head(registry, program):
    registry.cdn = False
    digest = registry.add_blob(TEXT)
    registry.fail(f"/blobs/{digest}", encoded(TEXT), times=None)
    head = await program.blob(digest, method="HEAD")
    assert head.status == 200
    assert head.headers.get("Content-Length") in (None, str(len(TEXT)))


OWN_FORM = {
    "small": gzip.compress(TEXT),
    "text": TEXT,
    "large": gzip.compress(bytes(100), 0) + bytes(MAX_ENCODED_BLOB + 1),
    "damaged": gzip.compress(TEXT)[:-1],
    "bomb": gzip.compress(bytes(50 << 20)),
}


@pytest.mark.parametrize("name", OWN_FORM)
@pytest.mark.parametrize("send_length", [True, False])
async def test_a_blob_that_is_in_gzip_format_itself_is_not_decoded(
    registry, program, name, send_length
):
    digest = registry.add_blob(OWN_FORM[name])
    headers = {"Content-Encoding": "gzip"}
    fault = Fault(headers=headers, send_length=send_length)
    registry.fail(registry.body_of(digest), fault, times=None)
    for _ in range(2):
        answer = await program.blob(digest)
        assert (answer.status, answer.body == OWN_FORM[name], answer.is_whole) == (200, True, True)
        await program.wait_for_downloads()
    assert program.stored() == {digest}


@pytest.mark.parametrize(
    "body",
    [gzip.compress(b"other"), gzip.compress(bytes(50 << 20)), b"x"],
    ids=["other", "bomb", "short"],
)
async def test_an_encoded_blob_with_another_digest_is_not_served(registry, program, body):
    digest = registry.add_blob(TEXT)
    fault = Fault(body=body, headers={"Content-Encoding": "gzip"})
    registry.fail(registry.body_of(digest), fault, times=None)
    answer = await program.blob(digest)
    assert not answer.is_whole or answer.status == 404
    await program.wait_for_downloads()
    assert program.stored() == set()


async def test_a_mirror_may_encode_too(registry: FakeRegistry, make_program):
    async with FakeRegistry(auth=False) as mirror:
        image = mirror.add_image()
        settings = {"url": registry.url, "mirrors": [mirror.url]}
        program: Program = await make_program(upstreams={"docker.io": settings})
        config = mirror.repository(APP).blobs[image.config]
        mirror.fail(mirror.body_of(image.config), encoded(config), times=None)
        assert (await program.blob(image.config)).body == config
        assert registry.requests == []
