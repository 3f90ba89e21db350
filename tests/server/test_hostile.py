"""Raw hostile requests: they get a 4xx of the specification, never a 500 or a traceback."""

import json

import pytest
from structlog.testing import capture_logs

from proxy.server import http
from tests.fakes.content import digest_of
from tests.fakes.raw_client import RawClient, RawResponse, exchange

MANIFEST = "/v2/library/app/manifests/latest"
BLOB = f"/v2/library/app/blobs/{digest_of(b'layer')}"
HOST = "Host: 127.0.0.1\r\n"


def get(target: str, *headers: str, host: str = HOST, version: str = "HTTP/1.1") -> bytes:
    """Return a request; a target may hold any character below U+0100."""
    lines = "".join(f"{header}\r\n" for header in headers)
    return f"GET {target} {version}\r\n{host}{lines}\r\n".encode("latin-1")


# C5: bytes that two parsers could understand as different requests.
SMUGGLED = {
    "both lengths": get(BLOB, "Content-Length: 3", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "two lengths": get(BLOB, "Content-Length: 3", "Content-Length: 4") + b"abcd",
    "a signed length": get(BLOB, "Content-Length: +4") + b"abcd",
    "an unknown coding": get(BLOB, "Transfer-Encoding: xchunked"),
    "bare line feeds": get(BLOB).replace(b"\r\n", b"\n"),
    "a folded header": get(BLOB, "X-A: b\r\n c"),
    "a blank before the colon": get(BLOB, "X-A : b"),
    "a NUL in a header": get(BLOB, "X-A: b\0c"),
    "no colon": get(BLOB, "nonsense"),
    "two hosts": get(BLOB, "Host: b"),
    "no host": get(BLOB, host=""),
    "a long line": get("/v2/" + "a" * 70_000),
    "a long header": get(BLOB, "X-A: " + "b" * 70_000),
    "many headers": get(BLOB, *(f"X-{n}: b" for n in range(2000))),
    "the preface of http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a tls hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",
    "the proxy protocol": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + get(BLOB),
    "no version": b"GET /v2/\r\n\r\n",
    "a strange version": get(BLOB, version="HTTP/7.7"),
    "junk": b"\xff\xfe\x00 junk\r\n\r\n",
}

# C7 to C11: targets and hosts.
TARGETS = {
    "another host in the target": (f"http://evil.example{MANIFEST}", {200}),
    "our host in the target": (f"http://127.0.0.1{MANIFEST}", {200}),
    "an encoded slash": ("/v2/library%2fapp/manifests/latest", {400, 404}),
    "an encoded path upward": ("/v2/..%2f..%2fetc/manifests/passwd", {400, 404}),
    "two encoded slashes": ("/v2/%2F%2F..%2F..%2Fetc%2Fpasswd", {400, 404}),
    "a path upward": ("/v2/../admin", {400, 404}),
    "a path upward in a name": ("/v2/library/../app/manifests/latest", {400, 404}),
    "an encoded NUL": ("/v2/library/app%00/manifests/latest", {400, 404}),
    "bytes that are no text": ("/v2/library/app%ff/manifests/latest", {400, 404}),
    "raw bytes that are no text": ("/v2/library/\xff\xfe/manifests/latest", {400, 404}),
    "a backslash": ("/v2/library\\app/manifests/latest", {400, 404}),
    "a semicolon": ("/v2/library/app;x=y/manifests/latest", {400, 404}),
    "a long name": ("/v2/" + "a" * 7000 + "/manifests/latest", {400, 404}),
    "two slashes": ("/v2/library//app/manifests/latest", {400, 404}),
    "unicode dots": ("/v2/library/%E2%80%A5/manifests/latest", {400, 404}),
    "a slash at the end": (MANIFEST + "/", {400, 404}),
    "a fragment": (MANIFEST + "#x", {200, 400, 404}),
    "a star": ("*", {400, 404}),
    "nothing but a question mark": ("/v2/?", {200, 400, 404}),
    "a digest upward": ("/v2/library/app/blobs/sha256:../../x", {400, 404}),
    "an encoded digest upward": ("/v2/library/app/blobs/sha256:..%2f..%2fx", {400}),
    "an upper-case digest": ("/v2/library/app/blobs/sha256:" + "A" * 64, {400}),
    "a short digest": ("/v2/library/app/blobs/sha256:" + "a" * 63, {400}),
    "a long digest": ("/v2/library/app/blobs/sha256:" + "a" * 65, {400}),
    "a digest with NUL": ("/v2/library/app/blobs/sha256:" + "a" * 64 + "%00", {400}),
    "an unknown algorithm": ("/v2/library/app/blobs/sha999:" + "a" * 64, {400}),
    "a digest with a slash": ("/v2/library/app/blobs/sha256:aa/bb", {400, 404}),
    "two digests": (f"{BLOB},{digest_of(b'x')}", {400}),
    "a long tag": ("/v2/library/app/manifests/" + "a" * 129, {400, 404}),
    "a tag with a dash before": ("/v2/library/app/manifests/-x", {400, 404}),
    "a tag with a dot before": ("/v2/library/app/manifests/.x", {400, 404}),
    "a whale": ("/v2/library/app/manifests/%F0%9F%90%B3", {400, 404}),
    "a huge page": ("/v2/library/app/tags/list?n=1000000000", {200, 400}),
    "a page below zero": ("/v2/library/app/tags/list?n=-1", {200, 400}),
    "a page that is no number": ("/v2/library/app/tags/list?n=NaN", {200, 400}),
    "a long last": ("/v2/library/app/tags/list?last=" + "z" * 4000, {200, 400}),
    "a catalog page": ("/v2/_catalog?n=1000000000&last=%00%ff", {200, 400}),
    "a namespace of the cloud": (MANIFEST + "?ns=169.254.169.254", {400, 403}),
    "a namespace of evil": (MANIFEST + "?ns=evil.example", {400, 403}),
    "a namespace of ours": (MANIFEST + "?ns=127.0.0.1", {400, 403}),
    "two namespaces": (MANIFEST + "?ns=docker.io&ns=evil.example", {200, 400, 403}),
    "a namespace upward": (MANIFEST + "?ns=..%2F..%2F", {400, 403}),
    "an empty namespace": (MANIFEST + "?ns=", {200, 400, 403}),
    "a filter of bytes": (f"/v2/library/app/referrers/{digest_of(b'x')}?artifactType=%ff", {200}),
}

HEADERS = {
    "host with a path": (get(MANIFEST, host="Host: a/?#@b\r\n"), {200, 400, 404}),
    "host of another": (get(MANIFEST, host="Host: evil.example\r\n"), {200, 400, 403, 404}),
    "range from the end of nothing": (get(BLOB, "Range: bytes=-0"), {416}),
    "range backwards": (get(BLOB, "Range: bytes=5-2"), {200, 416}),
    "range of everything": (get(BLOB, "Range: bytes=0-"), {206}),
    "a thousand ranges": (get(BLOB, "Range: bytes=" + "0-0," * 1000 + "1-1"), {200, 206, 416}),
    "range of lines": (get(BLOB, "Range: lines=1-2"), {200}),
    "range to the moon": (get(BLOB, f"Range: bytes={10**30}-"), {200, 416}),
    "range that is junk": (get(BLOB, "Range: \xff"), {200, 416}),
    "if-range that is weak": (
        get(BLOB, "Range: bytes=0-1", f'If-Range: W/"{digest_of(b"layer")}"'),
        {200},
    ),
    "if-none-match of anything": (get(BLOB, "If-None-Match: *"), {304}),
    "if-none-match of many": (get(BLOB, "If-None-Match: " + '"x",' * 1500), {200}),
    "if-none-match that is junk": (get(BLOB, 'If-None-Match: W/"'), {200}),
    "accept of nothing": (get(MANIFEST, "Accept: */*;q=0"), {404, 200}),
    "a long accept": (get(MANIFEST, "Accept: " + "x/y," * 2000), {404}),
    "accept of schema 1": (
        get(MANIFEST, "Accept: application/vnd.docker.distribution.manifest.v1+json"),
        {404},
    ),
    "accept that is junk": (get(MANIFEST, "Accept: \xff\xfe"), {404, 200}),
    "authorization that is junk": (get(MANIFEST, "Authorization: \xff" + "x" * 5000), {200}),
    "an upgrade": (get(MANIFEST, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"), {200}),
    "trailers": (get(MANIFEST, "TE: trailers"), {200}),
    "forwarded headers": (get(MANIFEST, "X-Forwarded-Host: evil", "Forwarded: host=evil"), {200}),
    "http/1.0": (get(MANIFEST, version="HTTP/1.0"), {200}),
    "escapes in a header": (get(MANIFEST, "User-Agent: \x1b[31m"), {200, 400}),
}


@pytest.fixture
async def target(registry, program):
    """The program, with an image in its store."""
    image = registry.add_image()
    await program.pull(image)
    await program.wait_for_downloads()
    return program


def check_error(answer: RawResponse) -> None:
    """Check that an error response has our form and quotes nothing of the request."""
    assert 400 <= answer.status < 500
    document = json.loads(answer.body)
    assert document["errors"][0]["code"].isupper()
    assert answer.headers["content-type"] == "application/json"


def no_tracebacks(logged, caplog) -> None:
    assert not [entry for entry in logged if entry.get("exc_info")]
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("name", SMUGGLED)
async def test_c05_an_ambiguous_request_is_rejected_and_the_connection_closed(target, caplog, name):
    peer = await RawClient.connect(target.url)
    with capture_logs() as logged:
        peer.send(SMUGGLED[name])
        answer = await peer.read_to_end()
    await peer.close()
    check_error(answer)
    assert b"xchunked" not in answer.body
    assert b"\xff" not in answer.body
    no_tracebacks(logged, caplog)


@pytest.mark.parametrize("name", TARGETS)
async def test_c07_to_c11_a_target_is_never_normalised(target, registry, caplog, name):
    asked, allowed = TARGETS[name]
    with capture_logs() as logged:
        answer = await exchange(target.url, get(asked))
    assert answer.status in allowed
    if answer.status >= 400:
        check_error(answer)
    assert "evil" not in answer.headers.get("location", "")
    assert "www-authenticate" not in answer.headers
    assert not registry.seen(r"evil|/etc|169\.254")
    no_tracebacks(logged, caplog)


@pytest.mark.parametrize("name", HEADERS)
async def test_c12_to_c15_headers_are_interpreted_as_specified_or_ignored(target, caplog, name):
    request, allowed = HEADERS[name]
    with capture_logs() as logged:
        answer = await exchange(target.url, request)
    assert answer.status in allowed
    if answer.status >= 400 and answer.status != 416:
        check_error(answer)
    no_tracebacks(logged, caplog)


@pytest.mark.parametrize(
    "method", ["PUT", "POST", "PATCH", "DELETE", "TRACE", "QUERY", "get", "CONNECT", "X" * 100]
)
async def test_c14_all_methods_except_get_and_head_are_rejected(target, caplog, method):
    with capture_logs() as logged:
        answer = await exchange(target.url, get(MANIFEST).replace(b"GET", method.encode(), 1))
    assert answer.status in ({400, 405} if method in ("get", "CONNECT", "X" * 100) else {405})
    check_error(answer)
    if answer.status == 405:
        assert answer.headers["allow"] == "GET, HEAD"
    no_tracebacks(logged, caplog)


async def test_c06_a_hundred_pipelined_requests_are_answered_in_order(target, registry):
    registry.pull_limit = None
    peer = await RawClient.connect(target.url)
    peer.send(b"".join(get(f"/v2/library/app/manifests/none{n}") for n in range(100)))
    peer.send(get("/v2/", "Connection: close"))
    answer = await peer.read_to_end()
    await peer.close()
    assert answer.data.count(b"HTTP/1.1 404") == 100
    assert answer.data.endswith(b"{}")


async def test_a_get_with_a_body_is_answered_and_the_next_request_is_not_confused(target):
    peer = await RawClient.connect(target.url)
    inner = get("/v2/library/evil/manifests/x")
    peer.send(get("/v2/", f"Content-Length: {len(inner)}") + inner)
    peer.send(get("/v2/", "Connection: close"))
    answer = await peer.read_to_end()
    await peer.close()
    assert b"404" not in answer.data


async def test_c20_clients_that_disconnect_in_the_middle_leave_nothing_behind(
    target, registry, caplog
):
    digest = registry.add_blob(bytes(4_000_000))
    await target.blob(digest)
    with capture_logs() as logged:
        for _ in range(20):
            peer = await RawClient.connect(target.url, receive_buffer=4096)
            peer.send(get(f"/v2/library/app/blobs/{digest}"))
            await peer.read(1000)
            await peer.close()
        assert (await target.blob(digest)).is_whole
    no_tracebacks(logged, caplog)


async def test_c21_expect_100_continue_is_answered(target):
    answer = await exchange(target.url, get("/v2/", "Expect: 100-continue"))
    assert answer.status in (100, 200)


def test_a_silent_connection_is_closed():
    assert http.KEEPALIVE_TIMEOUT <= 75
