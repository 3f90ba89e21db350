"""The bell that wakes the readers of a download."""

import asyncio

from proxy.download.condition import WAKE_BATCH, BatchedCondition


async def settle() -> None:
    """Give every task that can run a turn of the loop."""
    await asyncio.sleep(0)


async def test_many_are_woken_in_order_with_turns_of_the_loop_between():
    bell, woken, seen = BatchedCondition(), [], []

    async def follow(number: int) -> None:
        await bell.wait()
        woken.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(5 * WAKE_BATCH):
            group.create_task(follow(number))
        await settle()
        bell.notify_all()
        while len(woken) < 5 * WAKE_BATCH:
            await settle()
            seen.append(len(woken))
    assert woken == sorted(woken)
    steps = [after - before for before, after in zip([0, *seen], seen, strict=False)]
    assert max(steps) <= WAKE_BATCH
    assert len([step for step in steps if step]) == 5


async def test_who_comes_after_it_rang_waits_for_the_next_time():
    bell = BatchedCondition()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(bell.wait())
        await settle()
        bell.notify_all()
        second = group.create_task(bell.wait())
        await first
        await settle()
        assert not second.done()
        bell.notify_all()


async def test_who_is_cancelled_keeps_nobody_from_being_woken():
    bell = BatchedCondition()
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(bell.wait()) for _ in range(2 * WAKE_BATCH)]
        await settle()
        for gone in waiting[::2]:
            gone.cancel()
        await settle()
        bell.notify_all()
        waiting[-1].cancel()


async def test_it_may_ring_while_it_still_wakes():
    bell, rounds = BatchedCondition(), 3

    async def follow() -> None:
        for _ in range(rounds):
            await bell.wait()

    async with asyncio.TaskGroup() as group:
        readers = [group.create_task(follow()) for _ in range(2 * WAKE_BATCH + 1)]
        while not all(reader.done() for reader in readers):
            await settle()
            bell.notify_all()
