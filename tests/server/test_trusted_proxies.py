"""`server.trusted_proxies` and `server.allow_clients`: what the cache knows of clients behind proxies."""

import asyncio
import io
import json
import ssl
from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from proxy.log import configure_logging
from tests.fakes.raw_client import RawClient, RawResponse, exchange
from tests.server.test_proxy_protocol import IPV4, V2, v2
from tests.support.certificates import Authority
from tests.support.program import Program

PING = b"GET /v2/ HTTP/1.1\r\nHost: cache\r\n\r\n"
LAST_PING = PING.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
V1 = b"PROXY TCP4 192.0.2.1 127.0.0.1 40000 5000\r\n"
TRUSTED = {"trusted_proxies": ["127.0.0.0/8", "10.0.0.0/8"]}


class LoggedProgram:
    """A program whose access log says which client a request is from."""

    def __init__(self, program: Program, stream: io.StringIO) -> None:
        self.program = program
        self._stream = stream

    async def send(self, *pieces: bytes) -> RawResponse:
        """Send pieces, each in a segment of its own, and return what comes back."""
        peer = await RawClient.connect(self.program.url)
        for piece in pieces:
            peer.send(piece)
            await asyncio.sleep(0.01 if len(pieces) > 1 else 0)
        return await peer.read_to_end()

    async def clients(self) -> list[str | None]:
        """Stop the program; return the clients of its requests, in order."""
        await self.program.stop()
        await asyncio.to_thread(self.program.access_log.close)
        lines = [json.loads(line) for line in self._stream.getvalue().splitlines()]
        found = [line for line in lines if line["event"] == "request"]
        return [line["client"] for line in found if line["path"] == "/v2/"]


@pytest.fixture
async def logged(registry, tmp_path, restore_logging):
    """Return a function that starts a program with settings of its server."""

    async def start(trust: Any = True, **server: Any) -> LoggedProgram:
        stream = io.StringIO()
        program = Program(tmp_path / "store", registry, server=server, trust=trust)
        program.access_log = configure_logging("info", "json", stream)
        await program.start()
        return LoggedProgram(program, stream)

    return start


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (no event)
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("header", [V1, v2(0x21, 0x11, IPV4)], ids=["v1", "v2"])
async def test_the_header_of_a_trusted_proxy_names_the_client(logged, header):
    served = await logged(**TRUSTED)
    assert (await served.send(header + LAST_PING)).status == 200
    assert (await served.send(header, LAST_PING)).status == 200
    assert await served.clients() == ["192.0.2.1", "192.0.2.1"]


async def test_a_header_may_arrive_byte_by_byte(logged):
    served = await logged(**TRUSTED)
    header = v2(0x21, 0x11, IPV4)
    for whole in (V1, header):
        pieces = [whole[number : number + 1] for number in range(len(whole))]
        assert (await served.send(*pieces, LAST_PING)).status == 200
    assert await served.clients() == ["192.0.2.1", "192.0.2.1"]


async def test_a_proxy_that_speaks_for_itself_or_sends_no_header_is_the_client(logged):
    served = await logged(**TRUSTED)
    for start in (b"", b"PROXY UNKNOWN\r\n", v2(0x20, 0x00, b""), v2(0x21, 0x00, b"")):
        assert (await served.send(start + LAST_PING)).status == 200
    assert await served.clients() == ["127.0.0.1"] * 4


async def test_the_beginning_of_a_request_that_looks_like_a_header_is_kept(logged):
    served = await logged(**TRUSTED)
    request = b"PROPFIND /v2/ HTTP/1.1\r\nHost: cache\r\nConnection: close\r\n\r\n"
    assert (await served.send(request[:3], request[3:])).status == 405
    assert await served.clients() == ["127.0.0.1"]


@pytest.mark.parametrize("header", [V1, v2(0x21, 0x11, IPV4)], ids=["v1", "v2"])
async def test_the_header_of_any_other_client_is_a_malformed_request(logged, header):
    served = await logged(trusted_proxies=["192.0.2.0/24"])
    assert (await served.send(header + LAST_PING)).status == 400
    assert await served.clients() == []


@pytest.mark.parametrize(
    "header",
    [
        b"PROXY TCP4 nonsense\r\n",
        b"PROXY " + b"A" * 200,
        v2(0x21, 0x12, IPV4),
        v2(0x21, 0x21, IPV4),
        V2 + b"\x21\x11\xff\xff",
    ],
    ids=["malformed", "oversized", "wrong transport", "wrong family", "oversized v2"],
)
async def test_a_hostile_header_ends_the_connection(logged, header):
    served = await logged(**TRUSTED)
    with capture_logs() as events:
        assert (await served.send(header + LAST_PING)).data == b""
    assert [one["event"] for one in events] == ["proxy_header_rejected"]
    assert (await served.send(LAST_PING)).status == 200
    assert await served.clients() == ["127.0.0.1"]


async def test_a_truncated_header_takes_a_slot_until_the_proxy_gives_up(logged):
    served = await logged(**TRUSTED)
    peer = await RawClient.connect(served.program.url)
    peer.send(V1[:20])
    limiter = served.program.running.access.limiter
    await until(lambda: limiter.connected == 1)
    peer.writer.write_eof()
    await until(lambda: limiter.connected == 0)
    assert await served.clients() == []


async def test_the_header_precedes_tls(logged, tmp_path):
    authority = Authority(tmp_path / "authority")
    certificate, key = authority.issue("cache", "IP:127.0.0.1")
    context = ssl.create_default_context(cafile=str(authority.ca))
    served = await logged(context, **TRUSTED, tls_certificate=[certificate], tls_key=[key])
    host, port = served.program.addresses[0].rsplit(":", 1)
    for header in (V1, v2(0x21, 0x11, IPV4), b""):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(header)
        await writer.start_tls(context)
        writer.write(LAST_PING)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()
        await writer.wait_closed()
    assert await served.clients() == ["192.0.2.1", "192.0.2.1", "127.0.0.1"]


async def test_each_request_of_a_proxy_names_its_client(logged):
    served = await logged(**TRUSTED)
    request = b"GET /v2/ HTTP/1.1\r\nHost: cache\r\nX-Forwarded-For: %b\r\n\r\n"
    requests = [request % one for one in (b"192.0.2.1", b"192.0.2.2, 10.0.0.9", b"192.0.2.1")]
    await served.send(*requests, LAST_PING)
    assert await served.clients() == ["192.0.2.1", "192.0.2.2", "192.0.2.1", "127.0.0.1"]


async def test_a_client_cannot_name_another(logged):
    served = await logged(trusted_proxies=["192.0.2.0/24"])
    for name in (b"X-Forwarded-For: 192.0.2.9", b"Forwarded: for=192.0.2.9"):
        await served.send(LAST_PING.replace(b"Host", name + b"\r\nHost"))
    assert await served.clients() == ["127.0.0.1", "127.0.0.1"]


async def test_the_client_of_the_header_may_be_a_proxy_too(logged):
    served = await logged(trusted_proxies=["127.0.0.0/8", "192.0.2.0/24"])
    request = LAST_PING.replace(b"Host", b"X-Forwarded-For: 198.51.100.7\r\nHost")
    await served.send(V1 + request)
    assert await served.clients() == ["198.51.100.7"]


async def test_clients_of_one_proxy_are_limited_each_by_itself(logged):
    served = await logged(**TRUSTED, max_connections_per_client=2)
    first = [await RawClient.connect(served.program.url) for _ in range(2)]
    for peer in first:
        peer.send(V1 + PING)
        assert (await peer.read_response()).status == 200
    assert (await served.send(V1 + LAST_PING)).status == 429
    other = V1.replace(b"192.0.2.1", b"192.0.2.2")
    assert (await served.send(other + LAST_PING)).status == 200
    for peer in first:
        await peer.close()
    limiter = served.program.running.access.limiter
    await until(lambda: limiter.connected == 0)
    assert (await served.send(V1 + LAST_PING)).status == 200
    await served.clients()


async def test_a_connection_over_the_limit_of_all_gets_429_with_and_without_a_header(logged):
    served = await logged(**TRUSTED, max_connections=1)
    first = await RawClient.connect(served.program.url)
    first.send(V1 + PING)
    assert (await first.read_response()).status == 200
    for start in (V1, v2(0x21, 0x11, IPV4), b""):
        assert (await served.send(start + LAST_PING)).status == 429
    await first.close()
    limiter = served.program.running.access.limiter
    await until(lambda: limiter.connected == 0)
    await served.clients()


ALLOWED = {"allow_clients": ["192.0.2.0/24"]}


async def test_only_clients_of_the_networks_are_served(logged):
    served = await logged(**TRUSTED, **ALLOWED)
    assert (await served.send(V1 + LAST_PING)).status == 200
    answer = await served.send(LAST_PING)
    assert answer.status == 403
    assert b"this cache does not serve 127.0.0.1 (server.allow_clients)" in answer.body
    for path in (b"/healthz", b"/readyz"):
        assert (await served.send(LAST_PING.replace(b"/v2/", path))).status == 200
    assert (await served.send(LAST_PING.replace(b"/v2/", b"/metrics"))).status == 403
    await served.clients()


async def test_the_networks_are_reloaded(make_program):
    program = await make_program(server={"allow_clients": ["192.0.2.0/24"]})
    assert (await program.ask("/v2/")).status == 403
    program.sections["server"] = {}
    assert await program.running.reload(program.config)
    assert (await program.ask("/v2/")).status == 200


@pytest.mark.parametrize("trust", [{}, {"trusted_proxies": ["10.0.0.0/8"]}])
@pytest.mark.parametrize("header", [V1, v2(0x21, 0x11, IPV4)], ids=["v1", "v2"])
async def test_a_header_of_a_proxy_that_is_not_trusted_is_named_to_client_and_log(
    make_program, trust, header
):
    program = await make_program(server=trust)
    with capture_logs() as logs:
        answer = await exchange(program.url, header + LAST_PING)
    assert answer.status == 400
    message = json.loads(answer.body)["errors"][0]["message"]
    assert "a PROXY header" in message
    assert "server.trusted_proxies" in message
    (line,) = [line for line in logs if line["event"] == "malformed_request_rejected"]
    assert line["reason"] == message


def forwarded(*lines: str) -> bytes:
    """Return a request as nginx passes it on, with these lines among its headers."""
    head = ["GET /v2/ HTTP/1.1", "Host: cache", *lines, "User-Agent: docker/27"]
    return "".join(f"{line}\r\n" for line in head).encode() + b"\r\n"


async def clients_of(served: LoggedProgram, *requests: bytes) -> list[str | None]:
    """Send requests one after the other on one connection; return the clients in the log."""
    connection = await RawClient.connect(served.program.url)
    for request in requests:
        connection.send(request)
        await connection.reader.readuntil(b"{}")
    connection.send(LAST_PING)
    await connection.read_to_end()
    return (await served.clients())[:-1]


async def test_a_request_that_many_clients_repeat_is_parsed_once_and_each_is_named(logged):
    served = await logged(**TRUSTED)
    clients = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "192.0.2.1"]
    requests = [forwarded(f"X-Forwarded-For: {one}") for one in clients]
    ended = forwarded(), forwarded("X-Forwarded-For: 192.0.2.3")
    assert await clients_of(served, *requests, *ended) == [*clients, "127.0.0.1", "192.0.2.3"]


@pytest.mark.parametrize(
    ("lines", "client"),
    [
        (["x-forwarded-for: 192.0.2.9"], "192.0.2.9"),
        (["X-Forwarded-For: 192.0.2.9, 192.0.2.8"], "192.0.2.8"),
        (["X-Forwarded-For: 192.0.2.9", "X-Forwarded-For: 192.0.2.8"], "192.0.2.8"),
        (["x-forwarded-for: 192.0.2.9", "X-Forwarded-For: 192.0.2.1"], "192.0.2.1"),
        (["X-Forwarded-For: 192.0.2.1", "x-forwarded-for: 192.0.2.9"], "192.0.2.9"),
        (["X-Forwarded-For: 192.0.2.1", "Forwarded: for=192.0.2.9"], "127.0.0.1"),
        (["Forwarded: for=192.0.2.9"], "192.0.2.9"),
        (["X-Forwarded-For: 1.2.3"], "127.0.0.1"),
        (["X-Forwarded-For: 10.0.0.7"], "10.0.0.7"),
    ],
)
async def test_what_else_names_a_client_is_parsed_however_often_it_comes(logged, lines, client):
    served = await logged(**TRUSTED)
    plain = forwarded("X-Forwarded-For: 192.0.2.1")
    requests = [plain, forwarded(*lines), plain, forwarded(*lines)]
    assert await clients_of(served, *requests) == ["192.0.2.1", client] * 2


async def test_what_a_proxy_repeats_is_no_request_of_a_stranger(logged):
    """Bytes that a trusted proxy has sent may say who the client is; the same bytes of others may not."""
    served = await logged(trusted_proxies=["127.0.0.1/32"])
    request = forwarded("X-Forwarded-For: 192.0.2.1")
    stranger = await asyncio.open_connection(
        *served.program.addresses[0].rsplit(":", 1), local_addr=("127.0.0.2", 0)
    )
    expected = []
    for _ in range(2):
        stranger[1].write(request)
        await stranger[0].readuntil(b"{}")
        expected.append("127.0.0.2")
    stranger[1].close()
    assert await clients_of(served, request, request) == [*expected, "192.0.2.1", "192.0.2.1"]
