"""Large blobs over several connections: correct, in order, requested ranges first."""

import asyncio
import random

import pytest

from tests.fakes.faults import Fault
from tests.fakes.registry import FakeRegistry

MIB = 1 << 20
BLOB = random.Random(7).randbytes(24 * MIB + 5)


@pytest.fixture
def blob(registry) -> str:
    digest: str = registry.add_blob(BLOB)
    return digest


@pytest.fixture
def body(registry, blob) -> str:
    match: str = registry.body_of(blob)
    return match


def parts(registry: FakeRegistry, body: str) -> list[str | None]:
    return [seen.headers.get("Range") for seen in registry.seen(body)]


async def begun(registry, body: str, count: int) -> None:
    """Wait until this many requests for the blob's bytes have arrived."""
    await registry.until(lambda: registry.count(body) >= count)


async def test_a_large_blob_is_fetched_over_several_connections_and_no_byte_twice(
    registry, program, blob, body
):
    held = asyncio.Event()
    registry.fail(body, Fault(stall_at=MIB, until=held), times=4)
    asking = asyncio.ensure_future(program.blob(blob))  # noqa: TID251
    await begun(registry, body, 4)
    held.set()
    answer = await asking
    assert (answer.status, answer.is_whole, answer.digest) == (200, True, blob)
    assert registry.bytes_sent(body) == len(BLOB)
    await program.wait_for_downloads()
    assert program.stored() == {blob}
    assert await program.metric("pullcache_downloads_total", result="stored") == 1


async def test_a_fast_connection_stays_the_only_one(registry, make_program, blob, body):
    program = await make_program(fetch={"parallel_max_rate": "0B"})
    assert (await program.blob(blob)).digest == blob
    assert len({seen.peer for seen in registry.seen(body)}) == 1
    assert registry.bytes_sent(body) == len(BLOB)
    # One piece to learn whether upstream supports ranges, then longer ones.
    assert len(parts(registry, body)) == 3


async def test_further_connections_join_one_that_was_fast_and_stalls(
    registry, make_program, blob, body
):
    program = await make_program(fetch={"parallel_max_rate": "64MB"})
    held = asyncio.Event()
    first = asyncio.Event()
    registry.fail(body, Fault(stall_at=MIB, until=first), times=1)
    asking = asyncio.ensure_future(program.blob(blob))  # noqa: TID251
    await begun(registry, body, 1)
    registry.fail(body, Fault(stall_at=2 * MIB, until=held), times=1)
    first.set()
    # The second piece stalls, and another connection fetches the bytes after it.
    await begun(registry, body, 3)
    held.set()
    assert (await asking).digest == blob
    assert registry.bytes_sent(body) == len(BLOB)


async def test_further_connections_join_one_that_stalls(registry, make_program, blob, body):
    program = await make_program(fetch={"parallel_max_rate": "64MB"})
    held = asyncio.Event()
    registry.fail(body, Fault(stall_at=MIB, until=held), times=1)
    asking = asyncio.ensure_future(program.blob(blob))  # noqa: TID251
    await begun(registry, body, 4)
    held.set()
    assert (await asking).digest == blob


@pytest.mark.parametrize(
    "fetch", [{"parallel_above": "64MB"}, {"connections_per_blob": 1}], ids=["small", "one"]
)
async def test_a_small_blob_and_a_single_connection_are_fetched_sequentially(
    registry, make_program, fetch
):
    program = await make_program(fetch=fetch)
    digest = registry.add_blob(BLOB)
    assert (await program.blob(digest)).digest == digest
    body = registry.body_of(digest)
    assert registry.count(body) <= 2
    assert registry.bytes_sent(body) == len(BLOB)


async def test_a_blob_with_a_small_stated_size_is_requested_without_a_range(registry, program):
    image = registry.add_image(layers=[b"x" * 5 * MIB])
    await program.pull(image)
    for digest in image.blobs:
        assert parts(registry, registry.body_of(digest)) == [None]


async def test_an_empty_blob_is_fetched_although_it_has_no_satisfiable_range(registry, program):
    digest = registry.add_blob(b"")
    answer = await program.blob(digest)
    assert (answer.status, answer.body) == (200, b"")
    await program.wait_for_downloads()
    assert program.stored() == {digest}


async def test_the_end_of_a_missing_blob_is_served_before_its_middle(registry, program, blob, body):
    held = asyncio.Event()
    registry.fail(body, Fault(stall_at=64 * 1024, until=held), times=4)
    asking = asyncio.ensure_future(program.blob(blob))  # noqa: TID251
    await begun(registry, body, 4)
    async with asyncio.timeout(5):
        tail = await program.blob(blob, Range="bytes=-65536")
    assert (tail.status, tail.body, tail.is_whole) == (206, BLOB[-65536:], True)
    async with asyncio.timeout(5):
        middle = await program.blob(blob, Range=f"bytes={9 * MIB}-{9 * MIB + 99}")
    assert middle.body == BLOB[9 * MIB : 9 * MIB + 100]
    held.set()
    assert (await asking).digest == blob


async def test_the_end_of_a_wrong_blob_is_withheld_from_a_client_that_reads_on(
    registry, program, blob, body
):
    registry.fail(body, Fault(flip_at=5), times=None)
    answers = await asyncio.gather(
        program.blob(blob), program.blob(blob, Range=f"bytes={12 * MIB}-")
    )
    for answer in answers:
        assert answer.status >= 400 or not answer.is_whole
    await program.wait_for_downloads()
    assert program.stored() == set()


@pytest.mark.parametrize(
    "fault",
    [
        Fault(cut_at=100_000),
        Fault(cut_at=100_000, reset=True),
        Fault(status=403, body=b""),
        Fault(status=503, body=b""),
        Fault(ignore_range=True),
        Fault(hang_up=True),
    ],
    ids=["cut", "reset", "403", "503", "whole", "refused"],
)
@pytest.mark.parametrize("after", [1, 2, 3])
async def test_whatever_happens_to_one_connection_the_blob_is_complete(
    registry, program, blob, body, fault, after
):
    registry.fail(body, Fault(), times=after)
    registry.fail(body, fault, times=2)
    answer = await program.blob(blob)
    assert (answer.status, answer.is_whole, answer.digest) == (200, True, blob)
    await program.wait_for_downloads()
    assert program.stored() == {blob}


async def test_an_upstream_that_allows_one_connection_gets_one(registry, program, blob, body):
    registry.fail(body, Fault(), times=1)
    registry.fail(body, Fault(status=429, body=b"", headers={"Retry-After": "1"}), times=3)
    answer = await program.blob(blob)
    assert answer.digest == blob


async def test_an_upstream_without_ranges_sends_the_blob_once(registry, program, blob, body):
    registry.front.accept_ranges = registry.edge.accept_ranges = False
    answer = await program.blob(blob)
    assert answer.digest == blob
    assert registry.bytes_sent(body) == len(BLOB)


async def test_a_stop_keeps_ranges_received_ahead_and_the_next_start_continues_from_there(
    registry, program, blob, body
):
    held = asyncio.Event()
    # The first piece stalls halfway; the others have arrived.
    registry.fail(body, Fault(stall_at=2 * MIB, until=held), times=1)
    async with program.opened(f"/v2/library/app/blobs/{blob}") as response:
        await response.content.readexactly(2 * MIB)
        response.close()
    await program.stop()
    before = registry.bytes_sent(body)
    registry.heal()
    await program.start()
    assert (await program.blob(blob)).digest == blob
    assert registry.bytes_sent(body) - before <= len(BLOB) - 2 * MIB
    await program.wait_for_downloads()
    assert program.stored() == {blob}
