"""The state of upstreams in the admin API."""

import asyncio
from typing import Any

from tests.fakes.faults import Fault
from tests.support.admin_api import call
from tests.support.openapi import validate
from tests.support.program import Program


async def upstreams(program: Program) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await call(program, "get", "/api/v1/upstreams")
    for one in found:
        validate(one, "UpstreamDetail")
    return found


async def test_an_upstream_shows_its_pulls_left_and_its_traffic(registry, program):
    await program.pull(registry.add_image(layers=[b"x" * 10_000]))
    (one,) = await upstreams(program)
    assert (one["name"], one["up"], one["has_login"]) == ("docker.io", True, False)
    assert one["registry"]["pull_limit"] is not None
    assert one["registry"]["last_success_at"] == int(program.clock())
    assert (one["registry"]["outage"], one["registry"]["down_since"]) == ("", None)
    assert (one["today"]["pulls"], one["week"]["misses"]) == (1, 1)


async def test_an_upstream_that_is_down_says_why_and_when_it_is_asked_again(registry, make_program):
    program = await make_program(
        fetch={"attempts": 1}, upstreams={"ghcr.io": {"url": "http://127.0.0.1:1"}}
    )
    async with registry.down(), asyncio.timeout(20):
        while (await upstreams(program))[0]["up"]:
            await program.manifest("me/app")
        down, up = await upstreams(program)
        assert (down["name"], up["name"]) == ("docker.io", "ghcr.io")
        state = down["registry"]
        assert not state["up"]
        assert state["outage"] == state["last_failure"] != ""
        assert state["down_since"] <= int(program.clock()) <= state["retry_at"]
        assert state["last_success_at"] is None


async def test_mirrors_and_pauses_are_shown(registry, make_program):
    mirror = "http://127.0.0.1:1"
    program = await make_program(
        upstreams={"docker.io": {"url": registry.url, "mirrors": [mirror]}}
    )
    registry.add_image(layers=[b"x"])
    limit = Fault(status=429, headers={"Retry-After": "70"})
    registry.fail("/manifests/", limit, times=None)
    assert (await program.manifest("library/app")).status == 429
    (one,) = await upstreams(program)
    assert [each["url"].rstrip("/") for each in one["mirrors"]] == [mirror]
    assert one["mirrors"][0]["last_failure"]
    (pause,) = one["registry"]["pauses"]
    assert pause["until"] > program.clock()
    assert pause["reason"]
