"""`[[preload]]`: images that the daemon keeps warm by itself."""

import asyncio

from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.fakes.gallery import push_manifest
from tests.support.admin_api import APP, NATIVE, checks, images

HEADS = "HEAD /v2/library/app/manifests/v1$"


def push(registry, layer: bytes = b"layer") -> str:
    return push_manifest(registry, APP, [layer], tag="v1", platform=NATIVE)


async def until_state(program, state: str, image: str = "app:v1") -> None:
    async with asyncio.timeout(20):
        while (await checks(program, image))[0]["state"] != state:
            pass


async def test_images_are_preloaded_at_the_start_and_every_so_often(registry, make_program):
    push(registry)
    program = await make_program(preload=[{"images": ["app:v1"], "every": "6h", "pin": True}])
    await until_state(program, "complete")
    moved = push(registry, b"newer")
    program.clock.turn(5 * 3600)
    assert moved not in program.stored()
    program.clock.turn(2 * 3600)
    async with asyncio.timeout(20):
        while digest_of(b"newer") not in program.stored():
            await program.metric("pullcache_store_blobs")
    assert (await images(program))["app:v1"]["pinned"]


async def test_a_list_is_read_each_time(registry, make_program, tmp_path):
    push(registry)
    push_manifest(registry, "me/other", [b"other"], tag="v1", platform=NATIVE)
    path = tmp_path / "images.txt"
    path.write_text("app:v1\nBad Name\n")
    program = await make_program(preload=[{"file": str(path)}])
    await until_state(program, "complete")
    path.write_text("me/other:v1\n")
    program.clock.turn(7 * 3600)
    await until_state(program, "complete", "me/other:v1")


async def test_what_fails_is_tried_again_at_its_next_time(registry, make_program, tmp_path):
    path = tmp_path / "images.txt"
    program = await make_program(preload=[{"file": str(path)}, {"images": ["app:v1"]}])
    async with asyncio.timeout(20):
        while not await program.metric("pullcache_preloaded_images_total", result="failed"):
            pass
    push(registry)
    push_manifest(registry, "me/other", [b"other"], tag="v1", platform=NATIVE)
    path.write_text("me/other:v1\n")
    program.clock.turn(7 * 3600)
    await until_state(program, "complete")
    await until_state(program, "complete", "me/other:v1")


async def test_one_that_lasts_is_not_begun_again(registry, make_program):
    push(registry)
    hold = asyncio.Event()
    registry.fail("GET /registry-v2/", Fault(until_headers=hold), times=None)
    program = await make_program(preload=[{"images": ["app:v1"], "every": "1h"}])
    await registry.until(lambda: registry.count("GET /registry-v2/") > 0)
    asked = registry.count("/manifests/v1$")
    program.clock.turn(7200)
    for _ in range(20):
        await program.metric("pullcache_downloads_in_progress")
    assert registry.count("/manifests/v1$") == asked
    hold.set()
    await until_state(program, "complete")


async def test_offline_it_is_skipped(registry, make_program):
    push(registry)
    program = await make_program(offline=True, preload=[{"images": ["app:v1"]}])
    for _ in range(20):
        await program.metric("pullcache_downloads_in_progress")
    assert registry.requests == []
    assert await program.metric("pullcache_preloaded_images_total") == 0
