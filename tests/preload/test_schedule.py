"""Scheduled preloads: `[[preload]]` in the configuration."""

import asyncio

from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.fakes.images import push_manifest
from tests.support.admin_api import APP, NATIVE, check_images, list_images


def push_native_app(registry, layer: bytes = b"layer") -> str:
    """Push `app:v1` for this machine, and return its digest."""
    return push_manifest(registry, APP, [layer], tag="v1", platform=NATIVE)


async def let_tasks_run(program) -> None:
    """Give the daemon's tasks time to do what the test expects them not to do."""
    for _ in range(20):
        await program.metric("pullcache_downloads_in_progress")


async def wait_until_complete(program, image: str = "app:v1") -> None:
    """Check the image until the store has all of it."""
    async with asyncio.timeout(20):
        while (await check_images(program, image))[0]["state"] != "complete":
            pass


async def test_images_are_preloaded_at_startup_and_at_each_interval(registry, make_program):
    push_native_app(registry)
    program = await make_program(preload=[{"images": ["app:v1"], "every": "6h", "pin": True}])
    await wait_until_complete(program)
    moved = push_native_app(registry, b"newer")
    program.clock.advance(5 * 3600)
    await let_tasks_run(program)
    assert moved not in program.stored()
    program.clock.advance(2 * 3600)
    async with asyncio.timeout(20):
        while digest_of(b"newer") not in program.stored():
            await program.metric("pullcache_store_blobs")
    assert (await list_images(program))["app:v1"]["pinned"]


async def test_the_list_file_is_read_for_each_run(registry, make_program, tmp_path):
    push_native_app(registry)
    push_manifest(registry, "me/other", [b"other"], tag="v1", platform=NATIVE)
    path = tmp_path / "images.txt"
    path.write_text("app:v1\nBad Name\n")
    program = await make_program(preload=[{"file": str(path)}])
    await wait_until_complete(program)
    path.write_text("me/other:v1\n")
    program.clock.advance(7 * 3600)
    await wait_until_complete(program, "me/other:v1")


async def test_a_failed_preload_is_tried_again_at_the_next_interval(
    registry, make_program, tmp_path
):
    path = tmp_path / "images.txt"
    program = await make_program(preload=[{"file": str(path)}, {"images": ["app:v1"]}])
    async with asyncio.timeout(20):
        while not await program.metric("pullcache_preloaded_images_total", result="failed"):
            pass
    push_native_app(registry)
    push_manifest(registry, "me/other", [b"other"], tag="v1", platform=NATIVE)
    path.write_text("me/other:v1\n")
    program.clock.advance(7 * 3600)
    await wait_until_complete(program)
    await wait_until_complete(program, "me/other:v1")


async def test_a_running_preload_is_not_started_again(registry, make_program):
    push_native_app(registry)
    release = asyncio.Event()
    registry.fail("GET /registry-v2/", Fault(until_headers=release), times=None)
    program = await make_program(preload=[{"images": ["app:v1"], "every": "1h"}])
    await registry.until(lambda: registry.count("GET /registry-v2/") > 0)
    tag_requests = registry.count("/manifests/v1$")
    program.clock.advance(7200)
    await let_tasks_run(program)
    assert registry.count("/manifests/v1$") == tag_requests
    release.set()
    await wait_until_complete(program)


async def test_an_offline_cache_skips_scheduled_preloads(registry, make_program):
    push_native_app(registry)
    program = await make_program(offline=True, preload=[{"images": ["app:v1"]}])
    await let_tasks_run(program)
    assert registry.requests == []
    assert await program.metric("pullcache_preloaded_images_total") == 0
