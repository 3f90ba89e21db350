"""No upstream sends us where only this machine can reach (U25, A1, A11)."""

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
from proxy.upstream.egress import AddressScope, EgressGuard, classify_address
from tests.fakes.faults import Fault
from tests.fakes.names import PUBLIC, Names, RoutedGuard
from tests.fakes.raw import RawUpstream, RecvUntil, Send
from tests.fakes.registry import FakeRegistry

APP = "library/app"
LATEST = Tag("latest")
ANSWER = Send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")


@pytest.mark.parametrize(
    ("address", "zone"),
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
def test_every_address_is_in_one_zone(address, zone):
    assert classify_address(ip_address(address)) is zone


@given(st.ip_addresses())
def test_nothing_that_python_calls_special_is_public(address):
    stands_for_another = address.version == 6 and (address.sixtofour or address.ipv4_mapped)
    if classify_address(address) is AddressScope.PUBLIC and not stands_for_another:
        assert address.is_global
        assert not address.is_multicast


@pytest.fixture
async def secret() -> AsyncIterator[RawUpstream]:
    """Listen where nobody may be sent, and count who comes."""
    async with RawUpstream([RecvUntil(), ANSWER]) as listener:
        yield listener


@pytest.fixture
async def world(registry: FakeRegistry, secret: RawUpstream, connect):
    """Let a registry on the internet be known as registry.test, and name other hosts."""
    registry.add_image()
    registry.auth = registry.cdn = False

    async def enter(names: dict[str, list[list[str]]] | None = None, url: str | None = None):
        url = url or f"http://registry.test:{registry.front.port}"
        resolver = Names({"registry.test": [[PUBLIC]], **(names or {})})
        return await connect(url, guard=RoutedGuard(URL(url), resolver))

    return SimpleNamespace(enter=enter, registry=registry, secret=secret)


def leads_to(location: str) -> Fault:
    return Fault(status=307, body=b"", headers={"Location": location})


ADDRESSES = [
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


@pytest.mark.parametrize("host", [*ADDRESSES, "localhost", "LOCALHOST.", "inside.test"])
async def test_u25_a_redirect_to_this_machine_makes_no_connection(world, host):
    names = {name: [["127.0.0.1"]] for name in ("0x7f.1", "0x7f000001", "inside.test")}
    names |= {name: [["127.0.0.1", "::1"]] for name in ("localhost", "localhost.", "LOCALHOST.")}
    upstream = await world.enter(names)
    world.registry.fail("/v2/", leads_to(f"http://{host}:{world.secret.port}/v2/"), times=None)
    with pytest.raises(UpstreamError) as caught:
        await upstream.fetch_manifest(APP, LATEST)
    assert type(caught.value) is UpstreamError
    assert len(str(caught.value)) <= 200
    assert world.secret.connections == 0


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
async def test_u25_a_redirect_to_a_special_address_is_refused_by_its_name(world, host):
    upstream = await world.enter()
    world.registry.fail("/v2/", leads_to(f"http://{host}/latest/meta-data"), times=None)
    with pytest.raises(UpstreamError, match=r"upstream leads to .* address, where it may not"):
        await upstream.fetch_manifest(APP, LATEST)


@pytest.mark.parametrize(
    "address", ["10.0.0.1", "169.254.169.254", "::ffff:10.0.0.1", "fd00::1", "100.64.0.1", "::1"]
)
async def test_u25_a_name_that_leads_inside_is_refused(world, address):
    upstream = await world.enter({"cdn.test": [[address]]})
    world.registry.fail("/v2/", leads_to(f"http://cdn.test:{world.secret.port}/"), times=None)
    with pytest.raises(UpstreamError, match=r"upstream leads to cdn\.test \("):
        await upstream.fetch_manifest(APP, LATEST)
    assert world.secret.connections == 0


async def test_u25_a_name_that_is_rebound_to_the_inside_is_refused_at_the_connection(
    world, connect
):
    async with RawUpstream([RecvUntil(), ANSWER]) as cdn:
        upstream = await world.enter({"cdn.test": [[PUBLIC], ["10.0.0.1"]]})
        # The session asks the name service once for each port.
        for port in (cdn.port, world.secret.port):
            world.registry.fail("/v2/", leads_to(f"http://cdn.test:{port}/"))
        assert (await upstream.fetch_manifest(APP, LATEST)).content == b"{}"
        with pytest.raises(UpstreamError, match="upstream leads to"):
            await upstream.fetch_manifest(APP, LATEST)
        assert (cdn.connections, world.secret.connections) == (1, 0)


async def test_of_a_names_addresses_only_those_outside_are_taken(world):
    guard = EgressGuard(
        URL("http://registry.test"), Names({"cdn.test": [["10.0.0.1", PUBLIC, "127.0.0.1"]]})
    )
    assert [one["host"] for one in await guard.resolve("cdn.test", 443)] == [PUBLIC]


async def test_a_public_upstream_may_lead_to_other_public_places(world):
    upstream = await world.enter({"cdn.test": [[PUBLIC]]})
    world.registry.fail("/v2/", leads_to(f"http://cdn.test:{world.secret.port}/"), times=None)
    assert (await upstream.fetch_manifest(APP, LATEST)).content == b"{}"


@pytest.mark.parametrize("host", ["169.254.169.254", "127.0.0.1", "127.1", "inside.test"])
async def test_a01_a_token_server_on_the_inside_is_not_asked(world, host):
    upstream = await world.enter({"inside.test": [["10.0.0.1"]]})
    realm = f'Bearer realm="http://{host}:{world.secret.port}/token"'
    fault = Fault(status=401, body=b"", headers={"WWW-Authenticate": realm})
    world.registry.fail("/v2/", fault, times=None)
    with pytest.raises(UpstreamError) as caught:
        await upstream.resolve(APP, LATEST)
    assert type(caught.value) is UpstreamError
    assert world.secret.connections == 0


@pytest.mark.parametrize(
    ("home", "target", "allowed"),
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
async def test_an_upstream_leads_no_nearer_than_it_is_itself(home, target, allowed):
    names = Names({"registry.test": [[home]], "other.test": [[target]]})
    guard = EgressGuard(URL("http://registry.test"), names)
    assert await guard.resolve("registry.test", 80)
    if allowed:
        assert await guard.resolve("other.test", 80)
    else:
        with pytest.raises(UpstreamError):
            await guard.resolve("other.test", 80)


async def test_the_configured_host_may_be_anywhere_but_at_a_metadata_service():
    names = Names({"registry.test": [["10.0.0.1"], [PUBLIC, "10.0.0.1"], ["169.254.169.254"]]})
    guard = EgressGuard(URL("http://Registry.test"), names)
    assert [one["host"] for one in await guard.resolve("registry.test", 80)] == ["10.0.0.1"]
    assert len(await guard.resolve("registry.test", 80)) == 2
    with pytest.raises(UpstreamError, match="a special address"):
        await guard.resolve("registry.test", 80)


async def test_an_upstream_that_was_seen_outside_does_not_become_one_of_the_inside():
    names = Names(
        {"registry.test": [[PUBLIC], ["10.0.0.1"]], "other.test": [["10.0.0.2"]], "x.test": [[]]}
    )
    guard = EgressGuard(URL("http://registry.test"), names)
    for _ in range(2):
        assert await guard.resolve("registry.test", 80)
    with pytest.raises(UpstreamError):
        await guard.resolve("other.test", 80)
    assert await guard.resolve("x.test", 80) == []


async def test_nothing_is_known_of_an_upstream_before_its_name_is_resolved():
    guard = EgressGuard(URL("http://registry.test"), Names({"other.test": [["10.0.0.2"]]}))
    with pytest.raises(UpstreamError):
        await guard.resolve("other.test", 80)


@pytest.mark.parametrize(
    ("url", "target", "allowed"),
    [
        ("http://10.0.0.1:5000", "10.0.0.2", True),
        ("http://[::ffff:10.0.0.1]", "10.0.0.2", True),
        ("http://127.0.0.1", "10.0.0.2", True),
        ("http://93.184.215.14", "10.0.0.2", False),
        ("http://169.254.1.1", "10.0.0.2", False),
        ("http://0.0.0.0:5000", "10.0.0.2", False),
    ],
)
async def test_an_upstream_that_is_an_address_is_where_the_address_is(url, target, allowed):
    guard = EgressGuard(URL(url), Names({"other.test": [[target]]}))
    if allowed:
        assert await guard.resolve("other.test", 80)
    else:
        with pytest.raises(UpstreamError):
            await guard.resolve("other.test", 80)


async def test_a_registry_on_loopback_may_use_the_rest_of_loopback(connect):
    async with FakeRegistry() as registry:
        image = registry.add_image()
        upstream = await connect(registry.url.replace("127.0.0.1", "localhost"))
        await upstream.resolve(APP, LATEST)
        async with upstream.open_blob(APP, Digest.parse(image.config)) as transfer:
            assert await transfer.read_into(memoryview(bytearray(1000)))
        assert registry.count("/token") == 1


async def test_a_name_that_nobody_knows_is_an_upstream_that_cannot_be_reached(connect):
    url = "http://registry.test"
    upstream = await connect(url, guard=EgressGuard(URL(url), Names({})))
    with pytest.raises(UpstreamUnavailableError, match="cannot be reached"):
        await upstream.resolve(APP, LATEST)


async def test_closing_the_guard_closes_the_resolver():
    guard = EgressGuard(URL("http://registry.test"), aiohttp.ThreadedResolver())
    await guard.close()
