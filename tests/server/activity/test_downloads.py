"""The list of downloads under way."""

import asyncio
from typing import Any

from tests.fakes.faults import Fault
from tests.support.admin_api import call
from tests.support.openapi import validate
from tests.support.preload_api import start_preload
from tests.support.program import Program

LAYER = b"x" * 5_000_000


async def downloads(program: Program) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await call(program, "get", "/api/v1/downloads")
    for one in found:
        validate(one, "DownloadStatus")
    return found


async def test_a_download_shows_its_size_progress_rate_and_clients(registry, program):
    image = registry.add_image("me/app", layers=[LAYER])
    release = asyncio.Event()
    stall = Fault(stall_at=1_000_000, until=release)
    registry.fail(registry.body_of(image.layers[0]), stall, times=None)
    await program.manifest(image)
    assert await downloads(program) == []
    async with program.opened(f"/v2/me/app/blobs/{image.layers[0]}") as response:
        await response.content.readexactly(500_000)
        (one,) = await downloads(program)
        async with asyncio.timeout(10):
            while one["rate"] is None:
                (one,) = await downloads(program)
        assert (one["upstream"], one["repository"]) == ("docker.io", "me/app")
        assert one["digest"] == image.layers[0]
        assert (one["phase"], one["size"]) == ("downloading", len(LAYER))
        assert 500_000 <= one["received"] < len(LAYER)
        assert (one["readers"], one["clients"]) == (1, ["127.0.0.1"])
        assert 0 < one["rate"] < 3_000_000
        release.set()
        registry.heal()
        await response.read()
    await program.wait_for_downloads()
    assert await downloads(program) == []


async def test_a_download_that_waits_for_upstream_and_one_of_a_preload_are_marked(
    registry, program
):
    image = registry.add_image("me/app", layers=[LAYER])
    release = asyncio.Event()
    registry.fail(registry.body_of(image.layers[0]), Fault(until_headers=release), times=None)
    async with start_preload(program, "me/app") as run:
        await run.wait_for("plan")
        async with asyncio.timeout(10):
            while not (found := await downloads(program)):
                pass
        (one,) = (one for one in found if one["digest"] == image.layers[0])
        assert (one["phase"], one["size"], one["clients"]) == ("waiting", None, [])
        release.set()
