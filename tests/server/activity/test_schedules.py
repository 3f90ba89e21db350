"""The scheduled preloads in the admin API."""

import asyncio
from typing import Any

import pytest

from proxy.errors import NotFoundError
from tests.fakes.images import push_manifest
from tests.support.admin_api import APP, NATIVE, call
from tests.support.openapi import validate
from tests.support.program import Program


async def schedules(program: Program) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await call(program, "get", "/api/v1/schedules")
    for one in found:
        validate(one, "ScheduleStatus")
    return found


async def wait_for_end(program: Program, after: int = -1) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            one = (await schedules(program))[0]
            if not one["running"] and (one["ended_at"] or 0) > after:
                return one


async def test_a_schedule_shows_its_last_run_and_the_next(registry, make_program):
    push_manifest(registry, APP, [b"layer"], tag="v1", platform=NATIVE)
    program = await make_program(preload=[{"images": ["app:v1", "me/unknown"], "every": "6h"}])
    one = await wait_for_end(program)
    assert (one["name"], one["images"]) == ("preload[1]", ["app:v1", "me/unknown"])
    assert (one["total"], one["done"], one["failed"]) == (2, 1, 1)
    assert one["failures"][0]["image"] == "me/unknown:latest"
    assert one["fetched_bytes"] > 0
    assert 5 * 3600 < one["next_at"] - one["started_at"] < 7 * 3600


async def test_a_schedule_runs_when_it_is_told_to(registry, make_program):
    program = await make_program(preload=[{"images": ["app:v1"], "every": "6h"}])
    first = await wait_for_end(program)
    assert first["failed"] == 1
    push_manifest(registry, APP, [b"layer"], tag="v1", platform=NATIVE)
    program.clock.advance(60)
    started = await call(program, "post", "/api/v1/schedules/run", {"name": "preload[1]"})
    validate(started, "ScheduleStatus")
    second = await wait_for_end(program, first["ended_at"])
    assert (second["done"], second["failed"]) == (1, 0)
    with pytest.raises(NotFoundError):
        await call(program, "post", "/api/v1/schedules/run", {"name": "preload[2]"})


async def test_a_run_that_did_not_take_place_says_why(make_program, tmp_path):
    missing = str(tmp_path / "images.txt")
    program = await make_program(preload=[{"file": missing}])
    assert missing in (await wait_for_end(program))["problem"]
    await program.restart(offline=True, preload=[{"images": ["app"]}])
    assert "offline" in (await wait_for_end(program))["problem"]
