"""The bell that wakes the readers of a download."""

import asyncio

from proxy.download.download import TURN, Bell


async def settle() -> None:
    """Give every task that can run a turn of the loop."""
    await asyncio.sleep(0)


async def test_many_are_woken_in_order_with_turns_of_the_loop_between():
    bell, woken, seen = Bell(), [], []

    async def follow(number: int) -> None:
        await bell.wait()
        woken.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(5 * TURN):
            group.create_task(follow(number))
        await settle()
        bell.ring()
        while len(woken) < 5 * TURN:
            await settle()
            seen.append(len(woken))
    assert woken == sorted(woken)
    steps = [after - before for before, after in zip([0, *seen], seen, strict=False)]
    assert max(steps) <= TURN
    assert len([step for step in steps if step]) == 5


async def test_who_comes_after_it_rang_waits_for_the_next_time():
    bell = Bell()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(bell.wait())
        await settle()
        bell.ring()
        second = group.create_task(bell.wait())
        await first
        await settle()
        assert not second.done()
        bell.ring()


async def test_who_is_cancelled_keeps_nobody_from_being_woken():
    bell = Bell()
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(bell.wait()) for _ in range(2 * TURN)]
        await settle()
        for gone in waiting[::2]:
            gone.cancel()
        await settle()
        bell.ring()
        waiting[-1].cancel()


async def test_it_may_ring_while_it_still_wakes():
    bell, rounds = Bell(), 3

    async def follow() -> None:
        for _ in range(rounds):
            await bell.wait()

    async with asyncio.TaskGroup() as group:
        readers = [group.create_task(follow()) for _ in range(2 * TURN + 1)]
        while not all(reader.done() for reader in readers):
            await settle()
            bell.ring()
