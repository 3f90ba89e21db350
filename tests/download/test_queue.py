"""Slots: what clients wait for goes first, and what they may want leaves them room."""

import asyncio

from proxy.download.queue import DownloadQueue, Ticket


class Line:
    """Tasks that hold a slot until they are told to leave."""

    def __init__(self, count: int, group: asyncio.TaskGroup) -> None:
        self.slots = DownloadQueue(count)
        self.group = group
        self.inside: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def join(self, name: str, *, is_urgent: bool) -> Ticket:
        turn = Ticket(is_urgent=is_urgent)
        self.tasks[name] = self.group.create_task(self._hold(name, turn))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return turn

    async def leave(self, name: str) -> None:
        self.tasks[name].cancel()
        await asyncio.wait([self.tasks[name]])
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def _hold(self, name: str, turn: Ticket) -> None:
        async with self.slots.acquire(turn):
            self.inside.append(name)
            try:
                await asyncio.Event().wait()
            finally:
                self.inside.remove(name)


async def test_what_is_urgent_goes_first_and_the_rest_in_order():
    async with asyncio.TaskGroup() as group:
        line = Line(1, group)
        for name in ("first", "early", "late", "urgent"):
            await line.join(name, is_urgent=name == "urgent")
        order = []
        for _ in range(4):
            order += line.inside
            await line.leave(line.inside[0])
        assert order == ["first", "urgent", "early", "late"]


async def test_a_quarter_is_kept_for_what_is_urgent():
    async with asyncio.TaskGroup() as group:
        line = Line(4, group)
        for name in "abcd":
            await line.join(name, is_urgent=False)
        assert line.inside == ["a", "b", "c"]
        await line.join("urgent", is_urgent=True)
        assert line.inside == ["a", "b", "c", "urgent"]
        for name in [*line.inside, "d"]:
            await line.leave(name)


async def test_who_becomes_urgent_while_waiting_is_called():
    async with asyncio.TaskGroup() as group:
        line = Line(4, group)
        turns = {name: await line.join(name, is_urgent=False) for name in "abcde"}
        turns["e"].is_urgent = True
        line.slots.dispatch()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert line.inside == ["a", "b", "c", "e"]
        for name in "abced":
            await line.leave(name)


async def test_who_leaves_the_queue_takes_no_slot():
    async with asyncio.TaskGroup() as group:
        line = Line(1, group)
        for name in "abc":
            await line.join(name, is_urgent=True)
        await line.leave("b")
        await line.leave("a")
        assert line.inside == ["c"]
        await line.leave("c")
