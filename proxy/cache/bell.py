"""Waking very many who wait for the same, without keeping everybody else waiting meanwhile."""

import asyncio
from collections import deque

# So many at a time: each then sends some hundred KiB, and a thousand of them would take a tenth of a second.
TURN = 32


class Bell:
    """Who waits is woken when it rings, in the order they came, some in each turn of the loop.

    Between two turns the loop looks after its other connections.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], None] = {}
        self._called: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Return when it has rung once more."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting[waiter] = None
        try:
            await waiter
        finally:
            self._waiting.pop(waiter, None)

    def ring(self) -> None:
        """Call all who wait just now; who comes later waits for the next time."""
        is_idle = not self._called
        self._called += self._waiting
        self._waiting.clear()
        if is_idle:
            self._wake()

    def _wake(self) -> None:
        for _ in range(min(TURN, len(self._called))):
            waiter = self._called.popleft()
            if not waiter.done():
                waiter.set_result(None)
        if self._called:
            asyncio.get_running_loop().call_soon(self._wake)
