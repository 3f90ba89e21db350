"""A condition that wakes its waiters in batches, so that a thousand of them do not block the loop."""

import asyncio
from collections import deque

# Each woken reader sends some hundred KiB: a thousand in one turn would take a tenth of a second.
WAKE_BATCH = 32


class BatchedCondition:
    """Wakes waiters in the order of their `wait` calls, `WAKE_BATCH` in each turn of the loop."""

    def __init__(self) -> None:
        self._waiters: dict[asyncio.Future[None], None] = {}
        self._notified: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Return after the next notification."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            await waiter
        finally:
            self._waiters.pop(waiter, None)

    def notify_all(self) -> None:
        """Wake all current waiters; later ones wait for the next notification."""
        if not self._waiters:
            return
        is_idle = not self._notified
        self._notified += self._waiters
        self._waiters.clear()
        if is_idle:
            self._wake_batch()

    def _wake_batch(self) -> None:
        for _ in range(min(WAKE_BATCH, len(self._notified))):
            waiter = self._notified.popleft()
            if not waiter.done():
                waiter.set_result(None)
        if self._notified:
            asyncio.get_running_loop().call_soon(self._wake_batch)
