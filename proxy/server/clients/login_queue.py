"""The queue of passwords to be checked: one at a time, in turns by client address.

A check takes as long as bcrypt, so a flood of wrong passwords makes others wait. Addresses take turns, and
users who have logged in before from an address have every second turn to themselves.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from proxy.errors import TooManyRequestsError

# Passwords that may wait: in total, of users who have logged in before, and per client address.
MAX_WAITING = 256
MAX_WAITING_KNOWN = 64
MAX_WAITING_PER_CLIENT = 4
# Seconds after which a check that has not begun is given up; clients give up soon after that.
TURN_TIMEOUT = 10.0

_Waiter = asyncio.Future[None]


class LoginQueue:
    """Gives turns to password checks."""

    def __init__(self) -> None:
        self._new = _Turns(MAX_WAITING)
        self._known = _Turns(MAX_WAITING_KNOWN)
        self._is_running = False
        self._was_known = False

    @asynccontextmanager
    async def turn(self, client: str, *, is_known: bool) -> AsyncIterator[None]:
        """Wait for the turn of a client, and hold it for the block.

        `is_known`: this user has logged in from there before. Raises `TooManyRequestsError`.
        """
        if self._is_running:
            await self._wait(self._known if is_known else self._new, client)
        self._is_running = True
        try:
            yield
        finally:
            self._start_next()

    async def _wait(self, turns: "_Turns", client: str) -> None:
        waiter = turns.add(client)
        try:
            async with asyncio.timeout(TURN_TIMEOUT):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled() and not waiter.exception():
                self._start_next()  # the turn came at the same moment
            turns.discard(client, waiter)
            if isinstance(error, TimeoutError):
                raise _too_many_error() from None
            raise

    def _start_next(self) -> None:
        order = (self._new, self._known) if self._was_known else (self._known, self._new)
        for turns in order:
            while waiter := turns.pop():
                if not waiter.done():
                    self._was_known = turns is self._known
                    waiter.set_result(None)
                    return
        self._is_running = False


class _Turns:
    """Waiters in turns by client, at most `limit` of them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiters_by_client: OrderedDict[str, deque[_Waiter]] = OrderedDict()
        self._count = 0

    def add(self, client: str) -> _Waiter:
        """Return a new waiter. Raises `TooManyRequestsError` if too many wait.

        If the queue is full, the last waiter of a client that has more is sent away for it.
        """
        own = len(self._waiters_by_client.get(client, ()))
        if own >= MAX_WAITING_PER_CLIENT:
            raise _too_many_error()
        if self._count >= self._limit:
            crowd = max(self._waiters_by_client, key=lambda one: len(self._waiters_by_client[one]))
            if len(self._waiters_by_client[crowd]) <= own + 1:
                raise _too_many_error()
            last = self._waiters_by_client[crowd][-1]
            self.discard(crowd, last)
            last.set_exception(_too_many_error())
        waiter = asyncio.get_running_loop().create_future()
        self._waiters_by_client.setdefault(client, deque()).append(waiter)
        self._count += 1
        return waiter

    def pop(self) -> _Waiter | None:
        """Remove and return the waiter whose turn it is; None if there is none."""
        if not self._waiters_by_client:
            return None
        client, waiters = next(iter(self._waiters_by_client.items()))
        waiter = waiters[0]
        self.discard(client, waiter)
        if waiters:
            self._waiters_by_client.move_to_end(client)
        return waiter

    def discard(self, client: str, waiter: _Waiter) -> None:
        """Remove a waiter, unless it was removed before."""
        waiters = self._waiters_by_client.get(client, ())
        if waiter not in waiters:
            return
        self._waiters_by_client[client].remove(waiter)
        self._count -= 1
        if not waiters:
            del self._waiters_by_client[client]


def _too_many_error() -> TooManyRequestsError:
    return TooManyRequestsError("too many logins are being checked; try again in a moment")
