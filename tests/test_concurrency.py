"""Single flight: one piece of work, one result for all, and nobody's leaving ends it."""

import asyncio

import pytest

from proxy.concurrency import SingleFlight
from proxy.errors import UpstreamUnavailableError


class Work:
    """Work that ends when the test says so, and counts how often it was begun."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun = 0
        self.done = asyncio.Event()
        self.error = error

    async def __call__(self) -> str:
        self.begun += 1
        await self.done.wait()
        if self.error is not None:
            raise self.error
        return "result"


async def test_many_who_ask_at_once_share_one_piece_of_work():
    async with asyncio.TaskGroup() as group:
        flight: SingleFlight[str, str] = SingleFlight(group)
        work = Work()
        waiters = [group.create_task(flight.run("key", work)) for _ in range(100)]
        await asyncio.sleep(0)
        assert "key" in flight
        work.done.set()
    assert [waiter.result() for waiter in waiters] == ["result"] * 100
    assert work.begun == 1
    assert "key" not in flight


async def test_other_keys_do_not_wait():
    async with asyncio.TaskGroup() as group:
        flight: SingleFlight[str, str] = SingleFlight(group)
        slow, quick = Work(), Work()
        quick.done.set()
        waiting = group.create_task(flight.run("slow", slow))
        assert await flight.run("quick", quick) == "result"
        assert not waiting.done()
        slow.done.set()


async def test_an_error_is_everybodys_and_the_group_lives_on():
    async with asyncio.TaskGroup() as group:
        flight: SingleFlight[str, str] = SingleFlight(group)
        work = Work(ValueError("broken"))
        work.done.set()
        results = await asyncio.gather(
            *(flight.run("key", work) for _ in range(3)), return_exceptions=True
        )
        assert [str(result) for result in results] == ["broken"] * 3
        work.error = None
        assert await flight.run("key", work) == "result"
    assert work.begun == 2


async def test_who_leaves_does_not_end_the_work():
    async with asyncio.TaskGroup() as group:
        flight: SingleFlight[str, str] = SingleFlight(group)
        work = Work()
        first = group.create_task(flight.run("key", work))
        second = group.create_task(flight.run("key", work))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait((first,))
        work.done.set()
    assert second.result() == "result"
    assert work.begun == 1


async def test_work_that_is_stopped_by_shutdown_tells_its_waiters():
    class Stop(Exception):  # noqa: N818 (the test's own signal)
        pass

    outcome: list[BaseException] = []
    waiter_group = asyncio.TaskGroup()
    async with waiter_group:
        with pytest.RaisesGroup(Stop):
            async with asyncio.TaskGroup() as owner:
                flight: SingleFlight[str, str] = SingleFlight(owner)

                async def wait() -> None:
                    try:
                        await flight.run("key", Work())
                    except UpstreamUnavailableError as error:
                        outcome.append(error)

                waiter_group.create_task(wait())
                await asyncio.sleep(0)
                raise Stop
    assert len(outcome) == 1


async def test_work_can_be_started_without_waiting():
    async with asyncio.TaskGroup() as group:
        flight: SingleFlight[str, str] = SingleFlight(group)
        work = Work()
        flight.start("key", work)
        flight.start("key", work)
        work.done.set()
    assert work.begun == 1
