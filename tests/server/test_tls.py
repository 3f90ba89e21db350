"""TLS: certificates by name, versions, reload, and bodies that end as they do without TLS."""

import asyncio
import os
import re
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from proxy.config import load
from proxy.errors import ConfigError
from proxy.server import listening, sendfile
from proxy.server.tls import load_certificates
from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.server.conftest import settings

MIB = 1 << 20
BLOB = bytes(range(256)) * (3 * MIB // 256) + b"end"


def port_of(program) -> str:
    return str(program.addresses[0]).rpartition(":")[2]


# openssl and curl are the clients.
pytestmark = pytest.mark.system


async def run(*command: str, stdin: bytes = b"") -> tuple[int, str]:
    """Run a client program; return its exit code and its output."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate(stdin)
    return process.returncode or 0, output.decode("latin-1")


async def s_client(program, *options: str, stdin: bytes = b"") -> str:
    address = f"127.0.0.1:{port_of(program)}"
    return (await run("openssl", "s_client", "-connect", address, *options, stdin=stdin))[1]


async def connect(program, trust: ssl.SSLContext, **options):
    """Return reader and writer of a TLS connection."""
    host, port = program.addresses[0].split(":")
    return await asyncio.open_connection(host, int(port), ssl=trust, **options)


def request(digest: str, method: str = "GET") -> bytes:
    return f"{method} /v2/library/app/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


# Bodies.


async def test_an_image_is_pulled_over_tls_on_a_miss_and_on_a_hit(registry, secure):
    image = registry.add_image(layers=[BLOB, b"small"])
    await secure.pull(image)
    await secure.wait_for_downloads()
    await secure.pull(image)
    assert secure.url.startswith("https://")


async def test_ranges_and_uncached_pages_are_sent_correctly(registry, secure):
    digest = registry.add_blob(BLOB)
    await secure.blob(digest)
    await secure.wait_for_downloads()
    fd = os.open(secure.root / "blobs" / "sha256" / digest.partition(":")[2], os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    assert (await secure.blob(digest)).digest == digest
    part = await secure.blob(digest, Range="bytes=100000-2000000")
    assert (part.status, part.body) == (206, BLOB[100000:2000001])


async def test_curl_accepts_the_private_authority_only_if_it_is_trusted(
    secure, authority, registry
):
    digest = registry.add_blob(BLOB)
    url = f"{secure.url}/v2/library/app/blobs/{digest}"
    code, output = await run("curl", "-sS", "--cacert", str(authority.ca), url)
    assert (code, digest_of(output.encode("latin-1"))) == (0, digest)
    code, output = await run("curl", "-sS", url)
    assert code == 60
    assert "certificate" in output


async def test_the_last_byte_of_a_corrupt_blob_is_withheld_and_the_connection_ends_cleanly(
    registry, secure, authority
):
    digest = registry.add_blob(BLOB)
    registry.fail(registry.body_of(digest), Fault(body=BLOB[:-3] + b"bad"))
    reader, writer = await connect(secure, authority.trust())
    writer.write(request(digest))
    head = await reader.readuntil(b"\r\n\r\n")
    assert f"Content-Length: {len(BLOB)}".encode() in head
    body = await reader.read()  # raises at an end without close_notify
    assert len(body) < len(BLOB)
    writer.close()


async def test_a_transfer_that_ends_early_ends_with_close_notify(registry, secure):
    digest = registry.add_blob(BLOB)
    registry.fail(registry.body_of(digest), Fault(body=BLOB[:-3] + b"bad"))
    output = await s_client(secure, "-msg", "-ign_eof", stdin=request(digest))
    assert "close_notify" in output


@pytest.mark.parametrize("state", ["hit", "again", "growing", "unsized"])
async def test_a_client_that_reads_nothing_is_disconnected(
    registry, secure, authority, monkeypatch, state
):
    monkeypatch.setattr(sendfile, "STALL_TIMEOUT", 0.3)
    digest = registry.add_blob(bytes(30 * MIB))
    if state in ("hit", "again"):
        await secure.blob(digest)
        await secure.wait_for_downloads()
    if state == "again":
        reader, writer = await connect(secure, authority.trust(), limit=1 << 16)
        writer.write(request(digest))
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(30 * MIB)
        writer.close()
    registry.edge.send_length = state != "unsized"
    _, writer = await connect(secure, authority.trust(), limit=1 << 16)
    writer.transport.pause_reading()
    writer.write(request(digest))
    async with asyncio.timeout(20):
        while not await secure.metric("pullcache_requests_total", kind="blob", status="499"):
            pass
    writer.transport.abort()


# Handshakes.


@pytest.mark.parametrize(
    ("options", "is_accepted"),
    [(("-tls1_3",), True), (("-tls1_2",), True), (("-tls1_1", "-cipher", "ALL@SECLEVEL=0"), False)],
)
async def test_c22_old_tls_versions_are_rejected(secure, options, is_accepted):
    output = await s_client(secure, *options)
    assert ("Cipher is (NONE)" not in output) is is_accepted


async def test_c22_renegotiation_is_rejected(secure):
    output = await s_client(secure, "-tls1_2", stdin=b"R\n")
    assert "no renegotiation" in output


async def test_c22_an_incomplete_handshake_times_out_and_frees_its_slot(
    secure, monkeypatch, make_program, authority, local
):
    monkeypatch.setattr(listening, "TLS_HANDSHAKE_TIMEOUT", 0.2)
    await secure.stop()
    await secure.start()
    reader, writer = await asyncio.open_connection(*secure.addresses[0].split(":"))
    writer.write(b"\x16\x03\x01\x02\x00\x01")
    async with asyncio.timeout(10):
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        while await secure.metric("pullcache_connections") > 1:
            pass
    writer.close()


async def test_c22_a_client_without_tls_is_disconnected(secure):
    reader, writer = await asyncio.open_connection(*secure.addresses[0].split(":"))
    writer.write(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
    with suppress(ConnectionResetError):
        assert b"HTTP" not in await reader.read()
    writer.close()
    assert (await secure.ask("/v2/")).status == 200


async def test_alpn_selects_http_1_1_even_if_the_client_prefers_h2(secure):
    assert "ALPN protocol: http/1.1" in await s_client(secure, "-alpn", "h2,http/1.1")
    assert "No ALPN negotiated" in await s_client(secure, "-alpn", "h2")


# Names.


async def test_c22_each_name_gets_its_certificate_and_other_names_the_first(make_secure, authority):
    one = authority.issue("one", "DNS:one.example", "IP:127.0.0.1")
    wildcard = authority.issue("wild", "DNS:*.wild.example")
    program = await make_secure(one, wildcard)
    expected = {
        "one.example": "one",
        "ONE.example": "one",
        "a.wild.example": "wild",
        "a.b.wild.example": "one",
        "wild.example": "one",
        "other.example": "one",
    }
    for name, certificate in expected.items():
        assert f"subject=CN = {certificate}\n" in await s_client(program, "-servername", name)
    assert "subject=CN = one\n" in await s_client(program, "-noservername")


@pytest.fixture
def combined_file(authority, tmp_path):
    """One file with a certificate and its key."""
    text = "".join(Path(file).read_text() for file in authority.issue("both", "IP:127.0.0.1"))
    path = tmp_path / "both.pem"
    path.write_text(text)
    return path


async def test_the_key_may_be_in_the_file_of_the_certificate(
    make_program, authority, combined_file
):
    program = await make_program(
        trust=authority.trust(), server={"tls_certificate": [str(combined_file)]}
    )
    assert (await program.ask("/v2/")).status == 200


# Reload.


async def test_a_reload_uses_the_new_certificate_and_closes_no_connection(
    registry, make_secure, authority, local
):
    program = await make_secure(local)
    digest = registry.add_blob(BLOB)
    await program.blob(digest)
    reader, writer = await connect(program, authority.trust(), limit=1 << 14)
    writer.write(request(digest))
    await reader.readuntil(b"\r\n\r\n")
    new = authority.issue("new", "IP:127.0.0.1", rsa_bits=2048)
    assert await program.reload(server=settings(new))
    assert "subject=CN = new\n" in await s_client(program)
    assert await reader.readexactly(len(BLOB)) == BLOB
    writer.write(request(digest, "HEAD"))
    assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    writer.close()


async def test_a_failed_reload_keeps_the_certificates(make_secure, authority, local, tmp_path):
    program = await make_secure(local)
    broken = tmp_path / "broken.pem"
    broken.write_text("nonsense")
    other = authority.issue("other", "DNS:x.example")
    for pairs in ([local, (str(broken), local[1])], [(local[0], other[1])], [("/none", "/none")]):
        with capture_logs() as logs:
            assert not await program.reload(server=settings(*pairs))
        (reason,) = [line["reason"] for line in logs if line["event"] == "config_reload_failed"]
        assert "server.tls_" in reason
    assert not await program.reload(server={"tls_certificate": [], "tls_key": []})
    assert "subject=CN = local\n" in await s_client(program)


def expiry_of(certificate: str) -> float:
    """Return the end of a certificate's validity, as openssl reads it."""
    command = ("openssl", "x509", "-noout", "-enddate", "-in", certificate)
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return ssl.cert_time_to_seconds(output.strip().partition("=")[2])


async def test_the_expiry_of_each_certificate_is_a_metric_that_a_reload_updates(
    make_secure, authority, local
):
    async def expiries() -> dict[str, float]:
        body = (await program.ask("/metrics")).body.decode()
        matches = re.findall(
            r'^pullcache_tls_certificate_expiry_timestamp_seconds\{certificate="(.+)"\} (.+)$',
            body,
            re.MULTILINE,
        )
        return {file: float(value) for file, value in matches}

    other = authority.issue("other-name", "DNS:cache.example", days=30)
    program = await make_secure(local, other)
    assert await expiries() == {file: expiry_of(file) for file, _ in (local, other)}
    renewed = authority.issue("renewed", "IP:127.0.0.1", days=90)
    assert not await program.reload(server=settings(renewed, ("/none", "/none")))
    assert set(await expiries()) == {local[0], other[0]}
    assert await program.reload(server=settings(renewed))
    assert await expiries() == {renewed[0]: expiry_of(renewed[0])}


# Errors in the configuration.


def test_errors_in_certificate_files_name_the_file_and_the_reason(authority, local, tmp_path):
    weak = authority.issue("weak", "DNS:x", rsa_bits=1024)
    secret = authority.issue(
        "secret",
        "DNS:x",
        passphrase="CANARY",
    )
    other = authority.issue("second", "DNS:x")
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    expected = {
        ("/none.pem", local[1]): r"/none\.pem: server\.tls_certificate: No such file",
        (local[0], "/none.key"): r"/none\.key: server\.tls_key: No such file",
        (local[0], other[1]): r"is not the certificate of the key .*second\.key",
        weak: "too weak",
        secret: "without a passphrase",
        (str(empty), local[1]): r"empty\.pem: server\.tls_certificate: cannot be used",
    }
    for pair, message in expected.items():
        config = load(None, {}, {"server": settings(pair)}, is_root=False)
        with pytest.raises(ConfigError, match=message) as raised:
            load_certificates(config.server)
        assert len(str(raised.value)) < 400


def test_there_must_be_as_many_keys_as_certificates(local):
    files = {"tls_certificate": [local[0], local[0]], "tls_key": [local[1]]}
    with pytest.raises(ConfigError, match="the same number of files"):
        load(None, {}, {"server": files}, is_root=False)


def test_an_expired_certificate_is_served_because_clients_check_it(authority):
    pair = authority.issue("old", "DNS:old.example", days=-1)
    config = load(None, {}, {"server": settings(pair)}, is_root=False)
    certificates = load_certificates(config.server)
    assert certificates
    assert certificates.select_context("old.example") is certificates.default
    assert "old.example" in certificates.by_name
