"""The queues of an upstream: urgent slots first, addresses in turn, and a fair share for each."""

import asyncio

from proxy.download.queue import FairQueue, QueueSlot, Ticket, UpstreamQueue


async def settle() -> None:
    """Let the tasks that can run proceed."""
    for _ in range(3):
        await asyncio.sleep(0)


class Holders:
    """Tasks that wait for a slot of a queue and hold it until `cancel`."""

    def __init__(
        self, limit: int, group: asyncio.TaskGroup, *, is_shared_out: bool = False
    ) -> None:
        self.queue = FairQueue(limit, is_shared_out=is_shared_out)
        self.group = group
        self.holding: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def add(self, name: str, client: str | None = None) -> QueueSlot:
        slot = QueueSlot()
        if client is not None:
            slot.is_urgent = True
            slot.clients[client] = None
        self.tasks[name] = self.group.create_task(self._hold(name, slot))
        await settle()
        return slot

    async def cancel(self, *names: str) -> None:
        for name in names:
            self.tasks[name].cancel()
            await asyncio.wait([self.tasks[name]])
            await settle()

    async def _hold(self, name: str, slot: QueueSlot) -> None:
        try:
            await self.queue.acquire(slot)
            self.holding.append(name)
            await asyncio.Event().wait()
        finally:
            if name in self.holding:
                self.holding.remove(name)
            self.queue.release(slot)


async def test_urgent_slots_are_granted_first_and_the_rest_in_order():
    async with asyncio.TaskGroup() as group:
        holders = Holders(1, group)
        for name in ("first", "early", "late"):
            await holders.add(name)
        await holders.add("urgent", "10.0.0.1")
        order = []
        for _ in range(4):
            order += holders.holding
            await holders.cancel(holders.holding[0])
        assert order == ["first", "urgent", "early", "late"]


async def test_client_addresses_take_turns_whatever_the_number_of_their_waiting_slots():
    async with asyncio.TaskGroup() as group:
        holders = Holders(1, group)
        await holders.add("running", "greedy")
        for number in range(20):
            await holders.add(f"greedy {number}", "greedy")
        await holders.add("healthy 0", "healthy")
        await holders.add("healthy 1", "healthy")
        order = []
        for _ in range(5):
            await holders.cancel(holders.holding[0])
            order += holders.holding
        assert order == ["greedy 0", "healthy 0", "greedy 1", "healthy 1", "greedy 2"]
        await holders.cancel(*holders.tasks)


async def test_background_slots_leave_a_quarter_and_at_least_one_slot_free():
    async with asyncio.TaskGroup() as group:
        for limit, taken in ((1, 1), (2, 1), (4, 3), (16, 12)):
            holders = Holders(limit, group)
            for number in range(limit + 1):
                await holders.add(str(number))
            assert len(holders.holding) == taken
            if limit > 1:
                await holders.add("urgent", "10.0.0.1")
                assert "urgent" in holders.holding
            await holders.cancel(*holders.tasks)


async def test_no_address_gets_more_slots_of_a_shared_queue_than_it_leaves_for_others():
    async with asyncio.TaskGroup() as group:
        holders = Holders(8, group, is_shared_out=True)
        for number in range(20):
            await holders.add(f"a{number}", "a")
        assert len(holders.holding) == 4
        for number in range(20):
            await holders.add(f"b{number}", "b")
        assert len(holders.holding) == 6
        await holders.add("c", "c")
        assert "c" in holders.holding
        await holders.cancel(*holders.tasks)
        assert len(holders.queue) == 0


async def test_a_slot_can_be_granted_at_the_turn_of_each_client_that_waits_for_it():
    async with asyncio.TaskGroup() as group:
        holders = Holders(1, group)
        await holders.add("running", "greedy")
        slots = [await holders.add(f"greedy {number}", "greedy") for number in range(5)]
        holders.queue.add_client(slots[4], "healthy")
        order = []
        for _ in range(3):
            await holders.cancel(holders.holding[0])
            order += holders.holding
        assert order == ["greedy 0", "greedy 4", "greedy 1"]
        await holders.cancel(*holders.tasks)


async def test_a_slot_that_becomes_urgent_is_granted():
    async with asyncio.TaskGroup() as group:
        holders = Holders(4, group)
        slots = {name: await holders.add(name) for name in "abcde"}
        assert holders.holding == ["a", "b", "c"]
        slots["e"].is_urgent = True
        holders.queue.add_client(slots["e"], "10.0.0.1")
        await settle()
        assert holders.holding == ["a", "b", "c", "e"]
        await holders.cancel(*"abced")


async def test_a_slot_released_while_waiting_is_not_granted():
    async with asyncio.TaskGroup() as group:
        holders = Holders(1, group)
        for name in "abc":
            await holders.add(name, "10.0.0.1")
        await holders.cancel("b", "a")
        assert holders.holding == ["c"]
        await holders.cancel("c")
        assert len(holders.queue) == 0


async def test_after_the_limit_is_lowered_no_slot_is_granted_until_enough_are_released():
    async with asyncio.TaskGroup() as group:
        holders = Holders(3, group)
        for name in "abcd":
            await holders.add(name, "10.0.0.1")
        holders.queue.resize(1)
        await holders.cancel("a")
        assert holders.holding == ["b", "c"]
        await holders.cancel("b", "c")
        assert holders.holding == ["d"]
        await holders.cancel("d")


async def test_a_request_that_upstream_has_not_answered_takes_no_download_slot():
    queue = UpstreamQueue(1)
    unanswered, other = Ticket(queue, "a"), Ticket(queue, "b")
    await unanswered.admit_request()
    await other.admit_request()
    await other.admit_download()
    assert (unanswered.is_running, other.is_running) == (False, True)
    other.release()
    await unanswered.admit_download()
    unanswered.release()
    assert len(queue.requests) == len(queue.downloads) == 0
