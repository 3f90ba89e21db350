"""The lines before an upstream: urgent first, addresses take turns, and no address takes all."""

import asyncio

from proxy.download.queue import FairLine, Place, Ticket, UpstreamQueue


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


class Holders:
    """Tasks that hold a place of a line until they are told to leave."""

    def __init__(
        self, limit: int, group: asyncio.TaskGroup, *, is_shared_out: bool = False
    ) -> None:
        self.line = FairLine(limit, is_shared_out=is_shared_out)
        self.group = group
        self.inside: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def join(self, name: str, client: str | None = None) -> Place:
        place = Place()
        if client is not None:
            place.is_urgent = True
            place.clients[client] = None
        self.tasks[name] = self.group.create_task(self._hold(name, place))
        await settle()
        return place

    async def leave(self, *names: str) -> None:
        for name in names:
            self.tasks[name].cancel()
            await asyncio.wait([self.tasks[name]])
            await settle()

    async def _hold(self, name: str, place: Place) -> None:
        try:
            await self.line.acquire(place)
            self.inside.append(name)
            await asyncio.Event().wait()
        finally:
            if name in self.inside:
                self.inside.remove(name)
            self.line.release(place)


async def test_urgent_places_go_first_and_the_rest_in_order():
    async with asyncio.TaskGroup() as group:
        holders = Holders(1, group)
        for name in ("first", "early", "late"):
            await holders.join(name)
        await holders.join("urgent", "10.0.0.1")
        order = []
        for _ in range(4):
            order += holders.inside
            await holders.leave(holders.inside[0])
        assert order == ["first", "urgent", "early", "late"]


async def test_addresses_take_turns_whatever_one_of_them_asks_for():
    async with asyncio.TaskGroup() as group:
        holders = Holders(1, group)
        await holders.join("running", "greedy")
        for number in range(20):
            await holders.join(f"greedy {number}", "greedy")
        await holders.join("healthy 0", "healthy")
        await holders.join("healthy 1", "healthy")
        order = []
        for _ in range(5):
            await holders.leave(holders.inside[0])
            order += holders.inside
        assert order == ["greedy 0", "healthy 0", "greedy 1", "healthy 1", "greedy 2"]
        await holders.leave(*holders.tasks)


async def test_what_is_not_urgent_leaves_a_quarter_and_at_least_one_place_free():
    async with asyncio.TaskGroup() as group:
        for limit, taken in ((1, 1), (2, 1), (4, 3), (16, 12)):
            holders = Holders(limit, group)
            for number in range(limit + 1):
                await holders.join(str(number))
            assert len(holders.inside) == taken
            if limit > 1:
                await holders.join("urgent", "10.0.0.1")
                assert "urgent" in holders.inside
            await holders.leave(*holders.tasks)


async def test_no_address_gets_more_of_a_shared_line_than_it_leaves_to_others():
    async with asyncio.TaskGroup() as group:
        holders = Holders(8, group, is_shared_out=True)
        for number in range(20):
            await holders.join(f"a{number}", "a")
        assert len(holders.inside) == 4
        for number in range(20):
            await holders.join(f"b{number}", "b")
        assert len(holders.inside) == 6
        await holders.join("c", "c")
        assert "c" in holders.inside
        await holders.leave(*holders.tasks)
        assert len(holders.line) == 0


async def test_a_place_has_the_turn_of_each_client_that_waits_for_it():
    async with asyncio.TaskGroup() as group:
        holders = Holders(1, group)
        await holders.join("running", "greedy")
        places = [await holders.join(f"greedy {number}", "greedy") for number in range(5)]
        holders.line.add_client(places[4], "healthy")
        order = []
        for _ in range(3):
            await holders.leave(holders.inside[0])
            order += holders.inside
        assert order == ["greedy 0", "greedy 4", "greedy 1"]
        await holders.leave(*holders.tasks)


async def test_a_place_that_becomes_urgent_is_granted():
    async with asyncio.TaskGroup() as group:
        holders = Holders(4, group)
        places = {name: await holders.join(name) for name in "abcde"}
        assert holders.inside == ["a", "b", "c"]
        places["e"].is_urgent = True
        holders.line.add_client(places["e"], "10.0.0.1")
        await settle()
        assert holders.inside == ["a", "b", "c", "e"]
        await holders.leave(*"abced")


async def test_a_place_that_leaves_the_line_is_not_granted():
    async with asyncio.TaskGroup() as group:
        holders = Holders(1, group)
        for name in "abc":
            await holders.join(name, "10.0.0.1")
        await holders.leave("b", "a")
        assert holders.inside == ["c"]
        await holders.leave("c")
        assert len(holders.line) == 0


async def test_fewer_places_than_are_taken_free_none_until_enough_are_given_back():
    async with asyncio.TaskGroup() as group:
        holders = Holders(3, group)
        for name in "abcd":
            await holders.join(name, "10.0.0.1")
        holders.line.resize(1)
        await holders.leave("a")
        assert holders.inside == ["b", "c"]
        await holders.leave("b", "c")
        assert holders.inside == ["d"]
        await holders.leave("d")


async def test_a_request_that_upstream_has_not_answered_takes_no_slot():
    queue = UpstreamQueue(1)
    asking, other = Ticket(queue, "a"), Ticket(queue, "b")
    await asking.admit_request()
    await other.admit_request()
    await other.admit_download()
    assert (asking.is_running, other.is_running) == (False, True)
    other.release()
    await asking.admit_download()
    asking.release()
    assert len(queue.requests) == len(queue.slots) == 0
