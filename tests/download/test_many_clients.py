"""Many simultaneous clients of one blob (faults E6 to E11; E9 is in `test_ranges`)."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.fakes.raw_client import RawClient
from tests.fakes.registry import FakeRegistry
from tests.support.program import Program, read

MIB = 1 << 20
BLOB = bytes(range(256)) * (8 * MIB // 256)


def target(digest: str) -> str:
    return f"/v2/library/app/blobs/{digest}"


async def test_e06_two_hundred_clients_of_one_missing_blob_cost_one_get(registry, program):
    digest = registry.add_blob(BLOB[:MIB])
    hold = asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(stall_at=MIB // 2, until=hold))
    waiting = 0

    async def client() -> tuple[str, bool]:
        nonlocal waiting
        async with program.opened(target(digest)) as response:
            waiting += 1
            if waiting == 200:
                hold.set()
            body, is_whole = await read(response)
            return digest_of(body), is_whole

    answers = await asyncio.gather(*(client() for _ in range(200)))
    assert set(answers) == {(digest, True)}
    assert registry.count(registry.body_of(digest)) == 1
    assert registry.bytes_sent(registry.body_of(digest)) == MIB
    assert registry.count("/token") == 1


async def test_e07_when_the_first_client_disconnects_the_others_get_the_whole_blob(
    registry, program
):
    digest = registry.add_blob(BLOB)
    hold = asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(stall_at=MIB, until=hold))
    first = await RawClient.connect(program.url)
    first.send(f"GET {target(digest)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await first.read(1000)
    async with program.opened(target(digest)) as response:
        begun = await response.content.readexactly(1000)
        await first.close()
        hold.set()
        rest, is_whole = await read(response)
    assert is_whole
    assert begun + rest == BLOB
    assert registry.bytes_sent(registry.body_of(digest)) == len(BLOB)


async def test_e08_the_slowest_of_ten_clients_delays_none_of_the_others(registry, program):
    content = bytes(32 * MIB)  # more than the socket buffers hold
    digest = registry.add_blob(content)
    slowest = await RawClient.connect(program.url, receive_buffer=4096)
    slowest.send(f"GET {target(digest)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await slowest.read(1)
    answers = await asyncio.gather(*(program.blob(digest) for _ in range(9)))
    assert {(answer.digest, answer.is_whole) for answer in answers} == {(digest, True)}
    # Its response continues at its own pace.
    await slowest.read(2000)
    await slowest.close()
    assert registry.bytes_sent(registry.body_of(digest)) == len(content)


@pytest.mark.parametrize("reset", [False, True])
async def test_e10_a_transfer_that_fails_near_its_end_is_resumed_once_for_all(
    registry, program, reset
):
    digest = registry.add_blob(BLOB)
    at = len(BLOB) * 9 // 10
    hold = asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(stall_at=at, until=hold, cut_at=at, reset=reset))

    async def client(number: int) -> bytes:
        async with program.opened(target(digest)) as response:
            begun: bytes = await response.content.readexactly(MIB)
            if number == 0:
                hold.set()
            rest, is_whole = await read(response)
            assert is_whole
            return begun + rest

    bodies = await asyncio.gather(*(client(number) for number in range(20)))
    assert {digest_of(body) for body in bodies} == {digest}
    assert registry.count(registry.body_of(digest)) == 2
    assert registry.bytes_sent(registry.body_of(digest)) < len(BLOB) + at // 2


@pytest.fixture
async def other() -> AsyncIterator[FakeRegistry]:
    """Another upstream, which is still empty."""
    async with FakeRegistry() as other:
        other.repository("library/app")
        yield other


@pytest.fixture
async def both(registry, other, make_program) -> Program:
    """The program with two upstreams."""
    program: Program = await make_program(upstreams={"other.test": {"url": other.url}})
    return program


THERE = "other.test/library/app"


async def test_e11_a_digest_of_two_upstreams_is_fetched_from_each_and_stored_once(
    registry, other, both
):
    digest = registry.add_blob(BLOB)
    other.add_blob(BLOB)
    hold = asyncio.Event()
    for one in (registry, other):
        one.fail(one.body_of(digest), Fault(stall_at=MIB, until=hold))
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(both.blob(digest, name)) for name in ("library/app", THERE)]
        for one in (registry, other):
            await one.until(lambda one=one: one.bytes_sent(one.body_of(digest)) >= MIB)
        hold.set()
    for task in asked:
        answer = task.result()
        assert (answer.status, answer.digest, answer.is_whole) == (200, digest, True)
    await both.wait_for_downloads()
    assert both.stored() == {digest}
    assert list((both.root / "ingest").iterdir()) == []
    size = await both.metric("pullcache_store_bytes")
    assert size == len(BLOB)


async def test_e11_a_blob_is_served_under_another_upstream_after_that_has_sent_it_too(
    registry, other, both
):
    digest = registry.add_blob(BLOB)
    other.add_blob(BLOB)
    for _ in range(2):
        for name in ("library/app", THERE):
            answer = await both.blob(digest, name)
            assert (answer.status, answer.digest) == (200, digest)
            await both.wait_for_downloads()
    assert other.bytes_sent(other.body_of(digest)) == len(BLOB)
    assert registry.bytes_sent(registry.body_of(digest)) == len(BLOB)
    assert await both.metric("pullcache_store_bytes") == len(BLOB)


async def test_e11_a_blob_is_not_served_to_clients_of_an_upstream_that_does_not_have_it(
    registry, other, both
):
    digest = registry.add_blob(BLOB)
    hold = asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(stall_at=MIB, until=hold))
    async with both.opened(target(digest)) as response:
        await response.content.readexactly(1000)
        assert (await both.blob(digest, THERE)).code == "BLOB_UNKNOWN"
        hold.set()
        await response.read()
    await both.wait_for_downloads()
    for method in ("GET", "HEAD"):
        assert (await both.blob(digest, THERE, method=method)).status == 404
        assert (await both.blob(digest, method=method)).status == 200


ANOTHER = "library/another"


async def test_a_request_in_a_repository_without_the_blob_does_not_affect_other_clients(
    registry, program
):
    digest = registry.add_blob(BLOB)
    registry.repository(ANOTHER)
    hold = asyncio.Event()
    registry.fail(f"GET /v2/{ANOTHER}/", Fault(until_headers=hold))
    async with asyncio.TaskGroup() as group:
        there = group.create_task(program.blob(digest, ANOTHER))
        await registry.until(lambda: registry.count(f"GET /v2/{ANOTHER}/") > 0)
        here = group.create_task(program.blob(digest))
        hold.set()
    assert there.result().code == "BLOB_UNKNOWN"
    answer = here.result()
    assert (answer.status, answer.digest, answer.is_whole) == (200, digest, True)


async def test_a_blob_that_arrives_while_another_repository_is_checked_is_not_fetched_again(
    registry, program
):
    digest = registry.add_blob(BLOB)
    registry.add_blob(BLOB, ANOTHER)
    came, proven = asyncio.Event(), asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(stall_at=MIB, until=came))
    registry.fail(f"GET /v2/{ANOTHER}/blobs", Fault(until_headers=proven))
    async with program.opened(target(digest)) as response:
        await response.content.readexactly(1000)
        async with asyncio.TaskGroup() as group:
            there = group.create_task(program.blob(digest, ANOTHER))
            await registry.until(lambda: registry.count(f"GET /v2/{ANOTHER}/blobs") > 0)
            came.set()
            await program.wait_for_downloads()
            proven.set()
    answer = there.result()
    assert (answer.status, answer.digest, answer.is_whole) == (200, digest, True)
    assert registry.bytes_sent(registry.body_of(digest)) == len(BLOB) + 1


@pytest.mark.parametrize("content", [b"", b"x", bytes(24 * MIB)], ids=["empty", "1", "too large"])
async def test_a_client_that_joins_another_repositorys_download_gets_the_whole_blob(
    registry, make_program, content
):
    program = await make_program(store={"max_size": "20MB"})
    digest = registry.add_blob(content)
    registry.add_blob(content, ANOTHER)
    hold = asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(until_headers=hold))
    async with asyncio.TaskGroup() as group:
        here = group.create_task(program.blob(digest))
        await registry.until(lambda: registry.count(registry.body_of(digest)) > 0)
        there = [group.create_task(program.blob(digest, ANOTHER)) for _ in range(3)]
        hold.set()
    for task in (here, *there):
        answer = task.result()
        assert (answer.status, answer.digest, answer.is_whole) == (200, digest, True)


async def test_e11_wrong_bytes_from_one_upstream_do_not_affect_clients_of_another(
    registry, other, both
):
    digest = registry.add_blob(BLOB)
    other.add_blob(BLOB)
    other.fail(other.body_of(digest), Fault(flip_at=5), times=None)
    for _ in range(3):
        assert (await both.blob(digest, THERE)).digest != digest
        await both.wait_for_downloads()
    answer = await both.blob(digest)
    assert (answer.status, answer.digest, answer.is_whole) == (200, digest, True)
