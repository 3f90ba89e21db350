"""Connections that must not or cannot be made: certificates, clocks, addresses (U32 to U34)."""

import datetime as dt
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.fakes.content import digest_of
from tests.fakes.raw_server import RawUpstream, RecvUntil
from tests.fakes.registry import FakeRegistry
from tests.fakes.resolver import FakeResolver
from tests.support.program import Answer, Program

DAY = dt.timedelta(days=1)
NOW = dt.datetime.now(dt.UTC)
CLOCK_ADVICE = "check this machine's clock"


@pytest.fixture
def authority(tmp_path) -> trustme.CA:
    """A certificate authority that the program trusts."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return authority


def server_context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


async def fetch_manifest(make_program, registry: FakeRegistry, ca: Path) -> tuple[Program, Answer]:
    """Fetch a manifest of `registry` through a program that trusts `ca`."""
    image = registry.add_image()
    settings = {"url": registry.url, "ca_file": str(ca)}
    program = await make_program(upstreams={"docker.io": settings})
    return program, await program.manifest(image)


def message(response: Answer) -> str:
    return str(response.json["errors"][0]["message"])


async def expect_refusal(make_program, tmp_path, tls: ssl.SSLContext) -> str:
    """Check that no request is sent over such a connection; return the message to the client."""
    async with FakeRegistry(tls=tls) as registry:
        program, response = await fetch_manifest(make_program, registry, tmp_path / "ca.pem")
        assert (response.status, response.code) == (503, "UNAVAILABLE")
        blob = await program.blob(digest_of(b"layer"))
        assert (blob.status, blob.code) == (404, "BLOB_UNKNOWN")
        assert registry.requests == []
        return message(response)


async def test_u32_a_certificate_for_another_name_is_rejected(make_program, tmp_path, authority):
    tls = server_context(authority.issue_cert("registry.test"))
    assert "certificate" in await expect_refusal(make_program, tmp_path, tls)


async def test_u32_a_certificate_of_an_unknown_authority_is_rejected(
    make_program, tmp_path, authority
):
    tls = server_context(trustme.CA().issue_cert("127.0.0.1"))
    assert "certificate" in await expect_refusal(make_program, tmp_path, tls)


async def test_u32_an_old_tls_version_is_rejected(make_program, tmp_path, authority):
    tls = server_context(authority.issue_cert("127.0.0.1"))
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        tls.minimum_version = tls.maximum_version = ssl.TLSVersion.TLSv1_1
    tls.set_ciphers("ALL:@SECLEVEL=0")
    assert await expect_refusal(make_program, tmp_path, tls)


async def test_u32_a_port_without_tls_gets_no_plain_request(make_program, tmp_path):
    async with RawUpstream([RecvUntil()]) as raw:
        url = raw.url.replace("http:", "https:")
        program = await make_program(upstreams={"docker.io": {"url": url}})
        async with program.opened("/v2/library/app/manifests/latest") as response:
            assert response.status in (503, 504)
        assert raw.connections
        assert b"GET" not in b"".join(raw.received)


async def test_u32_a_changed_certificate_is_verified_again(make_program, tmp_path, authority):
    tls = server_context(authority.issue_cert("127.0.0.1"))
    async with FakeRegistry(tls=tls) as registry:
        program, response = await fetch_manifest(make_program, registry, tmp_path / "ca.pem")
        assert response.status == 200
        trustme.CA().issue_cert("127.0.0.1").configure_cert(tls)
        async with registry.down():
            pass  # which closes the connections
        registry.requests.clear()
        assert (await program.manifest("library/app", "other")).status == 503
        assert registry.requests == []
        authority.issue_cert("127.0.0.1").configure_cert(tls)
        await program.wait_for_upstream()


@pytest.mark.parametrize(
    ("not_before", "not_after"), [(NOW - 9 * DAY, NOW - 2 * DAY), (NOW + 2 * DAY, NOW + 9 * DAY)]
)
async def test_u33_a_certificate_outside_its_validity_suggests_checking_the_clock(
    make_program, tmp_path, authority, not_before, not_after
):
    leaf = authority.issue_cert("127.0.0.1", not_before=not_before, not_after=not_after)
    assert CLOCK_ADVICE in await expect_refusal(make_program, tmp_path, server_context(leaf))


@pytest.fixture
def dead_address(registry) -> Iterator[str]:
    """An address that drops connections to the registry's port: its backlog is full."""
    address = ("127.0.0.2", registry.front.port)
    with socket.create_server(address, backlog=0) as listener:
        clients = [socket.socket() for _ in range(4)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield "127.0.0.2"
        for client in clients:
            client.close()


@pytest.mark.parametrize("dead_addresses", [["::1"], ["127.0.0.2"], ["::1", "127.0.0.2"]])
async def test_u34_of_several_addresses_the_live_one_is_used_before_a_timeout(
    registry, make_program, monkeypatch, dead_address, dead_addresses
):
    names = FakeResolver({"registry.test": [[*dead_addresses, "127.0.0.1"]]})
    monkeypatch.setattr("proxy.upstream.factory.DefaultResolver", lambda: names)
    program = await make_program(
        upstreams={"docker.io": {"url": f"http://registry.test:{registry.front.port}"}},
        # Longer than a client waits: trying the dead address first would end in a 504.
        fetch={"connect_timeout": "1m"},
    )
    await program.pull(registry.add_image())
    assert await program.metric("pullcache_upstream_requests_total", status="error") == 0
