"""Too many or too slow clients: they are rejected or dropped, and the others are served."""

import asyncio
import encodings.idna  # noqa: F401 (the first connection imports it, which takes a descriptor)
import os
import resource
import select
import socket
import sqlite3
import time
from contextlib import suppress
from urllib.parse import urlsplit

import pytest
from structlog.testing import capture_logs

from proxy.cli.api_client import AdminClient
from proxy.errors import ConfigError
from proxy.server import http, sendfile
from proxy.server.clients import connection_limit
from tests.fakes.raw_client import RawClient, exchange

MIB = 1 << 20
PING = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"


async def ended(peer: RawClient) -> bytes:
    """Return the bytes received until the server ended the connection."""
    return (await peer.read_to_end()).data


async def until(program, connections: int) -> None:
    """Wait until this many clients are connected, including the one that reads the metric."""
    async with asyncio.timeout(10):
        while await program.metric("pullcache_connections") != connections:
            pass


# Slow requests.


@pytest.mark.parametrize("before", [b"", PING], ids=["first", "second"])
async def test_c01_a_head_that_arrives_too_slowly_is_given_up(program, monkeypatch, before):
    monkeypatch.setattr(http, "HEAD_TIMEOUT", 0.3)
    slow = [await RawClient.connect(program.url) for _ in range(20)]
    for peer in slow:
        peer.send(before)
        if before:
            assert (await peer.read_response()).status == 200
        peer.send(b"GET /v2/ HTTP/1.1\r\n")
    answers = asyncio.gather(*map(ended, slow))
    while not answers.done():
        for peer in slow:
            if not peer.writer.is_closing():
                peer.send(b"X-A: b\r\n")
        assert (await program.ask("/v2/")).status == 200
    assert len(await answers) == 20
    await until(program, 1)


async def test_c01_a_head_in_pieces_is_a_request_and_its_connection_is_kept(program, monkeypatch):
    monkeypatch.setattr(http, "HEAD_TIMEOUT", 0.5)
    peer = await RawClient.connect(program.url)
    for _ in range(3):
        peer.received.clear()
        peer.send(PING[:10])
        await program.ask("/v2/")
        peer.send(PING[10:])
        assert (await peer.read_response()).status == 200


async def test_c01_a_silent_connection_is_closed(program, monkeypatch):
    monkeypatch.setattr(http, "KEEPALIVE_TIMEOUT", 0.3)
    silent = await RawClient.connect(program.url)
    asked = await RawClient.connect(program.url)
    asked.send(PING)
    assert (await asked.read_response()).status == 200
    assert await ended(silent) == b""
    assert (await ended(asked)).count(b"HTTP/1.1") == 1


async def test_c02_a_request_with_a_body_gets_an_error_and_its_connection_is_closed(
    program, monkeypatch
):
    monkeypatch.setattr(http, "LINGERING_TIME", 0.2)
    for method in ("POST", "PUT", "PATCH"):
        peer = await RawClient.connect(program.url)
        head = f"{method} /v2/library/app/blobs/uploads/ HTTP/1.1\r\nHost: x\r\n"
        peer.send(f"{head}Content-Length: 1000000000\r\n\r\nbegins".encode())
        answer = await peer.read_to_end()
        assert (answer.status, answer.headers["connection"]) == (405, "close")
    await until(program, 1)


# Slow readers.


def read_slowly(url: str, path: str, seconds: float) -> int:
    """Read a response, at first at 200 kB a second: too slowly to empty the server's buffer."""
    parts = urlsplit(url)
    began, count = time.monotonic(), 0
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        client.settimeout(20)
        client.connect((parts.hostname or "", parts.port or 0))
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        while time.monotonic() - began < seconds:
            some = client.recv(2_000)
            assert some, f"dropped after {count} bytes"
            count += len(some)
            select.select([], [], [], 0.01)
        while count < 16 * MIB:
            some = client.recv(MIB)
            assert some, f"dropped after {count} bytes"
            count += len(some)
    return count


async def test_c03_a_client_that_reads_slowly_is_not_dropped(registry, program, monkeypatch):
    monkeypatch.setattr(sendfile, "STALL_TIMEOUT", 1.0)
    digest = registry.add_blob(bytes(16 * MIB))
    await program.blob(digest)
    await program.wait_for_downloads()
    path = f"/v2/library/app/blobs/{digest}"
    # For many times the stall timeout.
    assert await asyncio.to_thread(read_slowly, program.url, path, 4 * sendfile.STALL_TIMEOUT)


async def test_c03_a_client_that_reads_no_small_responses_is_dropped_too(program, monkeypatch):
    monkeypatch.setattr(sendfile, "STALL_TIMEOUT", 0.3)
    peer = await RawClient.connect(program.url, receive_buffer=4096)
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    peer.send(PING.replace(b"/v2/", b"/metrics") * 400)
    with capture_logs() as logged:
        async with asyncio.timeout(20):
            while not [line for line in logged if line["event"] == "client_stalled"]:
                await program.ask("/v2/")
    await until(program, 1)


# Too many clients.


async def test_c04_a_connection_over_the_limit_gets_429_and_the_others_are_served(
    make_program,
):
    program = await make_program(server={"max_connections": 5})
    peers = [await RawClient.connect(program.url) for _ in range(4)]
    await until(program, 5)
    for _ in range(3):
        answer = await exchange(program.url, PING)
        assert answer.status == 429
        assert b"TOOMANYREQUESTS" in answer.body
        assert int(answer.headers["retry-after"]) > 0
        assert answer.headers["connection"] == "close"
    for peer in peers:
        peer.send(PING)
        assert (await peer.read_response()).status == 200
    assert await program.metric("pullcache_connections_refused_total") == 3
    await peers[0].close()
    await until(program, 4)
    assert (await exchange(program.url, PING)).status == 200


async def test_c04_the_limit_per_address_leaves_connections_for_others(make_program):
    program = await make_program(server={"max_connections_per_client": 2})
    host, port = program.addresses[0].split(":")
    other = [
        await asyncio.open_connection(host, int(port), local_addr=("127.0.0.2", 0))
        for _ in range(2)
    ]
    await until(program, 3)
    for _, writer in other:
        writer.write(PING)
    assert {(await reader.readline()).split()[1] for reader, _ in other} == {b"200"}
    reader, writer = await asyncio.open_connection(host, int(port), local_addr=("127.0.0.2", 0))
    writer.write(PING)
    assert (await reader.readline()).split()[1] == b"429"
    assert (await exchange(program.url, PING)).status == 200
    for _, one in [*other, (reader, writer)]:
        one.transport.abort()


async def test_c04_the_number_of_rejected_connections_is_limited(make_program, monkeypatch):
    monkeypatch.setattr(connection_limit, "MAX_REJECTED", 3)
    monkeypatch.setattr(http, "REJECTED_TIMEOUT", 0.3)
    program = await make_program(server={"max_connections": 1})
    assert (await program.ask("/v2/")).status == 200
    silent = [await RawClient.connect(program.url) for _ in range(3)]
    async with asyncio.timeout(10):
        while await program.metric("pullcache_connections_refused_total") < 3:
            pass
    # No slot is left for rejected connections either.
    hung_up_on = await RawClient.connect(program.url)
    assert (await ended(hung_up_on)).startswith(b"HTTP/1.1 429 ")
    # Rejected connections do not keep their slots for long.
    assert {await ended(peer) for peer in silent} == {b""}
    assert (await exchange(program.url, PING)).status == 429


async def test_c04_a_thousand_silent_connections_delay_no_client(program):
    peers = [await RawClient.connect(program.url) for _ in range(1000)]
    await until(program, 1001)
    assert (await program.ask("/v2/")).status == 200
    for peer in peers:
        await peer.close()
    await until(program, 1)


async def test_c04_a_reload_changes_the_limit(make_program):
    program = await make_program(server={"max_connections": 1})
    assert (await program.ask("/v2/")).status == 200
    assert (await exchange(program.url, PING)).status == 429
    assert await program.reload(server={"max_connections": 2})
    assert (await exchange(program.url, PING)).status == 200


def test_c04_one_network_of_ipv6_is_one_client():
    same = {"2001:db8::1", "2001:db8::ffff:1", "2001:db8:0:0:1::", "fe80::1%eth0"}
    assert [len({connection_limit.client_key(one) for one in same})] == [2]
    assert connection_limit.client_key("2001:db8:0:1::1") != connection_limit.client_key(
        "2001:db8::1"
    )
    assert (
        connection_limit.client_key("::ffff:192.0.2.1")
        == connection_limit.client_key("192.0.2.1")
        == "192.0.2.1"
    )


@pytest.fixture
def few_files():
    """Let this process open only a few more files, as the system may."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(files: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_d10_descriptors_are_reserved_for_the_store(make_program, few_files, registry):
    few_files(connection_limit.RESERVED_DESCRIPTORS + 3 * connection_limit.DESCRIPTORS_PER_CLIENT)
    with capture_logs() as logged:
        program = await make_program(server={"max_connections": 8000})
    (said,) = [line for line in logged if line["event"] == "file_limit_too_low"]
    assert said["limit"] == 3
    image = registry.add_image()
    peers = [await RawClient.connect(program.url) for _ in range(2)]
    assert (await program.manifest(image)).status == 200
    await until(program, 3)
    assert (await exchange(program.url, PING)).status == 429
    assert (await program.blob(image.blobs[0], image.repository)).is_whole
    assert len(peers) == 2


async def test_d10_a_default_start_logs_no_warning(make_program, few_files):
    few_files(connection_limit.RESERVED_DESCRIPTORS + 3 * connection_limit.DESCRIPTORS_PER_CLIENT)
    with capture_logs() as logged:
        await make_program()
    assert [line for line in logged if line["log_level"] != "info"] == []


async def test_d10_the_limit_on_files_is_raised_as_far_as_the_system_allows(few_files):
    few_files(700)
    connection_limit.raise_file_limit()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard


async def test_d10_accepting_resumes_after_the_system_had_no_descriptors(program, few_files):
    peer = await RawClient.connect(program.url)
    peer.send(PING)
    assert (await peer.read_response()).status == 200
    waiting = await RawClient.connect(program.url)
    highest = os.dup(0)
    os.close(highest)
    with capture_logs() as logged:
        late = await RawClient.connect(program.url)
        few_files(highest + 1)
        late.send(PING)
        waiting.send(PING)
        peer.received.clear()
        peer.send(PING)
        assert (await peer.read_response()).status == 200
        few_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        assert (await late.read_response()).status in (200, 429)
        assert (await exchange(program.url, PING)).status == 200
    assert len([line for line in logged if line["event"] == "accept_failed"]) < 10


async def test_l09_clients_get_429_and_no_reset_while_no_descriptor_is_left(program, few_files):
    loop = asyncio.get_running_loop()
    host, port = program.addresses[0].split(":")
    clients = [socket.socket() for _ in range(20)]
    few_files(max(client.fileno() for client in clients) + 1)
    taken = []
    answers = []
    for client in clients:
        # Again for each client: the daemon may have closed a file meanwhile.
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        client.setblocking(False)
        await loop.sock_connect(client, (host, int(port)))
        await loop.sock_sendall(client, PING)
        answer = b""
        while more := await loop.sock_recv(client, 4096):
            answer += more
        answers.append(answer.split(b" ")[1])
    for fd in (*taken, *(client.detach() for client in clients)):
        os.close(fd)
    assert answers == [b"429"] * 20
    few_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    assert await program.metric("pullcache_connections_refused_total") == 20
    assert (await program.ask("/v2/")).status == 200


async def test_l09_a_flood_of_connections_gets_429_and_no_reset(make_program, monkeypatch):
    monkeypatch.setattr(connection_limit, "MAX_REJECTED", 3)
    program = await make_program(server={"max_connections": 1})
    assert (await program.ask("/v2/")).status == 200
    peers = [await RawClient.connect(program.url) for _ in range(60)]
    for peer in peers:
        peer.send(PING)
    answers = [await peer.read_to_end() for peer in peers]
    assert {(answer.status, answer.end) for answer in answers} == {(429, "fin")}


async def test_l09_an_upstream_is_not_blamed_for_missing_descriptors(program, registry, few_files):
    digest = registry.add_blob(b"blob")
    peer = await RawClient.connect(program.url)
    peer.send(PING)
    await peer.read_response()
    highest = os.dup(0)
    os.close(highest)
    few_files(highest)
    for _ in range(10):
        peer.received.clear()
        peer.send(PING.replace(b"/v2/", f"/v2/library/app/blobs/{digest}".encode()))
        assert (await peer.read_response()).status in (404, 429)
    few_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    assert await program.metric("pullcache_upstream_up") == 1
    assert (await program.blob(digest)).body == b"blob"


async def test_l09_connections_to_the_admin_api_leave_descriptors_for_clients(
    make_program, monkeypatch
):
    monkeypatch.setattr(connection_limit, "MAX_ADMIN_CONNECTIONS", 4)
    program = await make_program(server={"admin_listen": ["127.0.0.1:0"]})
    admin = f"http://{program.admin_addresses[0]}"
    ping = PING.replace(b"/v2/", b"/healthz").replace(b"Host: x", b"Host: localhost")
    held = [await RawClient.connect(admin) for _ in range(4)]
    for peer in held:
        peer.send(ping)
        assert (await peer.read_response()).status == 200
    assert (await exchange(admin, ping)).status == 429
    await held[0].close()
    while (await exchange(admin, ping)).status == 429:
        pass
    # The socket in the store has a limit of its own.
    assert (await asyncio.to_thread(AdminClient(program.root).get, "/api/v1/status"))["version"]


# Log.


async def test_c05_malformed_requests_are_logged_in_short_lines_up_to_a_limit(program):
    with capture_logs() as logged:
        for _ in range(40):
            answer = await exchange(program.url, b"\xff\xfe junk " + b"x" * 1000 + b"\r\n\r\n")
            assert answer.status == 400
    lines = [line for line in logged if line["event"] == "malformed_request_rejected"]
    assert len(lines) == http.MAX_MALFORMED_LOGS_PER_MINUTE
    assert max(len(repr(line)) for line in lines) < 200


async def test_c23_addresses_in_client_headers_are_ignored(make_program):
    program = await make_program(server={"max_connections_per_client": 1})
    await program.ask("/v2/")
    forged = PING.replace(
        b"\r\n\r\n", b"\r\nX-Forwarded-For: 192.0.2.7\r\nForwarded: for=1\r\n\r\n"
    )
    assert (await exchange(program.url, forged)).status == 429


async def test_c24_the_proxy_protocol_is_rejected(program):
    answer = await exchange(program.url, b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + PING)
    assert answer.status == 400


async def test_c19_missing_names_create_no_series_and_no_rows(registry, program):
    registry.pull_limit = None

    async def series_after(numbers: range) -> int:
        for number in numbers:
            assert (await program.manifest(f"me/none{number}")).status == 404
            assert (await program.blob(f"sha256:{number:064}", f"me/none{number}")).status == 404
        return len((await program.ask("/metrics")).body.splitlines())

    await series_after(range(5))
    before, index = await series_after(range(5, 10)), program.root / "index.sqlite"
    assert await series_after(range(10, 50)) == before
    with sqlite3.connect(f"file:{index}?mode=ro", uri=True) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        counts = [
            connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for (name,) in tables
        ]
    connection.close()
    assert sum(counts) < 20


@pytest.mark.parametrize("key", ["admin_token_file", "htpasswd", "tls_key"])
async def test_a05_a_world_readable_secret_is_reported_at_the_start(make_program, tmp_path, key):
    file = tmp_path / "secret"
    file.touch(mode=0o644)
    settings = (
        {key: str(file)} if key != "tls_key" else {key: [str(file)], "tls_certificate": ["/x"]}
    )
    with capture_logs() as logged, suppress(ConfigError):
        await make_program(server=settings)
    (said,) = [line for line in logged if line["event"] == "secret_file_exposed"]
    assert said["file"] == str(file)
    file.chmod(0o640)
    with capture_logs() as logged, suppress(ConfigError):
        await make_program(server=settings)
    assert "secret_file_exposed" not in [line["event"] for line in logged]
