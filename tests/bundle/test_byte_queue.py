"""Between network and disk: nothing is lost or turned round, and little is held."""

import asyncio
from itertools import chain

from hypothesis import given, strategies as st

from proxy.bundle.byte_queue import QUEUE_BATCH_SIZE, QUEUE_MAX_SIZE, ByteQueue


async def taken(arrivals: ByteQueue) -> list[list[bytes]]:
    batches = []
    while batch := await arrivals.get_batch():
        batches.append(batch)
    return batches


@given(chunks=st.lists(st.binary(min_size=1, max_size=50)))
async def test_everything_comes_out_in_its_order(chunks):
    arrivals = ByteQueue()
    async with asyncio.TaskGroup() as group:
        taker = group.create_task(taken(arrivals))
        for chunk in chunks:
            await arrivals.put(chunk)
        arrivals.close()
    assert b"".join(chain.from_iterable(taker.result())) == b"".join(chunks)


async def test_the_first_byte_is_handed_over_at_once_and_alone():
    arrivals = ByteQueue()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(arrivals.get_batch())
        await arrivals.put(b"x")
        assert await first == [b"x"]
        arrivals.close()


async def test_what_comes_later_is_taken_in_batches():
    arrivals = ByteQueue()
    await arrivals.put(b"x")
    await arrivals.get_batch()
    for _ in range(QUEUE_BATCH_SIZE):
        await arrivals.put(b"y")
    assert len(await arrivals.get_batch()) == QUEUE_BATCH_SIZE
    arrivals.close()
    assert await arrivals.get_batch() == []


async def test_a_slow_link_waits_a_moment_and_no_more():
    arrivals = ByteQueue()
    await arrivals.put(b"x")
    await arrivals.get_batch()
    await arrivals.put(b"y")
    async with asyncio.timeout(1):
        assert await arrivals.get_batch() == [b"y"]


async def test_a_network_that_is_faster_than_the_disk_waits():
    arrivals = ByteQueue()
    await arrivals.put(bytes(QUEUE_MAX_SIZE))
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(arrivals.put(b"more"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
        assert sum(map(len, await arrivals.get_batch())) > QUEUE_MAX_SIZE
        async with asyncio.timeout(1):
            await waiting


async def test_closing_lets_a_waiting_network_go():
    arrivals = ByteQueue()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(arrivals.put(bytes(QUEUE_MAX_SIZE + 1)))
        await asyncio.sleep(0)
        arrivals.close()
        async with asyncio.timeout(1):
            await waiting
