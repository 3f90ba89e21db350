"""How many downloads run at once, and who comes next: what clients wait for, then what they may want."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Ticket:
    """A place in the queue for a slot. `is_urgent` may become true while it waits."""

    def __init__(self, *, is_urgent: bool) -> None:
        self.is_urgent = is_urgent
        self.granted = asyncio.Event()


class DownloadQueue:
    """`count` slots, a quarter of which only urgent turns get."""

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._waiting: deque[Ticket] = deque()

    def resize(self, count: int) -> None:
        """Let there be `count` slots. Of fewer than are held, none is free until enough are given back."""
        self._free += count - self._count
        self._count = count
        self.dispatch()

    @asynccontextmanager
    async def acquire(self, ticket: Ticket) -> AsyncIterator[None]:
        """Wait for a slot and hold it."""
        self._waiting.append(ticket)
        self.dispatch()
        try:
            await ticket.granted.wait()
            yield
        finally:
            if ticket.granted.is_set():
                self._free += 1
            else:
                self._waiting.remove(ticket)
            self.dispatch()

    def dispatch(self) -> None:
        """Give free slots to those who wait: when one is free, and when one becomes urgent."""
        while turn := self._next_ticket():
            self._waiting.remove(turn)
            self._free -= 1
            turn.granted.set()

    def _next_ticket(self) -> Ticket | None:
        if self._free <= 0 or not self._waiting:
            return None
        urgent = next((turn for turn in self._waiting if turn.is_urgent), None)
        return urgent or (self._waiting[0] if self._free > self._count // 4 else None)
