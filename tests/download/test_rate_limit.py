"""The cap on the rate of all downloads together: it holds, it is fair, and nothing stalls."""

import asyncio
import itertools

import pytest

from proxy.config.rates import RateSchedule
from proxy.download.rate_limit import MAX_GRANT, MIN_GRANT, RateLimiter

RATE = 1_000_000
CAP = RateSchedule.parse(RATE)


async def take(limiter: RateLimiter, download: object, size: int) -> None:
    """Read `size` bytes as a download does."""
    while size > 0:
        size -= await limiter.acquire(download, min(size, 1 << 20))


async def test_without_a_cap_all_is_granted_at_once():
    limiter = RateLimiter(RateSchedule.parse("off"))
    assert await limiter.acquire("a", 1 << 30) == 1 << 30


async def test_the_bytes_of_a_time_are_what_the_rate_allows():
    limiter, loop = RateLimiter(CAP), asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(take(limiter, number, 50_000))
    # What the rate allows in a moment is granted before, and never more.
    assert loop.time() - began >= (200_000 - MAX_GRANT // 4 - RATE * 0.1) / RATE


async def test_downloads_get_the_same_whatever_the_number_of_their_connections():
    limiter, taken = RateLimiter(CAP), {"one": 0, "many": 0}
    order: list[str] = []

    async def read(download: str) -> None:
        while True:
            granted = await limiter.acquire(download, 1 << 20)
            taken[download] += granted
            order.append(download)

    readers = [asyncio.create_task(read("one"))]  # noqa: TID251 (cancelled below)
    readers += [asyncio.create_task(read("many")) for _ in range(4)]  # noqa: TID251
    async with asyncio.timeout(10):
        while len(order) < 12:  # noqa: ASYNC110 (no event)
            await asyncio.sleep(0.005)
    for reader in readers:
        reader.cancel()
    await asyncio.wait(readers)
    # From the second grant on, they take turns.
    assert all(first != second for first, second in itertools.pairwise(order[2:12]))
    assert abs(taken["one"] - taken["many"]) <= 2 * MAX_GRANT


async def test_each_of_many_downloads_gets_its_turn_at_the_lowest_rate():
    limiter = RateLimiter(RateSchedule.parse("1Mbit"))
    granted = await asyncio.wait_for(
        asyncio.gather(*(limiter.acquire(number, 1 << 20) for number in range(32))), 20
    )
    assert set(granted) == {max(MIN_GRANT, int(125_000 * 0.05))}


async def test_bytes_that_were_not_read_are_given_to_others():
    limiter = RateLimiter(CAP)
    for _ in range(1000):  # a hundred times what the rate allows in the time of the test
        granted = await asyncio.wait_for(limiter.acquire("a", 1 << 20), 10)
        limiter.give_back(granted)


async def test_a_cancelled_read_loses_nothing():
    limiter = RateLimiter(CAP)
    await limiter.acquire("a", 1 << 20)
    waiting = [asyncio.ensure_future(limiter.acquire("b", 1 << 20)) for _ in range(20)]  # noqa: TID251
    await asyncio.sleep(0)
    for one in waiting:
        one.cancel()
    await asyncio.wait(waiting)
    assert await asyncio.wait_for(limiter.acquire("c", 1000), 10) == 1000


@pytest.mark.parametrize("after", ["off", "1Gbit"])
async def test_a_new_cap_applies_to_downloads_that_wait(after):
    limiter = RateLimiter(RateSchedule.parse("1Mbit"))
    waiting = asyncio.gather(*(take(limiter, number, 100_000) for number in range(50)))
    await asyncio.sleep(0.05)
    limiter.configure(RateSchedule.parse(after))
    await asyncio.wait_for(waiting, 10)  # at the old cap this would take 40 s


async def test_the_cap_follows_the_time_of_day():
    minute = 9 * 60
    schedule = RateSchedule.parse([{"from": "09:00", "to": "10:00", "rate": "1Mbit"}])
    limiter = RateLimiter(schedule, lambda: minute)
    waiting = asyncio.gather(*(take(limiter, number, 100_000) for number in range(50)))
    await asyncio.sleep(0.05)
    minute = 10 * 60
    await asyncio.wait_for(waiting, 10)


async def test_images_are_pulled_under_a_cap_without_a_stall(registry, make_program):
    """Six blobs of 200 kB at 1 MB a second: each waits longer than the minimum rate would allow."""
    program = await make_program(
        fetch={"max_rate": "1MB", "stall_timeout": "1s", "min_rate": "500kB", "attempts": 1}
    )
    images = [registry.add_image(f"me/app{n}", layers=[bytes([n]) * 200_000]) for n in range(6)]
    began = asyncio.get_running_loop().time()
    await asyncio.gather(*(program.pull(image) for image in images))
    assert asyncio.get_running_loop().time() - began >= 0.8
    assert await program.metric("pullcache_upstream_retries_total") == 0
    # Hits are not limited.
    for image in images:
        await program.wait_for_downloads()
        await program.pull(image)
