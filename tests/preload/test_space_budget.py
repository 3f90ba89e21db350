"""Images that do not fit fail before any layer is fetched; fetched images are not evicted."""

import asyncio
import re

from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.fakes.images import push_manifest
from tests.support.admin_api import (
    APP,
    NATIVE,
    call,
    check_images,
)
from tests.support.preload_api import run_preload, start_preload


async def test_an_image_that_does_not_fit_fails_first_and_the_others_are_fetched(
    registry, make_program
):
    program = await make_program(store={"max_size": "8MB"})
    for tag, size in (("a", 3_000_000), ("b", 6_000_000), ("c", 2_500_000)):
        push_manifest(registry, APP, [tag.encode() * size], tag=tag, platform=NATIVE)
    run = await run_preload(program, "app:a", "app:b", "app:c")
    kinds = [event["event"] for event in run.events]
    assert kinds.index("failed") < kinds.index("layer")
    assert run.events_of("plan")[0]["shortfall"] > 3_000_000
    assert [event["image"] for event in run.events_of("failed")] == ["app:b"]
    reason = run.events_of("failed")[0]["reason"]
    assert re.match(
        r"the image needs 6 MB; pins and the images before it leave 4\.\d+ MB: ", reason
    )
    assert "raise store.max_size" in run.events_of("failed")[0]["reason"]
    states = [check["state"] for check in await check_images(program, "app:a", "app:b", "app:c")]
    # Only the manifest of the second is stored; its size was needed for the plan.
    assert states == ["complete", "partial", "complete"]


async def test_a_running_preload_is_not_evicted_for_a_client(registry, make_program):
    program = await make_program(store={"max_size": "8MB"})
    push_manifest(registry, APP, [b"a" * 4_000_000], tag="a", platform=NATIVE)
    push_manifest(registry, APP, [b"b" * 1_000_000], tag="b", platform=NATIVE)
    await run_preload(program, "app:a")
    release = asyncio.Event()
    body = registry.body_of(digest_of(b"b" * 1_000_000))
    registry.fail(body, Fault(stall_at=500_000, until=release), times=1)
    async with start_preload(program, "app:a", "app:b") as run:
        await run.wait_for("layer", state="downloading")
        large = registry.add_blob(b"c" * 5_000_000)
        assert (await program.blob(large)).is_whole
        release.set()
        await run.wait_for("totals")
    states = [check["state"] for check in await check_images(program, "app:a", "app:b")]
    assert states == ["complete", "complete"]
    assert large not in program.stored()


async def test_a_preload_evicts_older_images_but_no_pinned_ones(registry, make_program):
    program = await make_program(store={"max_size": "8MB"})
    for tag in "abc":
        push_manifest(registry, APP, [tag.encode() * 3_000_000], tag=tag, platform=NATIVE)
    await run_preload(program, "app:a")
    await run_preload(program, "app:b", "app:c")
    states = [check["state"] for check in await check_images(program, "app:a", "app:b", "app:c")]
    assert states[1:] == ["complete", "complete"]
    assert states[0] != "complete"
    await call(program, "post", "/api/v1/images/pin", {"images": ["app:b", "app:c"]})
    run = await run_preload(program, "app:a")
    assert [event["code"] for event in run.events_of("failed")] == ["no_space"]
    states = [check["state"] for check in await check_images(program, "app:b", "app:c")]
    assert states == ["complete", "complete"]
