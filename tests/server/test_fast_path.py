"""Requests that came before, byte for byte, are answered where they arrive: alike, and by the same rules."""

import re
from collections.abc import Awaitable, Callable

import pytest

from proxy.server import fast_path
from tests.fakes.peer import Peer
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
    """Ask on one connection that stays; return the status and all of the answer."""
    peer = await Peer.connect(program.url)

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
async def test_the_answer_is_the_same_byte_for_byte(
    program, ask, image, usual, method, headers, is_tag
):
    if headers == "match":
        headers = (f'If-None-Match: "{image.digest}"',)
    target = f"/v2/library/app/manifests/{'latest' if is_tag else image.digest}"
    asked = request(target, *headers, method=method)
    await program.manifest(image)
    usual.clear()
    _, expected = await ask(asked)
    assert len(usual) == 1
    for _ in range(3):
        _, got = await ask(asked)
        assert TIMES.sub(b"", got) == TIMES.sub(b"", expected)
        assert [found[:4] for found in TIMES.findall(got)] == [
            found[:4] for found in TIMES.findall(expected)
        ]
    assert len(usual) == 1


async def test_many_at_once_are_answered_in_order(program, image, usual):
    peer = await Peer.connect(program.url)
    digest = request(f"/v2/library/app/manifests/{image.digest}")
    ping = request("/v2/")
    for asked in (LATEST, digest):
        peer.send(asked)
        await peer.until_answer()
    peer.received.clear()
    # In one piece, in several, and behind one that takes a task.
    peer.send(LATEST + digest)
    peer.send(ping + LATEST)
    peer.send(LATEST[:20])
    peer.send(LATEST[20:])
    peer.send(digest)
    peer.send(request("/v2/", "Connection: close"))
    answer = await peer.until_end()
    lengths = [int(found) for found in re.findall(rb"Content-Length: (\d+)", answer.data)]
    length = len((await program.manifest("library/app")).body)
    assert lengths == [length, length, 2, length, length, length, 2]
    assert answer.data.count(b"HTTP/1.1 200 OK") == 7


async def test_a_tag_that_expired_is_asked_again(registry, program, ask, usual):
    await ask(LATEST)
    await ask(LATEST)
    assert len(usual) == 1
    moved = registry.add_image(layers=[b"moved"])
    registry.requests.clear()
    assert moved.digest.encode() not in (await ask(LATEST))[1]
    assert not registry.requests
    program.clock.turn(601)
    assert moved.digest.encode() in (await ask(LATEST))[1]
    assert registry.requests
    # And its age begins anew, even within one second.
    assert b"\r\nAge: 0\r\n" in (await ask(LATEST))[1]


async def test_age_grows(program, ask):
    await ask(LATEST)
    await ask(LATEST)
    program.clock.turn(100)
    assert b"\r\nAge: 100\r\n" in (await ask(LATEST))[1]


async def test_what_another_repository_holds_is_not_served(registry, program, ask, image):
    registry.add_image("library/other", layers=[b"other"])
    stranger = request(f"/v2/library/other/manifests/{image.digest}")
    await ask(LATEST)
    for _ in range(3):
        assert (await ask(stranger))[0] == 404


async def test_a_reload_counts_at_once(program, ask, image):
    for _ in range(2):
        assert (await ask(LATEST))[0] == 200
    upstream = {"url": program.registry.url, "deny": ["library/*"]}
    assert await program.reload(upstreams={"docker.io": upstream})
    assert (await ask(LATEST))[0] == 403


async def test_logins_are_asked_for(program, ask, image, tmp_path, usual):
    for _ in range(2):
        assert (await ask(LATEST))[0] == 200
    assert await program.reload(
        server={"htpasswd": write_htpasswd(tmp_path / "users", amy="secret")}
    )
    assert (await ask(LATEST))[0] == 401
    login = f"Authorization: {basic_auth('amy', 'secret')}"
    usual.clear()
    for _ in range(2):
        assert (await ask(request("/v2/library/app/manifests/latest", login)))[0] == 200
    assert len(usual) == 2


async def test_they_are_counted_and_logged(registry, program, image, logged):
    peer = await Peer.connect(program.url)
    for _ in range(3):
        peer.send(LATEST)
        await peer.until_answer()
        peer.received.clear()
    usual, *at_once = logged
    assert (usual["cache"], [line["cache"] for line in at_once]) == ("miss", ["hit", "hit"])
    for line in at_once:
        assert line.keys() == usual.keys()
        for name in ("client", "method", "path", "status", "kind", "upstream", "bytes"):
            assert line[name] == usual[name]
    assert await program.metric("pullcache_requests_total", kind="manifest", cache="hit") == 2
    assert await program.metric("pullcache_response_bytes_total", kind="manifest", cache="hit") == (
        2 * int(str(usual["bytes"]))
    )


async def test_a_use_counts(program, image, ask):
    index = program.running._core.index
    for _ in range(2):
        await ask(LATEST)
    before = index._pending_uses[image.digest]
    await ask(LATEST)
    assert index._pending_uses[image.digest] > before


@pytest.mark.parametrize(
    "asked",
    [
        request("/v2/library/app/manifests/latest", "Connection: close"),
        request("/v2/library/app/manifests/latest?ns=docker.io"),
        request("/v2/library/app/manifests/latest", f"X-Long: {'x' * fast_path.MAX_HEAD_SIZE}"),
        LATEST.replace(b"HTTP/1.1", b"HTTP/1.0"),
        request("/v2/library/app/manifests/latest", "Content-Length: 4") + b"\r\n\r\n",
    ],
    ids=["close", "ns", "long", "1.0", "body"],
)
async def test_what_is_not_plain_goes_the_usual_way(program, image, usual, asked):
    for count in (1, 2):
        peer = await Peer.connect(program.url)
        peer.send(asked)
        assert (await peer.until_answer()).status == 200
        assert len(usual) == count


async def test_what_is_kept_is_bounded(monkeypatch, program, ask, image):
    monkeypatch.setattr(fast_path, "MAX_PARSED_REQUESTS", 10)
    kept = program.running.middleware.registry_handler.fast_path._parsed_requests
    for number in range(25):
        asked = request("/v2/library/app/manifests/latest", f"User-Agent: {number}")
        for _ in range(2):
            assert (await ask(asked))[0] == 200
        assert 1 <= len(kept) <= 10
