"""Content that stands in for content that is too young for a policy is not evicted meanwhile."""

import asyncio

import pytest

from tests.fakes.content import FakeImage
from tests.fakes.registry import FakeRegistry
from tests.support.admin_api import remove_images
from tests.support.program import Program

DAY = 86_400.0
MIB = 1 << 20
RULE = {"images": ["*"], "mode": "enforce", "min_age": "3d"}


def layer(number: int) -> bytes:
    return bytes([number]) * (2 * MIB)


@pytest.fixture
async def program(make_program):
    """A program whose store has space for the stand-in and a few images of two megabytes."""
    return await make_program(store={"max_size": "20MB"}, policy=[RULE])


async def kept_blobs(program) -> int:
    """Return how many blobs evictions spare, after a request: its tasks had their turns."""
    await program.metric("pullcache_store_blobs")
    return int(program.running.stand_ins.kept_blobs)


async def pull_more(registry, program, first: int) -> None:
    """Pull more images than the store has space for."""
    for number in range(first, first + 12):
        image = registry.add_image(f"me/app{number}", layers=[layer(number)])
        await program.pull(image)
        await program.wait_for_downloads()
        program.clock.advance(10)


async def pull_and_move(registry: FakeRegistry, program: Program) -> FakeImage:
    """Pull an image, and move its tag a day later; return the image, which stands in for the new one."""
    old = registry.add_image(layers=[layer(1)])
    await program.pull(old)
    await program.wait_for_downloads()
    program.clock.advance(DAY)
    new = registry.add_image(layers=[layer(2)])
    assert (await program.manifest(new)).digest == old.digest
    return old


async def test_a_stand_in_is_kept_until_the_new_content_is_old_enough(registry, program):
    old = registry.add_image(layers=[layer(1)])
    await program.pull(old)
    await program.wait_for_downloads()
    program.clock.advance(DAY)
    new = registry.add_image(layers=[layer(2)])
    assert (await program.manifest(new)).digest == old.digest
    await pull_more(registry, program, 10)
    assert set(old.blobs) | {old.digest} <= program.stored()
    # After a restart too, before it is asked for.
    await program.restart()
    await program.running.stand_ins.refresh()
    await pull_more(registry, program, 30)
    assert set(old.blobs) | {old.digest} <= program.stored()
    program.clock.advance(3 * DAY)
    await program.running.stand_ins.refresh()
    await pull_more(registry, program, 50)
    assert not set(old.layers) & program.stored()


async def test_without_a_policy_that_needs_it_nothing_is_kept(registry, program):
    old = await pull_and_move(registry, program)
    for rule in ({**RULE, "unripe": "deny"}, {**RULE, "mode": "audit"}, {"images": ["*"]}):
        assert await program.reload(policy=[rule])
        await program.running.stand_ins.refresh()
    await pull_more(registry, program, 10)
    assert not set(old.layers) & program.stored()


async def test_a_stand_in_can_be_removed_by_hand(registry, program):
    old = await pull_and_move(registry, program)
    await remove_images(program, "app:latest")
    assert not set(old.layers) & program.stored()


async def test_maintenance_keeps_stand_ins(registry, program):
    old = registry.add_image(layers=[layer(1)])
    await program.pull(old)
    program.clock.advance(DAY)
    assert (await program.manifest(registry.add_image(layers=[layer(2)]))).digest == old.digest
    await program.restart()
    async with asyncio.timeout(20):
        while not await kept_blobs(program):
            pass
    await pull_more(registry, program, 10)
    assert set(old.blobs) <= program.stored()
