"""The status of the daemon, and its offline switch."""

import asyncio
from typing import Any

import pytest

from proxy import __version__
from proxy.cli.api_client import AdminClient
from proxy.errors import InvalidRequestError
from tests.fakes.faults import Fault
from tests.support.program import Program


async def get_json(program: Program, path: str = "/api/v1/status") -> Any:
    return await asyncio.to_thread(AdminClient(program.root).get, path)


async def set_offline(program: Program, *, is_offline: bool) -> None:
    response = await asyncio.to_thread(
        AdminClient(program.root).put, "/api/v1/offline", {"offline": is_offline}
    )
    assert response == {"offline": is_offline}


async def test_a_new_daemon_is_serving_and_has_served_nothing(registry, program):
    status = await get_json(program)
    assert (status["state"], status["version"]) == ("serving", __version__)
    assert status["addresses"] == program.addresses
    assert status["admin_addresses"] == []
    assert status["store"]["path"] == str(program.root)
    assert (status["store"]["limit"], status["store"]["blobs"]) == (1_000_000_000, 0)
    assert (status["served"], status["hit_ratio"], status["saved_bytes"]) == ({}, None, 0)
    (upstream,) = status["upstreams"]
    assert (upstream["name"], upstream["url"], upstream["up"]) == ("docker.io", registry.url, True)


async def test_hits_and_saved_bytes_are_counted(registry, program):
    image = registry.add_image(layers=[b"x" * 100_000])
    await program.pull(image)
    await program.wait_for_downloads()
    first = await get_json(program)
    layer = await program.blob(image.layers[0])
    assert (layer.status, layer.headers["Cache-Status"]) == (200, "pullcache; hit")
    second = await get_json(program)
    assert second["saved_bytes"] - first["saved_bytes"] == 100_000
    assert second["served"]["hit"]["bytes"] >= 100_000
    assert first["hit_ratio"] < second["hit_ratio"] < 1
    assert second["store"]["blobs"] == 3
    assert second["upstreams"][0]["ratelimit_limit"] is not None


async def test_a_first_pull_saves_nothing_even_if_its_layers_are_prefetched(registry, make_program):
    program = await make_program(fetch={"prefetch": "layers"})
    await program.pull(registry.add_image(layers=[b"x" * 100_000]))
    await program.wait_for_downloads()
    status = await get_json(program)
    assert (status["hit_ratio"], status["saved_bytes"]) == (0, 0)


async def test_failed_requests_do_not_count_in_the_hit_ratio(program):
    assert (await program.manifest("me/unknown")).status == 404
    assert (await get_json(program))["hit_ratio"] is None


async def test_a_failing_upstream_degrades_the_daemon_and_is_named(registry, make_program):
    program = await make_program(fetch={"attempts": 1})
    async with registry.down(), asyncio.timeout(20):
        while (status := await get_json(program))["state"] == "serving":
            await program.manifest("me/app", "latest")
    assert status["state"] == "degraded"
    (upstream,) = status["upstreams"]
    assert not upstream["up"]
    assert upstream["problem"]


async def test_an_unusable_store_degrades_the_daemon(program):
    moved_root = program.root.rename(program.root.with_name("lost"))
    try:
        program.root.mkdir()
        client = AdminClient(moved_root)
        status = await asyncio.to_thread(client.get, "/api/v1/status")
    finally:
        program.root.rmdir()
        moved_root.rename(program.root)
    assert status["state"] == "degraded"
    assert status["store"]["problem"]


async def test_offline_upstreams_get_no_requests_and_online_they_do_again(registry, program):
    image = registry.add_image(layers=[b"x" * 1000])
    other = registry.add_image("me/other", layers=[b"y" * 1000])
    await program.pull(image)
    await program.wait_for_downloads()
    await set_offline(program, is_offline=True)
    requests_before = len(registry.requests)
    await program.pull(image)
    response = await program.manifest(other)
    assert (response.status, response.code) == (503, "UNAVAILABLE")
    assert (await get_json(program))["state"] == "offline"
    assert await get_json(program, "/api/v1/offline") == {"offline": True}
    assert len(registry.requests) == requests_before
    await set_offline(program, is_offline=False)
    await program.pull(other)
    assert (await get_json(program))["state"] == "serving"


@pytest.mark.parametrize("size", [5_000_000, 30_000_000], ids=["one piece", "many pieces"])
async def test_a_running_download_is_aborted_offline_and_resumed_online(registry, program, size):
    image = registry.add_image(layers=[b"x" * size])
    release = asyncio.Event()
    stall = Fault(stall_at=3_000_000, until=release)
    registry.fail(registry.body_of(image.layers[0]), stall, times=None)
    await program.manifest(image)
    async with program.opened(f"/v2/library/app/blobs/{image.layers[0]}") as response:
        await response.content.readexactly(1_000_000)
        await set_offline(program, is_offline=True)
        async with asyncio.timeout(1.5):  # shorter than stall_timeout, which would also end it
            await program.wait_for_downloads()
    requests_before = len(registry.requests)
    assert not (await program.blob(image.layers[0])).is_whole
    assert len(registry.requests) == requests_before
    registry.heal()
    release.set()
    await set_offline(program, is_offline=False)
    assert (await get_json(program))["upstreams"][0]["up"]
    sent = registry.bytes_sent(registry.body_of(image.layers[0]))
    layer = await program.blob(image.layers[0])
    assert (layer.status, layer.digest) == (200, image.layers[0])
    assert registry.bytes_sent(registry.body_of(image.layers[0])) - sent < size


async def test_waiting_requests_are_aborted_offline_and_upstream_stays_up(registry, program):
    release = asyncio.Event()
    registry.fail("/manifests/", Fault(until_headers=release), times=None)
    async with asyncio.TaskGroup() as group:
        requests = [group.create_task(program.manifest(f"me/app{n}")) for n in range(8)]
        await registry.until(lambda: registry.count("/manifests/") == len(requests))
        await set_offline(program, is_offline=True)
        async with asyncio.timeout(5):  # the timeout of a response is 8 s
            responses = [await request for request in requests]
    for response in responses:
        assert response.status == 503
        assert "offline" in response.json["errors"][0]["message"]
    release.set()
    await set_offline(program, is_offline=False)
    assert (await get_json(program))["upstreams"][0]["up"]


async def test_a_restart_follows_the_configuration_again(program):
    await set_offline(program, is_offline=True)
    await program.restart()
    assert await get_json(program, "/api/v1/offline") == {"offline": False}
    await program.restart(offline=True)
    assert await get_json(program, "/api/v1/offline") == {"offline": True}


async def test_an_invalid_offline_state_is_rejected(program):
    client = AdminClient(program.root)
    for invalid in ({}, {"offline": "yes"}, {"offline": True, "for": "1h"}, None):
        with pytest.raises(InvalidRequestError):
            await asyncio.to_thread(client.put, "/api/v1/offline", invalid)
    assert await get_json(program, "/api/v1/offline") == {"offline": False}
