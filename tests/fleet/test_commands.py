"""Operations for the whole fleet, with real daemons and a real server."""

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.fleet.conftest import wait_until
from tests.support.admin_api import call, stream
from tests.support.commands import run_on
from tests.support.fleet import TIMES
from tests.support.openapi import validate
from tests.support.ports import reserve_port
from tests.support.program import Program


@pytest.fixture
def make_node(server, make_program, tmp_path):
    """Return a function that starts a node of a fleet."""
    nodes: list[Program] = []

    async def make(address: str = "", token: str = "", **sections: dict[str, Any]) -> Program:
        name = f"node-{len(nodes)}"
        port = reserve_port(server)
        fleet = {
            "valkey": server.url,
            "address": address or f"http://127.0.0.1:{port}",
            **TIMES,
        }
        if token:
            file = tmp_path / f"{name}-token"
            file.write_text(token)
            file.chmod(0o600)
            fleet["token_file"] = str(file)
        listen = {"listen": [f"127.0.0.1:{port}"]}
        node: Program = await make_program(tmp_path / name, fleet=fleet, server=listen, **sections)
        nodes.append(node)
        return node

    return make


async def start_pair(make_node: Callable[..., Any]) -> tuple[Program, Program]:
    one, two = await make_node(), await make_node()
    directories = [node.running._core.directory for node in (one, two)]
    await wait_until(lambda: all(len(one.members) == 1 for one in directories), *directories)
    return one, two


async def call_fleet(node: Program, method: str, path: str, document: Any = None) -> list[Any]:
    answers = await stream(
        node,
        "POST",
        "/api/v1/fleet/call",
        {"method": method, "path": path, "document": document},
    )
    for answer in answers:
        validate(answer, "MemberAnswer")
    return sorted(answers, key=lambda answer: not answer["is_self"])


async def test_a_node_says_which_nodes_belong_to_the_fleet(make_node):
    one, two = await start_pair(make_node)
    state = await call(one, "get", "/api/v1/fleet")
    validate(state, "FleetState")
    assert {member["address"]: member["is_self"] for member in state["members"]} == {
        one.url: True,
        two.url: False,
    }
    assert state["problem"] == ""


async def test_a_blob_that_a_node_has_comes_from_there(make_node, registry):
    one, two = await start_pair(make_node)
    image = registry.add_image()
    await one.pull(image)
    await one.wait_for_downloads()
    await two.pull(image)
    # The manifest is one of them. A node is counted once the others know that it has the blob.
    for node, source in ((one, "upstream"), (two, "peer")):
        name = "pullcache_fleet_downloads_total"
        while await node.metric(name, source=source) < len(image.blobs) + 1:
            await node.wait_for_downloads()
    assert await two.metric("pullcache_fleet_up") == 1
    assert await two.metric("pullcache_fleet_members") == 2


async def test_all_nodes_do_an_operation(make_node, registry):
    one, two = await start_pair(make_node)
    image = registry.add_image()
    await two.pull(image)
    await two.wait_for_downloads()
    for answer in await call_fleet(one, "PUT", "/api/v1/offline", {"offline": True}):
        assert answer["document"] == {"offline": True}
    for node in (one, two):
        assert (await call(node, "get", "/api/v1/offline"))["offline"]
    own, other = await call_fleet(one, "GET", "/api/v1/images")
    assert (own["document"], other["member"]) == ([], two.url)
    assert [found["state"] for found in other["document"]] == ["complete"]
    own, other = await call_fleet(one, "POST", "/api/v1/images/remove", {"images": ["app"]})
    assert own["error"]["code"] == "unknown_manifest"
    assert other["document"]["blobs"] > 0


async def test_other_operations_cannot_be_called(make_node):
    one, two = await start_pair(make_node)
    with pytest.raises(Exception, match="no operation of a fleet"):
        await call_fleet(one, "GET", "/api/v1/events")
    encoded = base64.urlsafe_b64encode(json.dumps({"method": "GET", "path": "/x"}).encode())
    answer = await two.ask(f"/fleet/v1/call?call={encoded.decode()}", Pullcache_Fleet="pullcache")
    assert json.loads(answer.body)["error"]["code"] == "denied"
    # A client is not a node.
    assert (await two.ask(f"/fleet/v1/call?call={encoded.decode()}")).status == 404
    wrong = await two.ask(f"/fleet/v1/call?call={encoded.decode()}", Pullcache_Fleet="other")
    assert wrong.status == 404
    broken = await two.ask("/fleet/v1/call?call=%21", Pullcache_Fleet="pullcache")
    assert broken.status == 400


async def test_a_node_that_cannot_be_reached_is_named(make_node):
    one = await make_node()
    # Nothing listens at the address of the other one.
    other_node = await make_node("http://127.0.0.1:1")
    directories = [node.running._core.directory for node in (one, other_node)]
    await wait_until(lambda: len(directories[0].members) == 1, *directories)
    own, other = await call_fleet(one, "GET", "/api/v1/status")
    assert own["document"]["state"] == "serving"
    assert other["member"] == "http://127.0.0.1:1"
    assert other["error"]["code"].startswith("upstream")
    shown = await run_on(one, "status", "--fleet")
    assert shown.exit_code == 4
    assert "failed" in shown.output


async def test_a_node_with_another_token_is_told_so(make_node, registry):
    one, two = await make_node(token="the secret"), await make_node(token="another one")
    directories = [node.running._core.directory for node in (one, two)]
    await wait_until(lambda: all(len(one.members) == 1 for one in directories), *directories)
    _, other = await call_fleet(two, "GET", "/api/v1/status")
    assert "fleet.token_file must be the same" in other["error"]["message"]
    for command in (("status", "--fleet"), ("doctor", "--no-pull")):
        shown = await run_on(two, *command)
        assert shown.exit_code in (1, 4)
        assert f"peer {one.addresses[0]} refuses the token of this node" in shown.output
    # What the first node is about to fetch, the other one fetches by itself.
    digest = registry.add_blob(b"content" * 1000)
    registry.throttle(0)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(one.blob(digest))
        await registry.until(lambda: registry.count(f"GET /registry-v2/.*{digest[7:]}") == 1)
        second = group.create_task(two.blob(digest))
        await registry.until(lambda: registry.count(f"GET /registry-v2/.*{digest[7:]}") == 2)
        registry.throttle(None)
    assert first.result().digest == second.result().digest == digest


async def test_a_node_that_works_alone_says_why(make_node, server):
    one, two = await start_pair(make_node)
    assert "2 nodes answer" in (await run_on(one, "doctor", "--no-pull")).output
    server.kill()
    directories = [node.running._core.directory for node in (one, two)]
    await wait_until(lambda: directories[0].is_blind, *directories)
    shown = await run_on(one, "status", "--fleet")
    assert shown.exit_code == 4
    assert "this node works alone: the server cannot be reached" in shown.output
    assert "this node works alone" in (await run_on(one, "doctor", "--no-pull")).output


async def test_commands_show_what_each_node_says(make_node, registry):
    one, two = await start_pair(make_node)
    image = registry.add_image(tag="1")
    await two.pull(image)
    await two.wait_for_downloads()
    for command, texts in (
        (("status", "--fleet"), (one.url, two.url, "serving")),
        (("images", "--fleet"), ("app:1", "1 of 2")),
        (("images", "--fleet", "--json"), ('"complete"',)),
        (("pin", "app:1", "--fleet"), (f"{one.url}: pinned", f"{two.url}: pinned")),
        (("unpin", "app:1", "--fleet"), (f"{two.url}: unpinned 1 image",)),
        (("refresh", "app:1", "--fleet"), (f"{two.url}: 1 unchanged",)),
        (("check-offline", "app:1", "--fleet"), ("complete", "all can be pulled offline")),
        (("preload", "app:1", "--fleet"), (f"{one.url}: 1 complete",)),
        (("images", "--fleet"), ("2 of 2",)),
        (("rm", "app:1", "--fleet"), (f"{one.url}: 1 image",)),
        (("offline", "on", "--fleet"), (f"{two.url}: offline mode is on",)),
    ):
        shown = await run_on(one, *command)
        assert shown.exit_code == 0, (command, shown.output)
        for text in texts:
            assert text in shown.output, command
    shown = await run_on(one, "check-offline", "app:1", "--fleet")
    assert shown.exit_code == 1


async def test_a_node_without_a_fleet_says_so(make_program):
    node = await make_program()
    with pytest.raises(Exception, match="belongs to no fleet"):
        await call(node, "get", "/api/v1/fleet")
    with pytest.raises(Exception, match="belongs to no fleet"):
        await call_fleet(node, "GET", "/api/v1/status")


async def test_one_node_runs_a_scheduled_preload(make_node, registry):
    image = registry.add_image(tag="1")
    preload = {"preload": [{"images": ["app:1"], "every": "1h"}]}
    nodes = [await make_node(**preload) for _ in range(2)]
    schedules = [node.running._scheduler.schedules[0] for node in nodes]
    await wait_until(lambda: all(one.ended_at is not None for one in schedules))
    assert sorted(one.done for one in schedules) == [0, 1]
    assert [one.problem for one in schedules if not one.done] == [
        "skipped: another node of the fleet does it"
    ]
    assert image
