"""The operations on one registry: few requests, and nothing believed without verification."""

import asyncio

import pytest

from proxy.errors import (
    DigestMismatchError,
    RateLimitedError,
    UnknownBlobError,
    UnknownManifestError,
    UnsatisfiableRangeError,
    UpstreamError,
    UpstreamForbiddenError,
    UpstreamRefusedError,
    UpstreamTimeoutError,
    UpstreamUnauthorizedError,
    UpstreamUnavailableError,
)
from proxy.oci.digest import Digest
from proxy.oci.reference import Tag
from proxy.upstream.client import Upstream
from proxy.upstream.registry_client import RegistryTimeouts
from proxy.upstream.responses import Evidence
from tests.fakes.content import OCI_INDEX, OCI_MANIFEST, digest_of
from tests.fakes.faults import HTML, Fault
from tests.fakes.raw_server import HEAD_END, RawUpstream, RecvUntil, Reset, Send, Step

APP = "library/app"
LATEST = Tag("latest")
LAYER = bytes(range(256)) * 2048


async def fetch_blob(
    upstream: Upstream, digest: str, offset: int = 0
) -> tuple[int, int | None, bytes]:
    async with upstream.open_blob(APP, Digest.parse(digest), offset) as body:
        content, buffer = b"", memoryview(bytearray(1 << 20))
        while count := await body.read_into(buffer):
            content += buffer[:count]
        return body.offset, body.size, content


async def test_a_tag_is_resolved_by_head_which_counts_as_no_pull(registry, upstream):
    image = registry.add_image(index=True)
    assert str((await upstream.resolve(APP, LATEST)).digest) == image.digest
    assert registry.pulls == 0
    assert registry.count("^GET /v2/") == 0


async def test_one_token_is_used_for_a_repository(registry, upstream):
    image = registry.add_image()
    await upstream.resolve(APP, LATEST)
    await upstream.fetch_manifest(APP, Digest.parse(image.digest))
    await fetch_blob(upstream, image.config)
    assert registry.count("/token") == 1
    assert [seen.status for seen in registry.seen("/v2/")].count(401) == 1


async def test_concurrent_requests_share_one_token(registry, upstream):
    image = registry.add_image()
    await upstream.resolve(APP, LATEST)
    registry.tokens.revoke()
    upstream._registry._authenticator._tokens.clear()
    digest = Digest.parse(image.digest)
    await asyncio.gather(*(upstream.resolve(APP, digest) for _ in range(50)))
    assert registry.count("/token") == 2


async def test_a_rejected_token_is_renewed_once(registry, upstream):
    registry.add_image()
    await upstream.resolve(APP, LATEST)
    registry.tokens.revoke()
    await upstream.resolve(APP, LATEST)
    assert registry.count("/token") == 2


async def test_a_denied_repository_is_requested_once(registry, upstream):
    with pytest.raises(UpstreamUnauthorizedError, match="denied access"):
        await upstream.resolve("library/none", LATEST)
    assert registry.count("/manifests/") == 2
    assert registry.count("/token") == 1


async def test_all_media_types_are_accepted_in_one_header_and_no_encoding(registry, upstream):
    registry.add_image(index=True)
    await upstream.fetch_manifest(APP, LATEST)
    seen = registry.seen("/manifests/")[-1]
    assert len(seen.headers.getall("Accept")) == 1
    assert OCI_INDEX in seen.headers["Accept"]
    assert seen.headers["Accept-Encoding"] == "identity"


async def test_a_manifest_has_the_digest_of_its_bytes(registry, upstream):
    image = registry.add_image(index=True)
    fetched = await upstream.fetch_manifest(APP, LATEST)
    assert str(fetched.digest) == image.digest == digest_of(fetched.content)
    assert fetched.content_type == OCI_INDEX


async def test_u24_a_wrong_digest_header_is_ignored(registry, upstream):
    image = registry.add_image()
    wrong_digest = Fault(headers={"Docker-Content-Digest": digest_of(b"other")})
    registry.fail("GET .*/manifests/", wrong_digest, times=None)
    assert str((await upstream.fetch_manifest(APP, LATEST)).digest) == image.digest


@pytest.mark.parametrize("value", [None, "", "md5:abc", "sha256:xyz", "sha256:" + "A" * 64])
async def test_u24_without_a_valid_digest_header_a_get_tells_the_digest(registry, upstream, value):
    image = registry.add_image()
    registry.fail("HEAD", Fault(headers={"Docker-Content-Digest": value}), times=None)
    resolved = await upstream.resolve(APP, LATEST)
    assert str(resolved.digest) == image.digest
    assert resolved.manifest.content == registry.repository(APP).manifests[image.digest].content


async def test_a_manifest_with_another_digest_is_rejected(registry, upstream):
    image = registry.add_image()
    registry.fail("GET .*/manifests/sha256", Fault(flip_at=3), times=None)
    with pytest.raises(DigestMismatchError):
        await upstream.fetch_manifest(APP, Digest.parse(image.digest))


async def test_a_manifest_that_is_too_large_is_not_read_to_the_end(registry, upstream):
    digest = registry.add_manifest(APP, "huge", b" " * 64_000_000, OCI_MANIFEST)
    registry.front.send_length = False
    with pytest.raises(UpstreamError, match="more than the allowed 4194304 bytes"):
        await upstream.fetch_manifest(APP, Digest.parse(digest))
    await registry.until(lambda: registry.seen(digest)[-1].done)
    assert registry.bytes_sent(digest) < 40_000_000


async def test_a_blob_comes_from_the_cdn_without_credentials_and_with_its_url_unchanged(
    registry, upstream
):
    digest = registry.add_blob(LAYER)
    assert await fetch_blob(upstream, digest) == (0, len(LAYER), LAYER)
    (fetched,) = registry.seen(registry.body_of(digest))
    assert fetched.status == 200
    assert "Authorization" not in fetched.headers


async def test_a_blob_is_fetched_from_an_offset(registry, upstream):
    digest = registry.add_blob(LAYER)
    assert await fetch_blob(upstream, digest, 1000) == (1000, len(LAYER), LAYER[1000:])
    registry.edge.accept_ranges = False
    assert await fetch_blob(upstream, digest, 1000) == (0, len(LAYER), LAYER)


@pytest.mark.parametrize("value", [None, "bytes 0-9/10", "bytes x", "bytes 999-5000/9000"])
async def test_a_206_for_another_range_is_rejected(registry, upstream, value):
    digest = registry.add_blob(LAYER)
    fault = Fault(headers={"Content-Range": value})
    registry.fail(registry.body_of(digest), fault, times=None)
    with pytest.raises(UpstreamError):
        await fetch_blob(upstream, digest, 1000)


async def test_a_blob_of_unknown_length_has_no_size(registry, upstream):
    registry.edge.send_length = False
    digest = registry.add_blob(LAYER)
    assert await fetch_blob(upstream, digest) == (0, None, LAYER)


@pytest.mark.parametrize("fault", [Fault(cut_at=1000), Fault(cut_at=1000, reset=True)])
async def test_a_broken_transfer_is_an_error(registry, upstream, fault):
    digest = registry.add_blob(LAYER)
    registry.fail(registry.body_of(digest), fault)
    with pytest.raises(UpstreamUnavailableError):
        await fetch_blob(upstream, digest)


async def test_a_probe_tells_what_the_last_response_states_about_the_blob(registry, upstream):
    digest = Digest.parse(registry.add_blob(LAYER))
    assert await upstream.probe_blob(APP, digest) == Evidence(len(LAYER), None, is_html=False)
    assert registry.bytes_sent("/registry-v2/") == 1
    registry.cdn = False
    assert await upstream.probe_blob(APP, digest) == Evidence(len(LAYER), digest, is_html=False)
    registry.fail("/blobs/", HTML)
    assert (await upstream.probe_blob(APP, digest)).is_html


async def test_a_probe_of_a_blob_that_upstream_does_not_have_fails(registry, upstream):
    digest = Digest.parse(registry.add_blob(LAYER))
    with pytest.raises(UnknownBlobError):
        await upstream.probe_blob(APP, Digest.from_content(b"none"))
    with pytest.raises(UpstreamUnauthorizedError):
        await upstream.probe_blob("library/none", digest)
    with pytest.raises(UnsatisfiableRangeError):
        await upstream.probe_blob(APP, Digest.parse(registry.add_blob(b"")))


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, UpstreamRefusedError),
        (401, UpstreamUnauthorizedError),
        (403, UpstreamForbiddenError),
        (404, UnknownManifestError),
        (429, RateLimitedError),
        (500, UpstreamUnavailableError),
        (502, UpstreamUnavailableError),
        (503, UpstreamUnavailableError),
        (504, UpstreamUnavailableError),
        (520, UpstreamUnavailableError),
        (204, UpstreamRefusedError),
        (304, UpstreamRefusedError),
    ],
)
async def test_each_status_has_its_error(registry, upstream, status, error):
    registry.add_image()
    registry.fail("GET .*/manifests/", Fault(status=status, body=b""), times=None)
    with pytest.raises(error) as caught:
        await upstream.fetch_manifest(APP, LATEST)
    assert type(caught.value) is error


async def test_upstreams_message_is_passed_on_without_control_characters(registry, upstream):
    error_body = b'{"errors":[{"code":"X","message":"no \\u001b[31m pulls \\n today"}]}'
    registry.add_image()
    registry.fail("/manifests/", Fault(status=404, body=error_body), times=None)
    with pytest.raises(UnknownManifestError) as caught:
        await upstream.resolve(APP, LATEST)
    assert str(caught.value).isprintable()
    with pytest.raises(UnknownManifestError, match=r"no .* pulls .* today"):
        await upstream.fetch_manifest(APP, LATEST)


@pytest.mark.parametrize(
    "error_body",
    [b"<html>", b"", b"[]", b'{"errors":null}', b'{"errors":[]}', b"\xff" * 99, b"[" * 9999],
)
async def test_an_invalid_error_body_does_not_hide_the_status(registry, upstream, error_body):
    registry.add_image()
    registry.fail("/manifests/", Fault(status=404, body=error_body), times=None)
    with pytest.raises(UnknownManifestError):
        await upstream.fetch_manifest(APP, LATEST)


async def test_a_missing_blob_is_unknown(registry, upstream):
    registry.add_image()
    with pytest.raises(UnknownBlobError):
        await fetch_blob(upstream, digest_of(b"none"))


async def test_a_429_is_reported_with_the_time_to_wait(registry, upstream):
    registry.pull_limit = 0
    registry.add_image()
    registry.fail("/none", Fault())
    with pytest.raises(RateLimitedError, match="pull rate limit") as caught:
        await upstream.fetch_manifest(APP, LATEST)
    assert caught.value.retry_after == 60
    upstream._registry._clock.advance(61)
    registry.fail("/manifests/", Fault(status=429, headers={"Retry-After": "7"}))
    with pytest.raises(RateLimitedError) as caught:
        await upstream.fetch_manifest(APP, LATEST)
    assert caught.value.retry_after == 7


async def test_an_upstream_that_is_down_is_unavailable(registry, upstream):
    registry.add_image()
    async with registry.down():
        with pytest.raises(UpstreamUnavailableError, match="cannot be reached"):
            await upstream.resolve(APP, LATEST)
    await upstream.resolve(APP, LATEST)


async def test_an_upstream_that_closes_connections_is_unavailable(registry, upstream):
    registry.fail("", Fault(hang_up=True), times=None)
    with pytest.raises(UpstreamUnavailableError):
        await upstream.resolve(APP, LATEST)


async def test_u05_a_kept_connection_that_upstream_has_closed_is_replaced(connect):
    response = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nDocker-Content-Digest: %s\r\n\r\n"
        % digest_of(b"{}").encode()
    )
    one_response: list[Step] = [RecvUntil(HEAD_END), Send(response + b"{}")]
    async with RawUpstream([*one_response, RecvUntil(HEAD_END), Reset()], one_response) as raw:
        upstream = await connect(raw.url)
        for _ in range(2):
            assert (await upstream.fetch_manifest(APP, LATEST)).content == b"{}"
        assert raw.connections == 2


async def test_a_missing_response_is_a_timeout(registry, connect):
    upstream = await connect(
        registry.url, timeouts=RegistryTimeouts(2, 5, response=0.2, request=0.5)
    )
    registry.fail("HEAD", Fault(until_headers=asyncio.Event()), times=None)
    with pytest.raises(UpstreamTimeoutError, match="did not respond in time"):
        await upstream.resolve(APP, LATEST)
    assert registry.count("HEAD") == 2  # the second over a new connection


async def test_an_offline_upstream_receives_no_requests(registry, connect):
    upstream = await connect(registry.url, offline=True)
    with pytest.raises(UpstreamUnavailableError, match="offline"):
        await upstream.resolve(APP, LATEST)
    assert registry.requests == []
