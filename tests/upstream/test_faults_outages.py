"""Unreachable and failing upstreams (faults, table U)."""

import asyncio
import socket
from collections.abc import Iterator

import aiohttp
import pytest
from yarl import URL

from proxy.errors import UpstreamUnavailableError
from proxy.oci.reference import Tag
from proxy.upstream.errors import map_errors
from proxy.upstream.network.egress import EgressGuard
from proxy.upstream.registry_client import RegistryTimeouts
from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.fakes.resolver import FakeResolver
from tests.support.program import Answer


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The URL of a listener whose backlog is full, so that the kernel drops further SYNs."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        clients = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(address)
            clients.append(client)
        yield f"http://127.0.0.1:{address[1]}"
        for client in clients:
            client.close()


async def test_u01_a_refused_connection_affects_only_content_that_is_not_cached(registry, program):
    image = registry.add_image(index=True)
    await program.pull(image)
    await program.wait_for_downloads()
    program.clock.advance(3600)
    async with registry.down():
        await program.pull(image)  # its tag has expired
        manifest = await program.manifest(image, "other")
        assert (manifest.status, manifest.code) == (503, "UNAVAILABLE")
        blob = await program.blob(digest_of(b"none"))
        assert (blob.status, blob.code) == (404, "BLOB_UNKNOWN")
        for response in (manifest, blob):
            assert "Connection refused" in response.json["errors"][0]["message"]
        assert await program.metric("pullcache_upstream_requests_total", status="error") > 0


async def test_u02_an_upstream_whose_name_does_not_resolve_is_unavailable(connect):
    url = "http://registry.test"
    names = FakeResolver({})
    upstream = await connect(url, guard=EgressGuard(URL(url), names))
    with pytest.raises(UpstreamUnavailableError, match="fake cannot be reached"):
        await upstream.resolve("library/app", Tag("latest"))
    assert len(names.asked) == 3


class SlowNames(FakeResolver):
    """A name server that does not respond."""

    async def resolve(self, *args, **kwargs):
        await asyncio.Event().wait()


async def test_u02_a_name_server_that_does_not_respond_is_a_timeout(connect):
    url = "http://registry.test"
    guard = EgressGuard(URL(url), SlowNames({}))
    upstream = await connect(url, guard=guard, timeouts=RegistryTimeouts(2, 5, request=0.2))
    with pytest.raises(UpstreamUnavailableError, match="in time"):
        await upstream.resolve("library/app", Tag("latest"))


async def test_u03_an_unreachable_host_costs_one_connect_timeout(make_program, black_hole):
    program = await make_program(
        upstreams={"docker.io": {"url": black_hole}}, fetch={"connect_timeout": "1s"}
    )
    first = await program.manifest("library/app")
    assert first.status in (503, 504)
    assert await program.metric("pullcache_upstream_up") == 0
    responses = await asyncio.gather(*(program.manifest("library/app") for _ in range(20)))
    assert {response.status for response in responses} <= {503, 504}
    # One failed, and at most one was a probe after the breaker's first backoff of a second.
    assert await program.metric("pullcache_upstream_requests_total", status="error") <= 2


async def test_u03_a_blob_of_an_unreachable_host_is_404_with_the_reason(make_program, black_hole):
    program = await make_program(
        upstreams={"docker.io": {"url": black_hole}}, fetch={"connect_timeout": "1s"}
    )
    response = await program.blob(digest_of(b"none"))
    assert (response.status, response.code) == (404, "BLOB_UNKNOWN")
    assert "docker.io has been down since" in response.json["errors"][0]["message"]


async def test_u20_an_upstream_that_fails_every_other_time_stays_up(registry, make_program):
    program = await make_program(fetch={"attempts": 10})
    images = [registry.add_image(f"library/app{n}", layers=[bytes([n])]) for n in range(5)]
    for _ in range(60):
        registry.fail(" /v2/", Fault(status=503, body=b""))
        registry.fail(" /v2/", Fault())
    for image in images:
        await program.pull(image)
    assert await program.metric("pullcache_upstream_up") == 1


async def test_u20_a_half_open_breaker_admits_one_probe(registry, program):
    image = registry.add_image()
    await registry.stop()
    while await program.metric("pullcache_upstream_up"):
        await program.manifest(image)
    gate = asyncio.Event()
    registry.fail("", Fault(until_headers=gate), times=None)
    await registry.start()
    async with asyncio.TaskGroup() as group:
        requests: list[asyncio.Task[Answer]] = []
        while not registry.requests:
            requests.append(group.create_task(program.manifest(image, f"tag{len(requests)}")))
            await asyncio.wait(requests[-1:], timeout=0.05)
        responses = [await program.manifest(image, f"other{n}") for n in range(20)]
        assert {response.status for response in responses} == {503}
        assert len(registry.requests) == 1
        gate.set()
    assert await program.metric("pullcache_upstream_up") == 1
    assert (await program.manifest(image)).status == 200


async def test_a_rejected_redirect_does_not_open_the_breaker(registry, connect):
    image = registry.add_image()
    away = {"Location": "http://169.254.169.254/latest/meta-data"}
    registry.fail("/manifests/", Fault(status=307, body=b"", headers=away), times=None)
    upstream = await connect(
        registry.url, guard=EgressGuard(URL(registry.url), aiohttp.DefaultResolver())
    )
    for _ in range(8):
        with pytest.raises(Exception, match="which is not allowed"):
            await upstream.resolve(image.repository, Tag("latest"))
    assert upstream._registry.health.is_up


async def test_a_refused_connection_is_reported_by_reason_and_not_by_address():
    recorded: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    async with aiohttp.ClientSession() as session:
        with (
            pytest.raises(UpstreamUnavailableError, match="reached: Connection refused"),
            map_errors("docker.io", recorded.append),
        ):
            await session.get(f"http://127.0.0.1:{port}/")
    assert recorded == ["error"]
