"""A bounded queue of bytes between the task that reads a bundle and the one that writes it."""

import asyncio

# A thread call costs about as much as hashing 100 KiB; a batch of this size makes that cost small.
QUEUE_BATCH_SIZE = 256 << 10
# When the network is faster than the disk, more than this waits in the kernel's buffers instead.
QUEUE_MAX_SIZE = 1 << 20
# How long a slow link may hold back what has arrived, in seconds, to make a larger batch.
QUEUE_MAX_DELAY = 0.005


class ByteQueue:
    """Hands chunks from one producer to one consumer, in batches.

    The first chunk is handed over at once. Later ones wait until they make a batch, or for
    `QUEUE_MAX_DELAY`.
    """

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0
        self._is_closed = False
        self._is_first = True
        self._not_empty = asyncio.Event()
        self._batch_ready = asyncio.Event()
        self._not_full = asyncio.Event()

    async def put(self, chunk: bytes) -> bool:
        """Add a chunk, and wait while the queue is full. Returns False once the queue is closed."""
        self._chunks.append(chunk)
        self._size += len(chunk)
        self._not_empty.set()
        if self._size >= QUEUE_BATCH_SIZE:
            self._batch_ready.set()
        while self._size > QUEUE_MAX_SIZE and not self._is_closed:
            self._not_full.clear()
            await self._not_full.wait()
        return not self._is_closed

    def close(self) -> None:
        """Close the queue for both sides: `put` stops waiting, `get_batch` returns the rest."""
        self._is_closed = True
        for event in (self._not_empty, self._batch_ready, self._not_full):
            event.set()

    async def get_batch(self) -> list[bytes]:
        """Return the chunks that have arrived, at least one; an empty list at the end."""
        await self._not_empty.wait()
        if not self._is_first and not self._batch_ready.is_set():
            timer = asyncio.get_running_loop().call_later(QUEUE_MAX_DELAY, self._batch_ready.set)
            await self._batch_ready.wait()
            timer.cancel()
        self._is_first = False
        chunks, self._chunks, self._size = self._chunks, [], 0
        if not self._is_closed:
            self._not_empty.clear()
            self._batch_ready.clear()
        self._not_full.set()
        return chunks
