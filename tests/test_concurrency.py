"""Single flight: concurrent callers share one piece of work, its result and its error."""

import asyncio

import pytest

from proxy.concurrency import SingleFlight
from proxy.errors import UpstreamUnavailableError


class Work:
    """Work that runs until the test sets `done`, and counts its starts."""

    def __init__(self, error: Exception | None = None) -> None:
        self.starts = 0
        self.done = asyncio.Event()
        self.error = error

    async def __call__(self) -> str:
        self.starts += 1
        await self.done.wait()
        if self.error is not None:
            raise self.error
        return "result"


async def test_concurrent_callers_share_one_piece_of_work():
    async with asyncio.TaskGroup() as group:
        flight: SingleFlight[str, str] = SingleFlight(group)
        work = Work()
        waiters = [group.create_task(flight.run("key", work)) for _ in range(100)]
        await asyncio.sleep(0)
        assert "key" in flight
        work.done.set()
    assert [waiter.result() for waiter in waiters] == ["result"] * 100
    assert work.starts == 1
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


async def test_all_callers_get_the_error_and_the_group_goes_on():
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
    assert work.starts == 2


async def test_cancelling_a_caller_does_not_cancel_the_work():
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
    assert work.starts == 1


async def test_the_callers_get_an_error_if_a_shutdown_cancels_the_work():
    class Stop(Exception):  # noqa: N818 (a signal, no error)
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


async def test_work_can_be_started_in_the_background():
    async with asyncio.TaskGroup() as group:
        flight: SingleFlight[str, str] = SingleFlight(group)
        work = Work()
        flight.start("key", work)
        flight.start("key", work)
        work.done.set()
    assert work.starts == 1
