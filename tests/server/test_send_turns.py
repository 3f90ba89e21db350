"""Turns: how much all connections together send before the event loop serves others."""

import asyncio
import os
import socket
from collections import deque
from typing import Any

import pytest

from proxy.server import send_turns, sendfile
from proxy.server.send_turns import SendTurns
from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.fakes.raw_client import RawClient
from tests.server.test_http import request

MIB = 1 << 20
BLOB = bytes(range(256)) * (6 * MIB // 256)
TURN_SIZE, SEND_SIZE = 256 << 10, 64 << 10
CLIENTS = 40


class BytesPerTurn:
    """Counts the bytes sent in each turn of the event loop."""

    def __init__(self) -> None:
        self.most = 0
        self._current = 0

    def add(self, count: int) -> int:
        if not self._current:
            asyncio.get_running_loop().call_soon(self._end)
        self._current += count
        return count

    def _end(self) -> None:
        self.most = max(self.most, self._current)
        self._current = 0


@pytest.fixture
def per_turn(monkeypatch: pytest.MonkeyPatch) -> BytesPerTurn:
    counted = BytesPerTurn()
    kernel_sendfile = os.sendfile

    class Counting(socket.socket):
        def send(self, data: Any, flags: int = 0) -> int:
            return counted.add(super().send(data, flags))

    def duplicate(transport: asyncio.Transport) -> socket.socket:
        own = transport.get_extra_info("socket")
        copy = Counting(own.family, own.type, own.proto, fileno=os.dup(own.fileno()))
        copy.setblocking(False)
        return copy

    def count_sendfile(*args: int) -> int:
        sent = kernel_sendfile(*args)
        counted.add(sent // send_turns.SENDFILE_SPEEDUP)
        return sent

    monkeypatch.setattr(os, "sendfile", count_sendfile)
    monkeypatch.setattr(sendfile, "duplicate_socket", duplicate)
    monkeypatch.setattr(sendfile, "SEND_SIZE", SEND_SIZE)
    monkeypatch.setattr(send_turns, "TURN_SIZE", TURN_SIZE)
    return counted


async def request_from_many(program, path: str) -> list[RawClient]:
    clients = [await RawClient.connect(program.url) for _ in range(CLIENTS)]
    for client in clients:
        client.send(request(path))
    return clients


@pytest.mark.parametrize("kind", ["stored", "growing"])
async def test_all_connections_together_send_a_bounded_number_of_bytes_in_a_turn(
    per_turn, registry, program, kind
):
    digest = registry.add_blob(BLOB)
    path = f"/v2/library/app/blobs/{digest}"
    proceed = asyncio.Event()
    if kind == "stored":
        assert (await program.blob(digest)).is_whole
        await program.wait_for_downloads()
    else:
        registry.fail(registry.body_of(digest), Fault(stall_at=MIB, until=proceed))
    clients = await request_from_many(program, path)
    for client in clients:
        await client.read(10)
    proceed.set()
    for client in clients:
        assert digest_of((await client.read_response()).body) == digest
        await client.close()
    # One turn may give the bytes of the next one too.
    assert SEND_SIZE <= per_turn.most <= 2 * (TURN_SIZE + SEND_SIZE)


async def test_responses_that_wait_for_their_turn_come_in_order_and_whole(
    per_turn, registry, program, monkeypatch
):
    monkeypatch.setattr(sendfile, "SEND_SIZE", TURN_SIZE)
    sizes = [100 << 10, 150 << 10, 70 << 10]
    digests = [registry.add_blob(BLOB[:size]) for size in sizes]
    for digest in digests:
        assert (await program.blob(digest)).is_whole
    await program.wait_for_downloads()
    requests = b"".join(request(f"/v2/library/app/blobs/{digest}") for digest in digests)
    clients = [await RawClient.connect(program.url) for _ in range(CLIENTS)]
    for client in clients:
        client.send(requests + request("/v2/", "Connection: close"))
    for leaving in clients[::4]:
        leaving.writer.transport.abort()
    for client in clients[1::4] + clients[2::4]:
        rest = (await client.read_to_end()).data
        for size in sizes:
            _, _, rest = rest.partition(b"\r\n\r\n")
            assert rest[:size] == BLOB[:size]
            rest = rest[size:]
        assert rest.endswith(b"\r\n\r\n{}")
    assert 0 < per_turn.most <= 2 * (TURN_SIZE + max(sizes))
    for client in clients:
        await client.close()
    async with asyncio.timeout(10):
        while program.running.middleware.in_flight:
            await program.ask("/v2/")


async def test_turns_are_given_in_the_order_in_which_they_were_asked_for(monkeypatch):
    monkeypatch.setattr(send_turns, "TURN_SIZE", 2 * send_turns.MIN_COST)
    turns, order = SendTurns(), list[int]()

    async def send(number: int) -> None:
        await turns.take(1)
        order.append(number)

    async with asyncio.TaskGroup() as group:
        tasks = deque(group.create_task(send(number)) for number in range(10))
        await asyncio.sleep(0)
        assert order == [0, 1]
        tasks[5].cancel()
    assert order == [0, 1, 2, 3, 4, 6, 7, 8, 9]
