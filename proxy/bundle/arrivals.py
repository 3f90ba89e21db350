"""What has arrived from the network and is not yet on the disk: a bounded buffer of chunks."""

import asyncio

# A thread call costs about as much as hashing 100 KiB; this much makes it worth its price.
BATCH = 256 << 10
# More than this waits in the kernel: the network is then faster than the disk.
BOUND = 1 << 20
# How long a slow link may hold up what has arrived, in seconds, for the sake of a larger batch.
LINGER = 0.005


class Arrivals:
    """One task puts, another takes.

    The first chunk is handed over at once, for the sake of whoever waits for a first byte; later ones
    as soon as they make a batch, or after `LINGER`.
    """

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0
        self._is_closed = False
        self._is_first = True
        self._some = asyncio.Event()
        self._enough = asyncio.Event()
        self._room = asyncio.Event()

    async def put(self, chunk: bytes) -> bool:
        """Add a chunk; wait while there is too much. False if nobody takes any more."""
        self._chunks.append(chunk)
        self._size += len(chunk)
        self._some.set()
        if self._size >= BATCH:
            self._enough.set()
        while self._size > BOUND and not self._is_closed:
            self._room.clear()
            await self._room.wait()
        return not self._is_closed

    def close(self) -> None:
        """Nothing is added, or taken, any more."""
        self._is_closed = True
        for event in (self._some, self._enough, self._room):
            event.set()

    async def take(self) -> list[bytes]:
        """Return what has arrived, at least one chunk; an empty list at the end."""
        await self._some.wait()
        if not self._is_first and not self._enough.is_set():
            timer = asyncio.get_running_loop().call_later(LINGER, self._enough.set)
            await self._enough.wait()
            timer.cancel()
        self._is_first = False
        chunks, self._chunks, self._size = self._chunks, [], 0
        if not self._is_closed:
            self._some.clear()
            self._enough.clear()
        self._room.set()
        return chunks
