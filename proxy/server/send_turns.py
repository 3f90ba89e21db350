"""A limit on the bytes that all connections together send in one turn of the event loop.

A thousand clients that follow one growing blob can all be sent bytes at once. Without the limit, that
turn would take tenths of a second, and every other request would wait for its end.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial

# Bytes that all connections copy to the kernel in one turn: a few milliseconds.
TURN_SIZE = 8 << 20
# The kernel sends so many bytes of a file (sendfile) in the time in which it copies one from memory.
SENDFILE_SPEEDUP = 4
# A send takes at least as long as the kernel needs to copy this many bytes.
MIN_COST = 32 << 10


class SendTurns:
    """Gives each send its turn, first come, first served."""

    def __init__(self) -> None:
        self._left = TURN_SIZE
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._is_next_turn_scheduled = False

    def try_take(self, size: int) -> bool:
        """Tell whether `size` bytes may be copied to the kernel now, and count them if so."""
        if not self._is_next_turn_scheduled:
            self._schedule_next_turn()
        if self._left <= 0 or self._waiting:
            return False
        self._left -= max(size, MIN_COST)
        return True

    def call_later(self, size: int, send: Callable[[], None]) -> None:
        """Call `send` when `size` bytes may be sent."""
        self._waiting.append((size, send))

    async def take(self, size: int) -> bool:
        """Return when `size` bytes may be sent; tell whether that was a later turn."""
        if self.try_take(size):
            return False
        waiter = asyncio.get_running_loop().create_future()
        self.call_later(size, partial(_wake, waiter))
        await waiter
        return True

    def _schedule_next_turn(self) -> None:
        self._is_next_turn_scheduled = True
        asyncio.get_running_loop().call_soon(self._begin_turn)

    def _begin_turn(self) -> None:
        self._left = TURN_SIZE
        while self._waiting and self._left > 0:
            size, send = self._waiting.popleft()
            self._left -= max(size, MIN_COST)
            send()
        self._is_next_turn_scheduled = False
        if self._left < TURN_SIZE:
            self._schedule_next_turn()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
