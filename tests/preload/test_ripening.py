"""Preloads under policies with a minimum age: what is too new is fetched for the time when it is not."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.fakes.images import push_manifest
from tests.support.admin_api import APP, NATIVE, check_images, list_images
from tests.support.commands import run_on
from tests.support.preload_api import run_preload
from tests.support.program import Program

DAY = 86_400.0
RULE = {"images": ["*"], "mode": "enforce", "min_age": "3d"}


def push_app(registry, layer: bytes, **options: Any) -> str:
    """Push `app:v1` for this machine, and return its digest."""
    return push_manifest(registry, APP, [layer], tag="v1", platform=NATIVE, **options)


@pytest.fixture
def start(make_program) -> Callable[..., Awaitable[Program]]:
    async def start(preload: list[dict[str, Any]] | None = None, **keys: Any) -> Program:
        program: Program = await make_program(policy=[{**RULE, **keys}], preload=preload or [])
        return program

    return start


async def is_complete(program: Program, image: str) -> bool:
    (check,) = await check_images(program, image)
    return bool(check["state"] == "complete")


async def test_a_preload_fetches_what_a_moved_tag_will_mean_and_leaves_the_tag(registry, start):
    program = await start()
    old = push_app(registry, b"old")
    await run_preload(program, "app:v1")
    program.clock.advance(DAY)
    new = push_app(registry, b"new")
    run = await run_preload(program, "app:v1")
    (event,) = run.events_of("ripening")
    assert event["digest"] == new
    assert "its earlier content is served until" in event["reason"]
    (done,) = run.events_of("done")
    assert (done["digest"], done["outcome"]) == (old, "fetched")
    assert await is_complete(program, f"app@{new}")
    assert (await program.manifest(APP, "v1")).digest == old
    assert (await program.manifest(APP, new)).status == 403
    await program.restart(offline=True)
    assert (await program.manifest(APP, "v1")).digest == old
    program.clock.advance(3 * DAY)
    assert (await program.manifest(APP, "v1")).digest == new
    assert await is_complete(program, "app:v1")


async def test_of_an_index_the_requested_platforms_are_fetched_for_later(registry, start):
    program = await start()
    await program.pull(registry.add_image(tag="v1"))
    program.clock.advance(DAY)
    image = registry.add_image(tag="v1", layers=[b"new"], index=True)
    wanted, other = list(image.manifests)[:2]
    run = await run_preload(program, {"image": "app:v1", "platforms": [wanted]})
    assert run.events_of("done")
    program.clock.advance(4 * DAY)
    await program.restart(offline=True)
    answer = await program.manifest(APP, "v1")
    assert answer.digest == image.digest
    assert (await program.manifest(APP, image.manifests[wanted])).status == 200
    assert (await program.manifest(APP, image.manifests[other])).status == 503


async def test_a_signature_of_what_will_be_served_later_is_fetched_too(registry, start):
    program = await start()
    push_app(registry, b"old")
    await run_preload(program, "app:v1")
    program.clock.advance(DAY)
    new = push_app(registry, b"new")
    signature = push_manifest(registry, APP, [b"signature"], subject=new, artifact_type="a/b")
    await run_preload(program, "app:v1")
    assert signature in program.stored()


async def test_an_image_that_is_refused_until_it_is_old_enough_fails_and_is_fetched(
    registry, start
):
    program = await start(first_seen="deny")
    digest = push_app(registry, b"new")
    run = await run_preload(program, "app:v1", f"app@{digest}", pin=True)
    for failed in run.events_of("failed"):
        assert failed["code"] == "policy_denied"
        assert "it may be pulled from" in failed["reason"]
    assert len(run.events_of("failed")) == 2
    assert not [one for one in (await list_images(program)).values() if one["pinned"]]
    program.clock.advance(3 * DAY)
    await program.restart(offline=True)
    assert await is_complete(program, f"app@{digest}")
    assert (await program.manifest(APP, digest)).status == 200


async def test_an_image_that_is_refused_for_another_reason_is_not_fetched(registry, start):
    program = await start(deny_tags=["v1"])
    push_app(registry, b"layer")
    run = await run_preload(program, "app:v1")
    (failed,) = run.events_of("failed")
    assert "the tag v1 is denied" in failed["reason"]
    assert not run.events_of("ripening")


async def test_a_schedule_fetches_what_is_to_come_and_serves_it_in_time(registry, start):
    program = await start(preload=[{"images": ["app:v1"], "every": "6h"}])
    old = push_app(registry, b"old")
    async with asyncio.timeout(20):
        while not await is_complete(program, "app:v1"):
            program.clock.advance(7 * 3600)
        new = push_app(registry, b"new")
        program.clock.advance(7 * 3600)
        while not await is_complete(program, f"app@{new}"):
            pass
    assert (await program.manifest(APP, "v1")).digest == old
    program.clock.advance(3 * DAY)
    await program.restart(offline=True)
    assert (await program.manifest(APP, "v1")).digest == new


async def test_the_command_says_what_is_fetched_for_later_and_exits_with_the_outcome(
    registry, start
):
    program = await start()
    push_app(registry, b"old")
    assert (await run_on(program, "preload", "app:v1")).exit_code == 0
    program.clock.advance(DAY)
    new = push_app(registry, b"new")
    done = await run_on(program, "preload", "app:v1")
    assert done.exit_code == 0
    assert f"app:v1: {new} is fetched for later: app:v1 has moved" in done.stderr
    refused = await run_on(program, "preload", "app:v1", f"app@{new}")
    assert refused.exit_code == 4
    assert f"app@{new}: failed: policy 1" in refused.stdout
    assert (await run_on(program, "preload", f"app@{new}")).exit_code == 1
