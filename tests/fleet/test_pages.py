"""The fleet on the pages: the members, which of them this node is, and why it works alone."""

from contextlib import AsyncExitStack

import pytest

from proxy.fleet.keys import FleetKeys, node_id
from tests.fakes.registry import FakeRegistry
from tests.support.fleet import FleetProgram, start_all, stop_all
from tests.support.page_client import PageClient

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
async def make_node(tmp_path, server):
    nodes: list[FleetProgram] = []
    async with FakeRegistry() as registry:

        def make() -> FleetProgram:
            admin = {"admin_listen": ["127.0.0.1:0"]}
            root = tmp_path / f"node{len(nodes)}"
            nodes.append(FleetProgram(root, registry, server, server=admin))
            return nodes[-1]

        async with AsyncExitStack() as stack:
            stack.push_async_callback(stop_all, nodes)
            yield make


async def overview(node: FleetProgram) -> str:
    async with PageClient(node.admin_addresses[0]) as client:
        shown = await client.get("/")
    assert shown.status == 200
    return str(shown.text)


async def test_the_overview_shows_the_members_and_which_is_this_one(make_node):
    one, two = make_node(), make_node()
    await start_all(one, two)
    shown = await overview(one)
    assert "2 nodes" in shown
    addresses = [node.sections["fleet"]["address"] for node in (one, two)]
    assert all(address in shown for address in addresses)
    after = shown.partition(addresses[0])[2]
    assert "this node" in after[:100]
    assert shown.count("this node") == 1


async def test_a_first_node_is_told_how_the_next_one_joins(make_node):
    node = make_node()
    await node.start()
    await node.until(lambda: not node.running._core.directory.is_blind)
    assert "No other node is known" in await overview(node)


async def test_a_node_that_works_alone_says_why_and_since_when(make_node, server):
    node = make_node()
    await node.start()
    directory = node.running._core.directory
    await node.until(lambda: not directory.is_blind)
    joined_at = directory.since
    server.kill()
    await node.until(lambda: directory.is_blind)
    shown = await overview(node)
    assert directory.since > joined_at
    assert "works alone since" in shown
    assert "the server cannot be reached" in shown
    server.start()
    await node.until(lambda: not directory.is_blind)
    assert "works alone" not in await overview(node)


async def test_what_a_stranger_writes_into_the_directory_is_shown_as_text(make_node, server):
    node = make_node()
    await node.start()
    keys, address = FleetKeys("pullcache"), f"http://10.0.0.1/{HOSTILE}"
    for place in (address, "http://10.0.0.2:5000"):
        row = f'x {{"address": "{place}", "instance": "x", "version": "{HOSTILE}"}}'
        server.command("HSET", keys.rows, node_id(place), row)
    server.command("HINCRBY", keys.state, "version", "1")
    await node.until(lambda: node.members)
    shown = await overview(node)
    assert "10.0.0.2:5000" in shown
    assert HOSTILE not in shown


async def test_a_node_without_a_fleet_shows_none(make_program):
    node = await make_program(server={"admin_listen": ["127.0.0.1:0"]})
    async with PageClient(node.admin_addresses[0]) as client:
        assert "Fleet" not in (await client.get("/")).text
