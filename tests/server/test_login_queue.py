"""Turns of password checks: by address, with a share for users who have logged in before."""

import asyncio
from contextlib import suppress

import pytest

from proxy.errors import TooManyRequestsError
from proxy.server.clients import login_queue
from proxy.server.clients.login_queue import LoginQueue


class Checks:
    """Checks that wait in a queue, and the order in which they got their turns."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self.queue = LoginQueue()
        self.order: list[str] = []
        self.refused: list[str] = []
        self.most_at_once = 0
        self._running = 0
        self._group = group
        self._may_end = asyncio.Event()

    def add(self, client: str, *, is_known: bool = False) -> asyncio.Task[None]:
        return self._group.create_task(self._check(client, is_known=is_known))

    async def _check(self, client: str, *, is_known: bool) -> None:
        try:
            async with self.queue.turn(client, is_known=is_known):
                self._running += 1
                self.most_at_once = max(self.most_at_once, self._running)
                self.order.append(client)
                await self._may_end.wait()
                self._running -= 1
        except TooManyRequestsError:
            self.refused.append(client)

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def finish(self) -> None:
        self._may_end.set()
        while self.queue._is_running:  # noqa: ASYNC110 (a test looks from outside)
            await asyncio.sleep(0)


async def test_addresses_take_turns():
    async with asyncio.TaskGroup() as group:
        checks = Checks(group)
        for client in ("a", "a", "a", "b", "b", "c"):
            _ = checks.add(client)
        await checks.settle()
        await checks.finish()
    assert checks.order == ["a", "a", "b", "c", "a", "b"]
    assert checks.most_at_once == 1


async def test_users_who_have_logged_in_before_have_every_second_turn():
    async with asyncio.TaskGroup() as group:
        checks = Checks(group)
        for client in ("first", "a", "b", "c", "d"):
            _ = checks.add(client)
        await checks.settle()
        for client in ("k", "l", "m"):
            _ = checks.add(client, is_known=True)
        await checks.settle()
        await checks.finish()
    assert checks.order == ["first", "k", "a", "l", "b", "m", "c", "d"]


async def test_one_address_lets_a_bounded_number_wait():
    async with asyncio.TaskGroup() as group:
        checks = Checks(group)
        for _ in range(20):
            _ = checks.add("a")
        _ = checks.add("b")
        await checks.settle()
        assert checks.refused == ["a"] * (19 - login_queue.MAX_WAITING_PER_CLIENT)
        await checks.finish()
    assert checks.order.count("b") == 1


async def test_a_full_queue_sends_away_those_who_have_most(monkeypatch):
    monkeypatch.setattr(login_queue, "MAX_WAITING", 8)
    async with asyncio.TaskGroup() as group:
        checks = Checks(group)
        _ = checks.add("first")
        await checks.settle()
        for client in "aaaabbbbc":
            _ = checks.add(client)
        await checks.settle()
        assert len(checks.refused) == 1
        assert checks.refused[0] in "ab"
        _ = checks.add("d", is_known=True)
        await checks.settle()
        assert len(checks.refused) == 1
        for client in "efghijk":
            _ = checks.add(client)
        await checks.settle()
        await checks.finish()
    # With more addresses than places, each has one, and the last ones have to try again.
    assert len(checks.order) == 1 + 8 + 1
    assert {"a", "b", "c", "d", "e"} <= {*checks.order}


async def test_a_check_that_waits_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(login_queue, "TURN_TIMEOUT", 0.01)
    async with asyncio.TaskGroup() as group:
        checks = Checks(group)
        tasks = [checks.add(client) for client in "abc"]
        await asyncio.wait(tasks[1:])
        assert checks.refused == ["b", "c"]
        await checks.finish()
        _ = checks.add("d")
    assert checks.order == ["a", "d"]


@pytest.mark.parametrize("when", ["waiting", "granted", "running"])
async def test_a_cancelled_check_gives_its_turn_to_the_next(when):
    async with asyncio.TaskGroup() as group:
        checks = Checks(group)
        first, second, _ = (checks.add(client) for client in "abc")
        await checks.settle()
        if when == "waiting":
            second.cancel()
            await checks.settle()
        elif when == "granted":
            checks.queue._start_next()
            second.cancel()
        else:
            first.cancel()
        await checks.settle()
        await checks.finish()
        _ = checks.add("d")
        with suppress(asyncio.CancelledError):
            await asyncio.gather(first, second)
    assert checks.order[-1] == "d"
    assert "c" in checks.order
