"""The HTTP protocol: requests in order, their limits, and repeated requests."""

import asyncio
import re
from collections.abc import Awaitable, Callable

import pytest

from proxy.oci.digest import Digest
from proxy.server import http
from tests.fakes.faults import Fault
from tests.fakes.raw_client import RawClient
from tests.support.htpasswd import basic_auth, write_htpasswd

OCI = "application/vnd.oci.image.manifest.v1+json"
MANY = "Accept: text/html, application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1"
TIMES = re.compile(rb"(?:Date|Age): [^\r]*\r\n")

Ask = Callable[[bytes], Awaitable[tuple[int, bytes]]]


def request(target: str, *headers: str, method: str = "GET") -> bytes:
    lines = "".join(f"{line}\r\n" for line in headers)
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode()


LATEST = request("/v2/library/app/manifests/latest")


@pytest.fixture
async def image(registry, program):
    return registry.add_image()


@pytest.fixture
async def ask(program, image) -> Ask:
    """Send a request on a kept connection; return the status and the whole response."""
    peer = await RawClient.connect(program.url)

    async def ask(asked: bytes) -> tuple[int, bytes]:
        peer.received.clear()
        peer.send(asked)
        head = await peer.reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        has_body = found and not asked.startswith(b"HEAD ")
        body = await peer.read(int(found[1])) if found and has_body else b""
        return int(head.split()[1]), head + body

    return ask


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "headers", [(), (f"Accept: {OCI}",), (MANY, "User-Agent: docker/20.10"), "match"]
)
@pytest.mark.parametrize("is_tag", [True, False])
async def test_responses_are_the_same_byte_for_byte(program, ask, image, method, headers, is_tag):
    if headers == "match":
        headers = (f'If-None-Match: "{image.digest}"',)
    target = f"/v2/library/app/manifests/{'latest' if is_tag else image.digest}"
    asked = request(target, *headers, method=method)
    await program.manifest(image)
    _, expected = await ask(asked)
    for _ in range(3):
        _, got = await ask(asked)
        assert TIMES.sub(b"", got) == TIMES.sub(b"", expected)
        assert [found[:4] for found in TIMES.findall(got)] == [
            found[:4] for found in TIMES.findall(expected)
        ]


async def test_pipelined_requests_are_answered_in_order(program, image):
    peer = await RawClient.connect(program.url)
    digest = request(f"/v2/library/app/manifests/{image.digest}")
    ping = request("/v2/")
    for asked in (LATEST, digest):
        peer.send(asked)
        await peer.read_response()
    peer.received.clear()
    # In one piece, in several, and after a request that runs as a task.
    peer.send(LATEST + digest)
    peer.send(ping + LATEST)
    peer.send(LATEST[:20])
    peer.send(LATEST[20:])
    peer.send(digest)
    peer.send(request("/v2/", "Connection: close"))
    answer = await peer.read_to_end()
    lengths = [int(found) for found in re.findall(rb"Content-Length: (\d+)", answer.data)]
    length = len((await program.manifest("library/app")).body)
    assert lengths == [length, length, 2, length, length, length, 2]
    assert answer.data.count(b"HTTP/1.1 200 OK") == 7


async def test_an_expired_tag_is_revalidated(registry, program, ask):
    await ask(LATEST)
    await ask(LATEST)
    moved = registry.add_image(layers=[b"moved"])
    registry.requests.clear()
    assert moved.digest.encode() not in (await ask(LATEST))[1]
    assert not registry.requests
    program.clock.advance(601)
    assert moved.digest.encode() in (await ask(LATEST))[1]
    assert registry.requests
    # And its age starts at zero again, even within one second.
    assert b"\r\nAge: 0\r\n" in (await ask(LATEST))[1]


async def test_age_grows(program, ask):
    await ask(LATEST)
    await ask(LATEST)
    program.clock.advance(100)
    assert b"\r\nAge: 100\r\n" in (await ask(LATEST))[1]


async def test_content_of_another_repository_is_not_served(registry, program, ask, image):
    registry.add_image("library/other", layers=[b"other"])
    stranger = request(f"/v2/library/other/manifests/{image.digest}")
    await ask(LATEST)
    for _ in range(3):
        assert (await ask(stranger))[0] == 404


async def test_a_reload_applies_at_once(program, ask, image):
    for _ in range(2):
        assert (await ask(LATEST))[0] == 200
    upstream = {"url": program.registry.url, "deny": ["library/*"]}
    assert await program.reload(upstreams={"docker.io": upstream})
    assert (await ask(LATEST))[0] == 403


async def test_logins_are_required(program, ask, image, tmp_path):
    for _ in range(2):
        assert (await ask(LATEST))[0] == 200
    assert await program.reload(
        server={"htpasswd": write_htpasswd(tmp_path / "users", amy="secret")}
    )
    assert (await ask(LATEST))[0] == 401
    login = f"Authorization: {basic_auth('amy', 'secret')}"
    for _ in range(2):
        assert (await ask(request("/v2/library/app/manifests/latest", login)))[0] == 200


async def test_requests_are_counted_and_logged(registry, program, image, logged):
    peer = await RawClient.connect(program.url)
    for _ in range(3):
        peer.send(LATEST)
        await peer.read_response()
        peer.received.clear()
    miss, *hits = logged
    assert (miss["cache"], [line["cache"] for line in hits]) == ("miss", ["hit", "hit"])
    for line in hits:
        assert line.keys() == miss.keys()
        for name in ("client", "method", "path", "status", "kind", "upstream", "bytes"):
            assert line[name] == miss[name]
    assert await program.metric("pullcache_requests_total", kind="manifest", cache="hit") == 2
    assert await program.metric("pullcache_response_bytes_total", kind="manifest", cache="hit") == (
        2 * int(str(miss["bytes"]))
    )


async def test_a_request_counts_as_a_use(program, image, ask):
    index = program.running._core.index
    for _ in range(2):
        await ask(LATEST)
    digest = Digest.parse(image.digest)
    before = index._pending_uses[digest]
    await ask(LATEST)
    assert index._pending_uses[digest] > before


@pytest.mark.parametrize(
    ("asked", "statuses"),
    [
        (request("/v2/", "Connection: close"), [200]),
        (request("/v2/").replace(b"HTTP/1.1", b"HTTP/1.0"), [200]),
        (request("/v2/", "Connection: Upgrade", "Upgrade: h2c"), [200]),
        (request("/v2/", "Content-Length: 100000") + bytes(100_000), [200]),
        (request("/v2/", "Content-Length: 4", "Expect: 100-continue") + b"body", [200]),
        (request("/v2/", "Content-Length: 4", method="PUT") + b"body", [405]),
        (request("/v2/", "Content-Length: 4") + b"body", [200, 404]),
        (request("/v2/", "Transfer-Encoding: chunked") + b"1\r\na\r\n0\r\n\r\n", [200, 404]),
        (request("/v2/", "Expect: 100-continue"), [200, 404]),
        (request("/v2/", "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0"), [200, 404]),
        (
            request("/v2/", "Transfer-Encoding: chunked") + b"2000000\r\n" + bytes(100_000),
            [413],
        ),
    ],
    ids=[
        *("close", "1.0", "upgrade", "a long body", "a body on condition", "an upload"),
        *("a body", "chunks", "a condition", "1.0 that stays", "endless chunks"),
    ],
)
async def test_a_rejected_request_ends_the_connection(program, asked, statuses):
    peer = await RawClient.connect(program.url)
    peer.send(asked + request("/second", "Connection: close"))
    answer = await peer.read_to_end()
    assert [int(one) for one in re.findall(rb"HTTP/1.1 (\d+)", answer.data)] == statuses
    assert answer.end == "fin"


def padded(size: int) -> bytes:
    """Return a request whose head has this size."""
    return request("/v2/", f"X-Long: {'x' * (size - len(request('/v2/', 'X-Long: ')))}")


@pytest.mark.parametrize("is_slow", [False, True])
async def test_a_head_may_have_at_most_64_kib(program, is_slow):
    for size, status in [(http.MAX_HEAD_SIZE, 200), (http.MAX_HEAD_SIZE + 1, 431)]:
        asked = padded(size)
        assert len(asked) == size
        peer = await RawClient.connect(program.url)
        # After another request, a head may begin anywhere in the bytes of a read.
        peer.send(request("/v2/") + asked[:100])
        await peer.read_response()
        peer.received.clear()
        for start in range(100, size, 1000 if is_slow else size):
            peer.send(asked[start : start + (1000 if is_slow else size)])
            await asyncio.sleep(0)
        assert (await peer.read_response()).status == status
        await peer.close()


@pytest.mark.parametrize(
    "begin", [b"0\r\nT: ", b"1;"], ids=["a trailer", "an extension of a chunk"]
)
async def test_the_framing_of_a_body_is_bounded(program, begin):
    peer = await RawClient.connect(program.url)
    peer.send(request("/v2/", "Transfer-Encoding: chunked") + begin)
    await program.ask("/v2/")
    peer.send(b"x" * (http.MAX_REQUEST_SIZE + 1))
    assert (await peer.read_to_end()).status == 413


async def test_the_number_of_headers_is_bounded(program):
    for count, status in [(http.MAX_HEADERS - 1, 200), (http.MAX_HEADERS, 431)]:
        peer = await RawClient.connect(program.url)
        peer.send(request("/v2/", *(f"X-{n}: y" for n in range(count))))
        assert (await peer.read_response()).status == status
        await peer.close()


async def test_pipelined_bytes_are_bounded_and_no_request_is_lost(registry, program):
    digest = registry.add_blob(bytes(20 << 20))
    assert (await program.blob(digest)).is_whole
    await program.wait_for_downloads()
    peer = await RawClient.connect(program.url, receive_buffer=4096)
    peer.send(request(f"/v2/library/app/blobs/{digest}"))
    await peer.read(10)
    (connection,) = [one for one in program.running.listener._server._open_connections if one._task]
    peer.send(request("/v2/") * 20_000 + request("/v2/", "Connection: close"))
    async with asyncio.timeout(10):
        while not connection._is_reading_paused:
            await program.ask("/v2/")
    assert len(connection._unparsed) < http.MAX_PIPELINED_SIZE + (256 << 10)
    answer = await peer.read_to_end()
    assert answer.data.count(b"HTTP/1.1 200") == 20_002


async def test_several_accept_lines_are_one_list(program, ask, image):
    accept = [f"Accept: {line}" for line in ("text/html", OCI)]
    assert (await ask(request("/v2/library/app/manifests/latest", *accept)))[0] == 200
    refused = request("/v2/library/app/manifests/latest", "Accept: text/html", "Accept: text/x")
    assert (await ask(refused))[0] == 404


async def test_a_client_that_disconnects_ends_its_request(registry, program, logged):
    registry.fail("GET /v2/library/app/manifests", Fault(until_headers=asyncio.Event()))
    peer = await RawClient.connect(program.url)
    peer.send(LATEST)
    await registry.until(lambda: registry.count("GET /v2/library/app/manifests") == 1)
    assert program.running.middleware.in_flight == 1
    await peer.close()
    async with asyncio.timeout(10):
        while program.running.middleware.in_flight:  # noqa: ASYNC110 (the event is the middleware's)
            await asyncio.sleep(0)
    assert [line["status"] for line in logged] == [499]


async def test_a_repeated_request_gets_the_same_response_on_any_connection(program):
    """Identical requests are parsed once."""
    request = b"GET /v2/ HTTP/1.1\r\nHost: cache\r\n\r\n"
    closing = b"GET /v2/ HTTP/1.1\r\nHost: cache\r\nConnection: close\r\n\r\n"
    bodies = set()
    for _ in range(2):
        client = await RawClient.connect(program.url)
        for sent in (request, request, closing, request):
            client.send(sent)
        response = await client.read_to_end()
        assert response.data.count(b"HTTP/1.1 200 OK\r\n") == 3
        assert response.end == "fin"
        bodies.add(response.data.count(b"Connection: close\r\n"))
    assert bodies == {1}
