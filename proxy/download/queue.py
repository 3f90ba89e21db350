"""How many downloads run at once, and who comes next: what clients wait for, then what they may want."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turn:
    """A place in the queue for a slot. `is_urgent` may become true while it waits."""

    def __init__(self, *, is_urgent: bool) -> None:
        self.is_urgent = is_urgent
        self.is_called = asyncio.Event()


class Slots:
    """`count` slots, a quarter of which only urgent turns get."""

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._waiting: deque[Turn] = deque()

    def resize(self, count: int) -> None:
        """Let there be `count` slots. Of fewer than are held, none is free until enough are given back."""
        self._free += count - self._count
        self._count = count
        self.call()

    @asynccontextmanager
    async def held(self, turn: Turn) -> AsyncIterator[None]:
        """Wait for a slot and hold it."""
        self._waiting.append(turn)
        self.call()
        try:
            await turn.is_called.wait()
            yield
        finally:
            if turn.is_called.is_set():
                self._free += 1
            else:
                self._waiting.remove(turn)
            self.call()

    def call(self) -> None:
        """Give free slots to those who wait: when one is free, and when one becomes urgent."""
        while turn := self._next():
            self._waiting.remove(turn)
            self._free -= 1
            turn.is_called.set()

    def _next(self) -> Turn | None:
        if self._free <= 0 or not self._waiting:
            return None
        urgent = next((turn for turn in self._waiting if turn.is_urgent), None)
        return urgent or (self._waiting[0] if self._free > self._count // 4 else None)
