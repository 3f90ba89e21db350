"""The queue between network and disk: ordered, batched and bounded."""

import asyncio
from itertools import chain

from hypothesis import given, strategies as st

from proxy.bundle.byte_queue import QUEUE_BATCH_SIZE, QUEUE_MAX_SIZE, ByteQueue


async def read_batches(queue: ByteQueue) -> list[list[bytes]]:
    """Return all batches until the queue is closed."""
    batches = []
    while batch := await queue.get_batch():
        batches.append(batch)
    return batches


@given(chunks=st.lists(st.binary(min_size=1, max_size=50)))
async def test_all_bytes_come_out_in_order(chunks):
    queue = ByteQueue()
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(read_batches(queue))
        for chunk in chunks:
            await queue.put(chunk)
        queue.close()
    assert b"".join(chain.from_iterable(reading.result())) == b"".join(chunks)


async def test_the_first_chunk_is_handed_over_at_once():
    queue = ByteQueue()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(queue.get_batch())
        await queue.put(b"x")
        assert await first == [b"x"]
        queue.close()


async def test_later_chunks_are_handed_over_in_batches():
    queue = ByteQueue()
    await queue.put(b"x")
    await queue.get_batch()
    for _ in range(QUEUE_BATCH_SIZE):
        await queue.put(b"y")
    assert len(await queue.get_batch()) == QUEUE_BATCH_SIZE
    queue.close()
    assert await queue.get_batch() == []


async def test_a_chunk_of_a_slow_link_waits_for_the_maximum_delay():
    queue = ByteQueue()
    await queue.put(b"x")
    await queue.get_batch()
    await queue.put(b"y")
    async with asyncio.timeout(1):
        assert await queue.get_batch() == [b"y"]


async def test_put_waits_while_the_queue_is_full():
    queue = ByteQueue()
    await queue.put(bytes(QUEUE_MAX_SIZE))
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(queue.put(b"more"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
        assert sum(map(len, await queue.get_batch())) > QUEUE_MAX_SIZE
        async with asyncio.timeout(1):
            await waiting


async def test_close_ends_a_waiting_put():
    queue = ByteQueue()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(queue.put(bytes(QUEUE_MAX_SIZE + 1)))
        await asyncio.sleep(0)
        queue.close()
        async with asyncio.timeout(1):
            await waiting
