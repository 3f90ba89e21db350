"""The condition that wakes the readers of a download in batches."""

import asyncio

from proxy.download.condition import WAKE_BATCH, BatchedCondition


async def settle() -> None:
    """Give every task that can run a turn of the loop."""
    await asyncio.sleep(0)


async def test_waiters_are_woken_in_order_and_in_batches():
    condition, woken, seen = BatchedCondition(), [], []

    async def follow(number: int) -> None:
        await condition.wait()
        woken.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(5 * WAKE_BATCH):
            group.create_task(follow(number))
        await settle()
        condition.notify_all()
        while len(woken) < 5 * WAKE_BATCH:
            await settle()
            seen.append(len(woken))
    assert woken == sorted(woken)
    steps = [after - before for before, after in zip([0, *seen], seen, strict=False)]
    assert max(steps) <= WAKE_BATCH
    assert len([step for step in steps if step]) == 5


async def test_a_waiter_after_a_notification_waits_for_the_next_one():
    condition = BatchedCondition()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(condition.wait())
        await settle()
        condition.notify_all()
        second = group.create_task(condition.wait())
        await first
        await settle()
        assert not second.done()
        condition.notify_all()


async def test_a_cancelled_waiter_does_not_keep_others_from_being_woken():
    condition = BatchedCondition()
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(condition.wait()) for _ in range(2 * WAKE_BATCH)]
        await settle()
        for gone in waiting[::2]:
            gone.cancel()
        await settle()
        condition.notify_all()
        waiting[-1].cancel()


async def test_a_notification_may_arrive_while_an_earlier_one_still_wakes_waiters():
    condition, rounds = BatchedCondition(), 3

    async def follow() -> None:
        for _ in range(rounds):
            await condition.wait()

    async with asyncio.TaskGroup() as group:
        readers = [group.create_task(follow()) for _ in range(2 * WAKE_BATCH + 1)]
        while not all(reader.done() for reader in readers):
            await settle()
            condition.notify_all()
