"""No upstream makes us connect to addresses that only this machine can reach (U25, A1, A11)."""

from collections.abc import AsyncIterator
from ipaddress import ip_address
from types import SimpleNamespace

import aiohttp
import pytest
from hypothesis import given, strategies as st
from yarl import URL

from proxy.errors import UpstreamError, UpstreamUnavailableError
from proxy.oci.digest import Digest
from proxy.oci.reference import Tag
from proxy.upstream.network.egress import AddressScope, EgressGuard, classify_address
from tests.fakes.faults import Fault
from tests.fakes.raw_server import RawUpstream, RecvUntil, Send
from tests.fakes.registry import FakeRegistry
from tests.fakes.resolver import PUBLIC, FakeResolver, LoopbackGuard

APP = "library/app"
LATEST = Tag("latest")
RESPONSE = Send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")


@pytest.mark.parametrize(
    ("address", "scope"),
    [
        ("93.184.215.14", AddressScope.PUBLIC),
        ("2606:4700::1", AddressScope.PUBLIC),
        ("::ffff:93.184.215.14", AddressScope.PUBLIC),
        ("64:ff9b::5db8:d70e", AddressScope.PUBLIC),
        ("2002:5db8:d70e::1", AddressScope.PUBLIC),
        ("199.36.153.8", AddressScope.PUBLIC),
        ("172.15.0.1", AddressScope.PUBLIC),
        ("172.32.0.1", AddressScope.PUBLIC),
        ("10.0.0.1", AddressScope.PRIVATE),
        ("172.16.0.1", AddressScope.PRIVATE),
        ("172.31.255.255", AddressScope.PRIVATE),
        ("192.168.1.1", AddressScope.PRIVATE),
        ("100.64.0.1", AddressScope.PRIVATE),
        ("198.18.0.1", AddressScope.PRIVATE),
        ("fd12::1", AddressScope.PRIVATE),
        ("2001:db8::1", AddressScope.PRIVATE),
        ("::ffff:10.0.0.1", AddressScope.PRIVATE),
        ("64:ff9b::a00:1", AddressScope.PRIVATE),
        ("2002:a00:1::", AddressScope.PRIVATE),
        ("2001::1", AddressScope.PRIVATE),
        ("127.0.0.1", AddressScope.LOOPBACK),
        ("127.255.255.254", AddressScope.LOOPBACK),
        ("::1", AddressScope.LOOPBACK),
        ("::ffff:127.0.0.1", AddressScope.LOOPBACK),
        ("0.0.0.0", AddressScope.RESERVED),
        ("::", AddressScope.RESERVED),
        ("169.254.169.254", AddressScope.RESERVED),
        ("::ffff:169.254.169.254", AddressScope.RESERVED),
        ("64:ff9b::a9fe:a9fe", AddressScope.RESERVED),
        ("fe80::1", AddressScope.RESERVED),
        ("fe80::1%lo", AddressScope.RESERVED),
        ("100.100.100.200", AddressScope.RESERVED),
        ("168.63.129.16", AddressScope.RESERVED),
        ("fd00:ec2::254", AddressScope.RESERVED),
        ("fd20:ce::254", AddressScope.RESERVED),
        ("224.0.0.1", AddressScope.RESERVED),
        ("ff02::1", AddressScope.RESERVED),
        ("255.255.255.255", AddressScope.RESERVED),
        ("192.0.0.192", AddressScope.RESERVED),
        ("fec0::1", AddressScope.RESERVED),
        ("::127.0.0.1", AddressScope.RESERVED),
    ],
)
def test_each_address_has_its_scope(address, scope):
    assert classify_address(ip_address(address)) is scope


@given(st.ip_addresses())
def test_addresses_that_python_calls_special_are_not_public(address):
    embeds_ipv4 = address.version == 6 and (address.sixtofour or address.ipv4_mapped)
    if classify_address(address) is AddressScope.PUBLIC and not embeds_ipv4:
        assert address.is_global
        assert not address.is_multicast


@pytest.fixture
async def internal_server() -> AsyncIterator[RawUpstream]:
    """A server that upstreams must not lead to; it counts connections."""
    async with RawUpstream([RecvUntil(), RESPONSE]) as listener:
        yield listener


@pytest.fixture
async def internet(registry: FakeRegistry, internal_server: RawUpstream, connect):
    """The fake registry as registry.test with a public address, and names for other hosts.

    `connect` connects to it; `names` gives the addresses of each name, one list per lookup.
    """
    registry.add_image()
    registry.auth = registry.cdn = False

    async def connect_to(names: dict[str, list[list[str]]] | None = None, url: str | None = None):
        url = url or f"http://registry.test:{registry.front.port}"
        resolver = FakeResolver({"registry.test": [[PUBLIC]], **(names or {})})
        return await connect(url, guard=LoopbackGuard(URL(url), resolver))

    return SimpleNamespace(connect=connect_to, registry=registry, internal_server=internal_server)


def redirect_to(location: str) -> Fault:
    return Fault(status=307, body=b"", headers={"Location": location})


FORMS_OF_LOOPBACK = [
    "127.0.0.1",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::1]",
    "127.1",
    "2130706433",
    "0x7f.1",
    "0x7f000001",
    "0177.0.0.1",
    "127.0.0.1.",
    "0.0.0.0",
    "[::]",
    "[::%25lo]",
]


@pytest.mark.parametrize("host", [*FORMS_OF_LOOPBACK, "localhost", "LOCALHOST.", "private.test"])
async def test_u25_a_redirect_to_this_machine_opens_no_connection(internet, host):
    names = {name: [["127.0.0.1"]] for name in ("0x7f.1", "0x7f000001", "private.test")}
    names |= {name: [["127.0.0.1", "::1"]] for name in ("localhost", "localhost.", "LOCALHOST.")}
    upstream = await internet.connect(names)
    internet.registry.fail(
        "/v2/", redirect_to(f"http://{host}:{internet.internal_server.port}/v2/"), times=None
    )
    with pytest.raises(UpstreamError) as caught:
        await upstream.fetch_manifest(APP, LATEST)
    assert type(caught.value) is UpstreamError
    assert len(str(caught.value)) <= 200
    assert internet.internal_server.connections == 0


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "[::ffff:10.0.0.1]",
        "[::ffff:169.254.169.254]",
        "[64:ff9b::a9fe:a9fe]",
        "[fd00:ec2::254]",
        "[fe80::1%25lo]",
        "10.0.0.1",
        "192.168.0.1",
        "100.64.0.1",
        "224.0.0.1",
    ],
)
async def test_u25_a_redirect_to_a_special_address_is_rejected(internet, host):
    upstream = await internet.connect()
    internet.registry.fail("/v2/", redirect_to(f"http://{host}/latest/meta-data"), times=None)
    with pytest.raises(UpstreamError, match=r"upstream points to .* address, which is not allowed"):
        await upstream.fetch_manifest(APP, LATEST)


@pytest.mark.parametrize(
    "address", ["10.0.0.1", "169.254.169.254", "::ffff:10.0.0.1", "fd00::1", "100.64.0.1", "::1"]
)
async def test_u25_a_redirect_to_a_name_with_a_private_address_is_rejected(internet, address):
    upstream = await internet.connect({"cdn.test": [[address]]})
    internet.registry.fail(
        "/v2/", redirect_to(f"http://cdn.test:{internet.internal_server.port}/"), times=None
    )
    with pytest.raises(UpstreamError, match=r"upstream points to cdn\.test \("):
        await upstream.fetch_manifest(APP, LATEST)
    assert internet.internal_server.connections == 0


async def test_u25_a_name_rebound_to_a_private_address_is_rejected_when_connecting(
    internet, connect
):
    async with RawUpstream([RecvUntil(), RESPONSE]) as cdn:
        upstream = await internet.connect({"cdn.test": [[PUBLIC], ["10.0.0.1"]]})
        # aiohttp caches DNS results per host and port.
        for port in (cdn.port, internet.internal_server.port):
            internet.registry.fail("/v2/", redirect_to(f"http://cdn.test:{port}/"))
        assert (await upstream.fetch_manifest(APP, LATEST)).content == b"{}"
        with pytest.raises(UpstreamError, match="upstream points to"):
            await upstream.fetch_manifest(APP, LATEST)
        assert (cdn.connections, internet.internal_server.connections) == (1, 0)


async def test_only_the_public_addresses_of_a_name_are_used(internet):
    guard = EgressGuard(
        URL("http://registry.test"), FakeResolver({"cdn.test": [["10.0.0.1", PUBLIC, "127.0.0.1"]]})
    )
    assert [result["host"] for result in await guard.resolve("cdn.test", 443)] == [PUBLIC]


async def test_a_public_upstream_may_redirect_to_other_public_hosts(internet):
    upstream = await internet.connect({"cdn.test": [[PUBLIC]]})
    internet.registry.fail(
        "/v2/", redirect_to(f"http://cdn.test:{internet.internal_server.port}/"), times=None
    )
    assert (await upstream.fetch_manifest(APP, LATEST)).content == b"{}"


@pytest.mark.parametrize("host", ["169.254.169.254", "127.0.0.1", "127.1", "private.test"])
async def test_a01_a_token_server_with_a_private_address_gets_no_request(internet, host):
    upstream = await internet.connect({"private.test": [["10.0.0.1"]]})
    realm = f'Bearer realm="http://{host}:{internet.internal_server.port}/token"'
    fault = Fault(status=401, body=b"", headers={"WWW-Authenticate": realm})
    internet.registry.fail("/v2/", fault, times=None)
    with pytest.raises(UpstreamError) as caught:
        await upstream.resolve(APP, LATEST)
    assert type(caught.value) is UpstreamError
    assert internet.internal_server.connections == 0


@pytest.mark.parametrize(
    ("upstream_address", "other_address", "allowed"),
    [
        ("10.0.0.1", "10.0.0.2", True),
        ("10.0.0.1", PUBLIC, True),
        ("10.0.0.1", "127.0.0.1", False),
        ("10.0.0.1", "169.254.169.254", False),
        ("127.0.0.1", "10.0.0.2", True),
        ("127.0.0.1", "::1", True),
        ("127.0.0.1", "169.254.169.254", False),
        ("fd12::1", "192.168.0.1", True),
    ],
)
async def test_an_upstream_leads_to_addresses_no_closer_than_its_own(
    upstream_address, other_address, allowed
):
    names = FakeResolver({"registry.test": [[upstream_address]], "other.test": [[other_address]]})
    guard = EgressGuard(URL("http://registry.test"), names)
    assert await guard.resolve("registry.test", 80)
    if allowed:
        assert await guard.resolve("other.test", 80)
    else:
        with pytest.raises(UpstreamError):
            await guard.resolve("other.test", 80)


async def test_the_configured_host_may_have_any_address_except_reserved_ones():
    names = FakeResolver(
        {"registry.test": [["10.0.0.1"], [PUBLIC, "10.0.0.1"], ["169.254.169.254"]]}
    )
    guard = EgressGuard(URL("http://Registry.test"), names)
    assert [result["host"] for result in await guard.resolve("registry.test", 80)] == ["10.0.0.1"]
    assert len(await guard.resolve("registry.test", 80)) == 2
    with pytest.raises(UpstreamError, match="a special address"):
        await guard.resolve("registry.test", 80)


async def test_an_upstream_that_was_public_once_stays_public():
    names = FakeResolver(
        {"registry.test": [[PUBLIC], ["10.0.0.1"]], "other.test": [["10.0.0.2"]], "x.test": [[]]}
    )
    guard = EgressGuard(URL("http://registry.test"), names)
    for _ in range(2):
        assert await guard.resolve("registry.test", 80)
    with pytest.raises(UpstreamError):
        await guard.resolve("other.test", 80)
    assert await guard.resolve("x.test", 80) == []


async def test_an_upstream_counts_as_public_until_its_name_is_resolved():
    guard = EgressGuard(URL("http://registry.test"), FakeResolver({"other.test": [["10.0.0.2"]]}))
    with pytest.raises(UpstreamError):
        await guard.resolve("other.test", 80)


@pytest.mark.parametrize(
    ("url", "other_address", "allowed"),
    [
        ("http://10.0.0.1:5000", "10.0.0.2", True),
        ("http://[::ffff:10.0.0.1]", "10.0.0.2", True),
        ("http://127.0.0.1", "10.0.0.2", True),
        ("http://93.184.215.14", "10.0.0.2", False),
        ("http://169.254.1.1", "10.0.0.2", False),
        ("http://0.0.0.0:5000", "10.0.0.2", False),
    ],
)
async def test_an_upstream_configured_by_address_has_the_scope_of_the_address(
    url, other_address, allowed
):
    guard = EgressGuard(URL(url), FakeResolver({"other.test": [[other_address]]}))
    if allowed:
        assert await guard.resolve("other.test", 80)
    else:
        with pytest.raises(UpstreamError):
            await guard.resolve("other.test", 80)


async def test_a_registry_on_loopback_may_use_other_loopback_hosts(connect):
    async with FakeRegistry() as registry:
        image = registry.add_image()
        upstream = await connect(registry.url.replace("127.0.0.1", "localhost"))
        await upstream.resolve(APP, LATEST)
        async with upstream.open_blob(APP, Digest.parse(image.config)) as body:
            assert await body.read_into(memoryview(bytearray(1000)))
        assert registry.count("/token") == 1


async def test_an_unknown_name_means_an_upstream_that_cannot_be_reached(connect):
    url = "http://registry.test"
    upstream = await connect(url, guard=EgressGuard(URL(url), FakeResolver({})))
    with pytest.raises(UpstreamUnavailableError, match="cannot be reached"):
        await upstream.resolve(APP, LATEST)


async def test_closing_the_guard_closes_the_resolver():
    guard = EgressGuard(URL("http://registry.test"), aiohttp.ThreadedResolver())
    await guard.close()
