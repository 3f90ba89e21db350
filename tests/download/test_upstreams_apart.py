"""Upstreams do not affect each other: bytes, partial downloads and slots belong to one of them."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.fakes.content import digest_of
from tests.fakes.faults import Fault, flip
from tests.fakes.raw_server import HEAD_END, RawUpstream, RecvUntil, Wait
from tests.fakes.registry import FakeRegistry
from tests.support.program import Program, read

MIB = 1 << 20
BLOB = bytes(range(256)) * (4 * MIB // 256)
THERE = "hostile.test/library/app"


@pytest.fixture
async def hostile() -> AsyncIterator[FakeRegistry]:
    """A configured upstream that sends wrong bytes."""
    async with FakeRegistry() as hostile:
        hostile.add_blob(BLOB)
        yield hostile


@pytest.fixture
async def both(registry, hostile, make_program) -> Program:
    """The program with an honest upstream, docker.io, and a hostile one."""
    registry.add_blob(BLOB)
    program: Program = await make_program(
        upstreams={"hostile.test": {"url": hostile.url}}, fetch={"stall_timeout": "20s"}
    )
    return program


DIGEST = digest_of(BLOB)
WRONG = flip(BLOB, 5)


async def expect_right(program: Program, seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        answer = await program.blob(DIGEST)
    assert (answer.status, answer.digest, answer.is_whole) == (200, DIGEST, True)


async def test_an_upstream_that_sends_wrong_bytes_slowly_delays_no_other(hostile, both):
    never = asyncio.Event()
    hostile.fail(hostile.body_of(DIGEST), Fault(body=WRONG, stall_at=200_000, until=never))
    async with both.opened(f"/v2/{THERE}/blobs/{DIGEST}") as response:
        await response.content.readexactly(100_000)
        await expect_right(both)


async def test_an_upstream_that_does_not_answer_delays_no_other(hostile, both):
    never = asyncio.Event()
    hostile.fail(hostile.body_of(DIGEST), Fault(until_headers=never))
    async with asyncio.TaskGroup() as group:
        there = group.create_task(both.blob(DIGEST, THERE))
        await hostile.until(lambda: hostile.count(hostile.body_of(DIGEST)) > 0)
        await expect_right(both)
        never.set()
    assert there.result().is_whole


async def test_wrong_bytes_from_one_upstream_are_not_resumed_for_another(registry, hostile, both):
    cut = len(BLOB) * 9 // 10
    hostile.fail(hostile.body_of(DIGEST), Fault(body=WRONG, cut_at=cut))
    hostile.fail(hostile.body_of(DIGEST), Fault(status=403, body=b""), times=None)
    answer = await both.blob(DIGEST, THERE)
    assert not answer.is_whole
    await both.wait_for_downloads()
    await expect_right(both)
    assert registry.bytes_sent(registry.body_of(DIGEST)) == len(BLOB)


async def test_repeated_wrong_bytes_from_one_upstream_are_not_blamed_on_another(hostile, both):
    cut = len(BLOB) * 9 // 10
    for _ in range(5):
        hostile.fail(hostile.body_of(DIGEST), Fault(body=WRONG, cut_at=cut))
        hostile.fail(hostile.body_of(DIGEST), Fault(body=WRONG), times=2)
        async with asyncio.TaskGroup() as group:
            group.create_task(both.blob(DIGEST, THERE))
            group.create_task(expect_right(both))
        await both.wait_for_downloads()
        (both.root / "blobs" / "sha256" / DIGEST[7:]).unlink()
    assert await both.metric("pullcache_digest_mismatches_total", upstream="docker.io") == 0


async def test_a_partial_download_is_resumed_from_its_own_upstream_only(registry, hostile, both):
    hostile.fail(hostile.body_of(DIGEST), Fault(stall_at=2 * MIB, until=asyncio.Event()))
    async with both.opened(f"/v2/{THERE}/blobs/{DIGEST}") as response:
        await response.content.readexactly(2 * MIB)
        response.close()
    await both.restart()
    await expect_right(both)
    assert registry.bytes_sent(registry.body_of(DIGEST)) == len(BLOB)


async def test_an_upstream_that_hangs_delays_no_blobs_of_others(registry, make_program):
    never = asyncio.Event()
    async with RawUpstream([RecvUntil(HEAD_END), Wait(never)]) as raw:
        program = await make_program(upstreams={"hanging.test": {"url": raw.url}})
        registry.add_blob(BLOB)
        async with asyncio.TaskGroup() as group:
            hanging = [
                group.create_task(program.blob(f"sha256:{n:064x}", "hanging.test/library/app"))
                for n in range(24)
            ]
            async with asyncio.timeout(5):
                while len(raw.received) < 16:  # noqa: ASYNC110 (it tells nothing of connections)
                    await asyncio.sleep(0.01)
            await expect_right(program)
            assert not any(task.done() for task in hanging)
            never.set()
        assert {task.result().status for task in hanging} == {404}


# Bytes of several transfers that are not the blob.


async def interrupt(registry, program: Program) -> str:
    """Stop the daemon when half of the blob has arrived, and change the bytes on the disk."""
    digest: str = registry.add_blob(BLOB)
    registry.fail(registry.body_of(digest), Fault(stall_at=2 * MIB, until=asyncio.Event()))
    async with program.opened(f"/v2/library/app/blobs/{digest}") as response:
        await response.content.readexactly(2 * MIB)
        response.close()
    await program.stop()
    path = program.root / "ingest" / digest.replace(":", "-")
    path.write_bytes(flip(path.read_bytes(), 3))
    registry.heal()
    await program.start()
    return digest


async def test_after_wrong_bytes_of_several_transfers_the_blob_is_fetched_in_a_single_one(
    registry, program
):
    digest = await interrupt(registry, program)
    hold = asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(stall_at=MIB, until=hold))
    async with program.opened(f"/v2/library/app/blobs/{digest}") as early:
        await early.content.readexactly(MIB)
        async with asyncio.TaskGroup() as group:
            # The client waits for the last byte, and has received none of the discarded bytes.
            last = group.create_task(program.blob(digest, Range="bytes=-1"))
            await asyncio.sleep(0.1)
            hold.set()
        _, is_whole = await read(early)
        assert not is_whole
    assert (last.result().status, last.result().body) == (206, BLOB[-1:])
    await program.wait_for_downloads()
    assert program.stored() == {digest}
    requests = registry.seen(registry.body_of(digest))
    assert [one.headers.get("Range") for one in requests[1:]] == ["bytes=2097152-", None]
    assert await program.metric("pullcache_digest_mismatches_total") == 1


async def test_a_blob_is_fetched_a_second_time_but_not_a_third_time(registry, program):
    digest = await interrupt(registry, program)
    registry.fail(registry.body_of(digest), Fault(flip_at=7), times=None)
    answer = await program.blob(digest, Range="bytes=-1")
    assert answer.status >= 400 or not answer.is_whole
    await program.wait_for_downloads()
    assert registry.count(registry.body_of(digest)) == 3
    assert program.stored() == set()


async def test_a_mirror_that_sends_wrong_first_bytes_costs_a_second_fetch_and_no_pull(
    registry, hostile, make_program
):
    program = await make_program(
        upstreams={"docker.io": {"url": registry.url, "mirrors": [hostile.url]}}
    )
    registry.add_blob(BLOB)
    hostile.fail(hostile.body_of(DIGEST), Fault(body=WRONG, cut_at=MIB))
    hostile.fail(hostile.body_of(DIGEST), Fault(status=404, body=b""), times=None)
    answer = await program.blob(DIGEST, Range="bytes=-1")
    assert (answer.status, answer.body) == (206, BLOB[-1:])
    await program.wait_for_downloads()
    assert program.stored() == {DIGEST}
