"""Fairness: client addresses take turns, and the waiting downloads of each are limited."""

import asyncio
import time

import aiohttp
import pytest

from tests.fakes.faults import Fault
from tests.support.program import Program

GREEDY = "127.0.0.2"


def absent(number: int) -> str:
    return f"sha256:{number:064x}"


class AddressedClient:
    """A client with its own address."""

    def __init__(self, program: Program, address: str) -> None:
        self._program = program
        connector = aiohttp.TCPConnector(limit=0, local_addr=(address, 0))
        self.session = aiohttp.ClientSession(connector=connector)

    async def status(self, digest: str) -> int:
        url = f"{self._program.url}/v2/library/app/blobs/{digest}"
        async with self.session.get(url) as response:
            await response.read()
            return response.status


@pytest.fixture(autouse=True)
def short_delay(monkeypatch):
    monkeypatch.setattr("proxy.cache.blobs.REFUSAL_DELAY", 0.05)


@pytest.fixture
async def greedy(program):
    """A client that requests blobs that do not exist."""
    client = AddressedClient(program, GREEDY)
    yield client
    await client.session.close()


async def test_slow_answers_about_missing_blobs_delay_no_other_client(registry, program, greedy):
    digest = registry.add_blob(b"healthy" * 10_000)
    hold = asyncio.Event()
    registry.fail("blobs/sha256:0000", Fault(until_headers=hold), times=None)
    async with asyncio.TaskGroup() as group:
        flood = [group.create_task(greedy.status(absent(n))) for n in range(60)]
        await registry.until(lambda: registry.count("blobs/sha256:0000") >= 16)
        async with asyncio.timeout(5):
            assert (await program.blob(digest)).digest == digest
        hold.set()
    assert {task.result() for task in flood} == {404}


async def test_the_waiting_downloads_of_one_address_are_limited(registry, make_program):
    program = await make_program(fetch={"max_waiting_per_client": 10})
    client = AddressedClient(program, GREEDY)
    digest = registry.add_blob(b"healthy" * 10_000)
    hold = asyncio.Event()
    registry.fail("blobs/sha256:0000", Fault(until_headers=hold), times=None)
    async with asyncio.TaskGroup() as group:
        flood = [group.create_task(client.status(absent(n))) for n in range(30)]
        refused = asyncio.as_completed(flood, timeout=5)
        assert [await next(refused) for _ in range(20)] == [429] * 20
        async with client.session.get(
            f"{program.url}/v2/library/app/blobs/{absent(99)}"
        ) as response:
            assert response.status == 429
            assert int(response.headers["Retry-After"]) > 0
            assert "max_waiting_per_client" in await response.text()
        # The client joins a running download, and one that another client has requested.
        waiting = next(number for number, one in enumerate(flood) if not one.done())
        joined = group.create_task(client.status(absent(waiting)))
        assert (await program.blob(digest)).digest == digest
        hold.set()
    assert joined.result() == 404
    assert sorted(task.result() for task in flood) == [404] * 10 + [429] * 20
    await client.session.close()


async def test_a_download_that_two_clients_wait_for_counts_for_neither(registry, make_program):
    program = await make_program(fetch={"max_waiting_per_client": 2})
    client = AddressedClient(program, GREEDY)
    hold = asyncio.Event()
    registry.fail("blobs/sha256:0000", Fault(until_headers=hold), times=None)
    async with asyncio.TaskGroup() as group:
        first = [group.create_task(client.status(absent(n))) for n in range(2)]
        await registry.until(lambda: registry.count("blobs/sha256:0000") >= 2)
        assert await client.status(absent(2)) == 429
        group.create_task(program.blob(absent(0)))
        late = group.create_task(_status_once_accepted(client, absent(2)))
        await registry.until(lambda: registry.count(absent(2)) > 0)
        hold.set()
    assert [task.result() for task in (*first, late)] == [404] * 3
    await client.session.close()


async def _status_once_accepted(client: AddressedClient, digest: str) -> int:
    """Repeat a request until it is not refused, because the other client's request has arrived."""
    while (status := await client.status(digest)) == 429:
        pass
    return status


async def test_an_absent_blob_is_asked_for_once_in_a_few_seconds(monkeypatch, registry, program):
    registry.repository("library/app")
    monkeypatch.setattr("proxy.download.manager.ABSENT_TTL", 60.0)
    assert [(await program.blob(absent(1))).status for _ in range(5)] == [404] * 5
    assert registry.count(absent(1)) <= 2  # the first request gets a 401
    monkeypatch.setattr("proxy.download.manager.ABSENT_TTL", 0.0)
    before = registry.count(absent(1))
    assert (await program.blob(absent(1))).status == 404
    assert registry.count(absent(1)) > before


async def test_one_address_may_ask_for_only_so_many_absent_blobs_in_a_second(
    monkeypatch, registry, make_program
):
    registry.repository("library/app")
    monkeypatch.setattr("proxy.download.manager.ABSENT_HOLD", 60.0)
    program = await make_program(fetch={"max_waiting_per_client": 5})
    client = AddressedClient(program, GREEDY)
    assert [await client.status(absent(n)) for n in range(4)] == [404] * 4
    # Also one that is remembered as absent, for which upstream is not asked.
    assert [await client.status(absent(n)) for n in (0, 0, 4)] == [404, 429, 429]
    digest = registry.add_blob(b"healthy" * 10_000)
    assert (await program.blob(digest)).digest == digest
    await client.session.close()


async def test_absent_blobs_count_only_for_a_while(monkeypatch, registry, make_program):
    registry.repository("library/app")
    monkeypatch.setattr("proxy.download.manager.ABSENT_HOLD", 0.05)
    program = await make_program(fetch={"max_waiting_per_client": 1})
    assert (await program.blob(absent(0))).status == 404
    async with asyncio.timeout(5):
        while (await program.blob(absent(1))).status == 429:
            pass


async def test_a_refusal_is_delayed(monkeypatch, registry, make_program):
    registry.repository("library/app")
    monkeypatch.setattr("proxy.download.manager.ABSENT_HOLD", 60.0)
    monkeypatch.setattr("proxy.cache.blobs.REFUSAL_DELAY", 0.2)
    program = await make_program(fetch={"max_waiting_per_client": 1})
    assert (await program.blob(absent(0))).status == 404
    began = time.monotonic()
    assert (await program.blob(absent(1))).status == 429
    assert time.monotonic() - began >= 0.1


@pytest.mark.parametrize("status", [500, 403])
async def test_only_a_404_is_remembered(registry, program, status):
    digest = registry.add_blob(b"there after all")
    registry.fail(registry.body_of(digest), Fault(status=status, body=b""), times=10)
    assert (await program.blob(digest)).status == 404
    registry.heal()
    await program.wait_for_upstream()
    assert (await program.blob(digest)).digest == digest


async def test_a_blob_missing_in_one_repository_may_exist_in_another(registry, program):
    digest = registry.add_blob(b"elsewhere", "library/other")
    assert (await program.blob(digest)).status == 404
    assert (await program.blob(digest, "library/other")).digest == digest


async def test_a_client_with_one_blob_does_not_wait_for_all_blobs_of_another(
    registry, make_program
):
    program = await make_program(fetch={"max_downloads": 2})
    client = AddressedClient(program, GREEDY)
    registry.throttle(200_000)
    many = [registry.add_blob(bytes([n]) * 60_000) for n in range(30)]
    one = registry.add_blob(b"x" * 60_000)
    async with asyncio.TaskGroup() as group:
        flood = [group.create_task(client.status(digest)) for digest in many]
        await registry.until(lambda: registry.bytes_sent() >= 60_000)
        before = sum(task.done() for task in flood)
        assert (await program.blob(one)).digest == one
        after = sum(task.done() for task in flood)
        assert after - before < (len(flood) - before) / 2
    await client.session.close()
