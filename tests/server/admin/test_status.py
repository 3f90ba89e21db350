"""What the daemon says of itself, and the switch that keeps it from dialling out."""

import asyncio
from typing import Any

import pytest

from proxy import __version__
from proxy.cli.api_client import AdminClient
from proxy.errors import InvalidRequestError
from tests.fakes.faults import Fault
from tests.support.program import Program


async def get(program: Program, path: str = "/api/v1/status") -> Any:
    return await asyncio.to_thread(AdminClient(program.root).get, path)


async def switch(program: Program, *, is_on: bool) -> None:
    answer = await asyncio.to_thread(
        AdminClient(program.root).put, "/api/v1/offline", {"offline": is_on}
    )
    assert answer == {"offline": is_on}


async def test_a_new_daemon_serves_and_has_done_nothing(registry, program):
    status = await get(program)
    assert (status["state"], status["version"]) == ("serving", __version__)
    assert status["addresses"] == program.addresses
    assert status["admin_addresses"] == []
    assert status["store"]["path"] == str(program.root)
    assert (status["store"]["limit"], status["store"]["blobs"]) == (1_000_000_000, 0)
    assert (status["served"], status["hit_ratio"], status["saved_bytes"]) == ({}, None, 0)
    (upstream,) = status["upstreams"]
    assert (upstream["name"], upstream["url"], upstream["up"]) == ("docker.io", registry.url, True)


async def test_hits_are_counted_and_what_they_saved(registry, program):
    image = registry.add_image(layers=[b"x" * 100_000])
    await program.pull(image)
    await program.settled()
    first = await get(program)
    layer = await program.blob(image.layers[0])
    assert (layer.status, layer.headers["Cache-Status"]) == (200, "pullcache; hit")
    second = await get(program)
    assert second["saved_bytes"] - first["saved_bytes"] == 100_000
    assert second["served"]["hit"]["bytes"] >= 100_000
    assert first["hit_ratio"] < second["hit_ratio"] < 1
    assert second["store"]["blobs"] == 3
    assert second["upstreams"][0]["ratelimit_limit"] is not None


async def test_a_first_pull_saves_nothing_though_its_layers_began_to_come_before_they_were_asked_for(
    registry, make_program
):
    program = await make_program(fetch={"prefetch": "layers"})
    await program.pull(registry.add_image(layers=[b"x" * 100_000]))
    await program.settled()
    status = await get(program)
    assert (status["hit_ratio"], status["saved_bytes"]) == (0, 0)


async def test_failed_requests_are_no_part_of_the_ratio(program):
    assert (await program.manifest("me/unknown")).status == 404
    assert (await get(program))["hit_ratio"] is None


async def test_an_upstream_that_fails_degrades_it_and_is_named(registry, make_program):
    program = await make_program(fetch={"attempts": 1})
    async with registry.down(), asyncio.timeout(20):
        while (status := await get(program))["state"] == "serving":
            await program.manifest("me/app", "latest")
    assert status["state"] == "degraded"
    (upstream,) = status["upstreams"]
    assert not upstream["up"]
    assert upstream["problem"]


async def test_a_store_that_cannot_be_used_degrades_it(program):
    lost = program.root.rename(program.root.with_name("lost"))
    try:
        program.root.mkdir()
        client = AdminClient(lost)
        status = await asyncio.to_thread(client.get, "/api/v1/status")
    finally:
        program.root.rmdir()
        lost.rename(program.root)
    assert status["state"] == "degraded"
    assert status["store"]["problem"]


async def test_offline_nobody_is_asked_and_online_everybody_again(registry, program):
    image = registry.add_image(layers=[b"x" * 1000])
    other = registry.add_image("me/other", layers=[b"y" * 1000])
    await program.pull(image)
    await program.settled()
    await switch(program, is_on=True)
    before = len(registry.requests)
    await program.pull(image)
    answer = await program.manifest(other)
    assert (answer.status, answer.code) == (503, "UNAVAILABLE")
    assert (await get(program))["state"] == "offline"
    assert await get(program, "/api/v1/offline") == {"offline": True}
    assert len(registry.requests) == before
    await switch(program, is_on=False)
    await program.pull(other)
    assert (await get(program))["state"] == "serving"


@pytest.mark.parametrize("size", [5_000_000, 30_000_000], ids=["one piece", "many pieces"])
async def test_a_download_that_runs_is_cut_by_going_offline_and_goes_on_online(
    registry, program, size
):
    image = registry.add_image(layers=[b"x" * size])
    release = asyncio.Event()
    stall = Fault(stall_at=3_000_000, until=release)
    registry.fail(registry.body_of(image.layers[0]), stall, times=None)
    await program.manifest(image)
    async with program.opened(f"/v2/library/app/blobs/{image.layers[0]}") as response:
        await response.content.readexactly(1_000_000)
        await switch(program, is_on=True)
        async with asyncio.timeout(1.5):  # less than stall_timeout, which would end it too
            await program.settled()
    asked = len(registry.requests)
    assert not (await program.blob(image.layers[0])).is_whole
    assert len(registry.requests) == asked
    registry.heal()
    release.set()
    await switch(program, is_on=False)
    assert (await get(program))["upstreams"][0]["up"]
    sent = registry.bytes_sent(registry.body_of(image.layers[0]))
    layer = await program.blob(image.layers[0])
    assert (layer.status, layer.digest) == (200, image.layers[0])
    assert registry.bytes_sent(registry.body_of(image.layers[0])) - sent < size


async def test_questions_that_wait_are_cut_by_going_offline_and_upstream_is_not_blamed(
    registry, program
):
    release = asyncio.Event()
    registry.fail("/manifests/", Fault(until_headers=release), times=None)
    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(program.manifest(f"me/app{n}")) for n in range(8)]
        await registry.until(lambda: registry.count("/manifests/") == len(asking))
        await switch(program, is_on=True)
        async with asyncio.timeout(5):  # an answer may take 8 s to begin
            answers = [await one for one in asking]
    for answer in answers:
        assert answer.status == 503
        assert "offline" in answer.json["errors"][0]["message"]
    release.set()
    await switch(program, is_on=False)
    assert (await get(program))["upstreams"][0]["up"]


async def test_a_restart_obeys_the_configuration_again(program):
    await switch(program, is_on=True)
    await program.restart()
    assert await get(program, "/api/v1/offline") == {"offline": False}
    await program.restart(offline=True)
    assert await get(program, "/api/v1/offline") == {"offline": True}


async def test_a_switch_of_no_kind_is_refused(program):
    client = AdminClient(program.root)
    for wrong in ({}, {"offline": "yes"}, {"offline": True, "for": "1h"}, None):
        with pytest.raises(InvalidRequestError):
            await asyncio.to_thread(client.put, "/api/v1/offline", wrong)
    assert await get(program, "/api/v1/offline") == {"offline": False}
