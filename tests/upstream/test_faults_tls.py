"""Connections that cannot or must not be made: certificates, clocks, dead addresses (faults U32 to U34)."""

import datetime as dt
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.fakes.content import digest_of
from tests.fakes.names import Names
from tests.fakes.raw import RawUpstream, RecvUntil
from tests.fakes.registry import FakeRegistry
from tests.support.program import Answer, Program

DAY = dt.timedelta(days=1)
NOW = dt.datetime.now(dt.UTC)
CLOCK = "check this machine's clock"


@pytest.fixture
def authority(tmp_path) -> trustme.CA:
    """An authority that the program trusts."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return authority


def presenting(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


async def ask(make_program, registry: FakeRegistry, ca: Path) -> tuple[Program, Answer]:
    """Ask through a program that trusts `ca` for a manifest of `registry`."""
    image = registry.add_image()
    settings = {"url": registry.url, "ca_file": str(ca)}
    program = await make_program(upstreams={"docker.io": settings})
    return program, await program.manifest(image)


def message(answer: Answer) -> str:
    return str(answer.json["errors"][0]["message"])


async def refused(make_program, tmp_path, tls: ssl.SSLContext) -> str:
    """Check that nothing is asked over such a connection; return what the client is told."""
    async with FakeRegistry(tls=tls) as registry:
        program, answer = await ask(make_program, registry, tmp_path / "ca.pem")
        assert (answer.status, answer.code) == (503, "UNAVAILABLE")
        blob = await program.blob(digest_of(b"layer"))
        assert (blob.status, blob.code) == (404, "BLOB_UNKNOWN")
        assert registry.requests == []
        return message(answer)


async def test_u32_a_certificate_for_another_name_is_refused(make_program, tmp_path, authority):
    tls = presenting(authority.issue_cert("registry.test"))
    assert "certificate" in await refused(make_program, tmp_path, tls)


async def test_u32_a_certificate_of_nobody_is_refused(make_program, tmp_path, authority):
    tls = presenting(trustme.CA().issue_cert("127.0.0.1"))
    assert "certificate" in await refused(make_program, tmp_path, tls)


async def test_u32_an_old_tls_is_refused(make_program, tmp_path, authority):
    tls = presenting(authority.issue_cert("127.0.0.1"))
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        tls.minimum_version = tls.maximum_version = ssl.TLSVersion.TLSv1_1
    tls.set_ciphers("ALL:@SECLEVEL=0")
    assert await refused(make_program, tmp_path, tls)


async def test_u32_a_port_that_speaks_no_tls_is_not_spoken_to_in_clear(make_program, tmp_path):
    async with RawUpstream([RecvUntil()]) as raw:
        url = raw.url.replace("http:", "https:")
        program = await make_program(upstreams={"docker.io": {"url": url}})
        async with program.opened("/v2/library/app/manifests/latest") as response:
            assert response.status in (503, 504)
        assert raw.connections
        assert b"GET" not in b"".join(raw.received)


async def test_u32_a_certificate_that_changes_is_judged_anew(make_program, tmp_path, authority):
    tls = presenting(authority.issue_cert("127.0.0.1"))
    async with FakeRegistry(tls=tls) as registry:
        program, answer = await ask(make_program, registry, tmp_path / "ca.pem")
        assert answer.status == 200
        trustme.CA().issue_cert("127.0.0.1").configure_cert(tls)
        async with registry.down():
            pass  # so that it is connected to once more
        registry.requests.clear()
        assert (await program.manifest("library/app", "other")).status == 503
        assert registry.requests == []
        authority.issue_cert("127.0.0.1").configure_cert(tls)
        await program.recovered()


@pytest.mark.parametrize(
    ("begins", "ends"), [(NOW - 9 * DAY, NOW - 2 * DAY), (NOW + 2 * DAY, NOW + 9 * DAY)]
)
async def test_u33_a_certificate_out_of_its_time_makes_one_think_of_the_clock(
    make_program, tmp_path, authority, begins, ends
):
    leaf = authority.issue_cert("127.0.0.1", not_before=begins, not_after=ends)
    assert CLOCK in await refused(make_program, tmp_path, presenting(leaf))


@pytest.fixture
def hole(registry) -> Iterator[str]:
    """An address that drops what comes to the registry's port: its queue is full."""
    address = ("127.0.0.2", registry.front.port)
    with socket.create_server(address, backlog=0) as listener:
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield "127.0.0.2"
        for client in waiting:
            client.close()


@pytest.mark.parametrize("dead", [["::1"], ["127.0.0.2"], ["::1", "127.0.0.2"]])
async def test_u34_of_several_addresses_the_one_that_lives_is_found_before_a_timeout(
    registry, make_program, monkeypatch, hole, dead
):
    names = Names({"registry.test": [[*dead, "127.0.0.1"]]})
    monkeypatch.setattr("proxy.upstream.factory.DefaultResolver", lambda: names)
    program = await make_program(
        upstreams={"docker.io": {"url": f"http://registry.test:{registry.front.port}"}},
        # So long that a client would have its 504 before a dead address is given up.
        fetch={"connect_timeout": "1m"},
    )
    await program.pull(registry.add_image())
    assert await program.metric("pullcache_upstream_requests_total", status="error") == 0
