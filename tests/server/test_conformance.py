"""RFC 9112 as a table: thousands of requests, whole and in pieces, with the expected outcome."""

import asyncio
import random
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from proxy.server.http import HttpConnection, HttpServer
from proxy.server.request import Request
from proxy.server.responses import Response
from tests.fakes.requests import SECOND, generate


class Transport:
    """Collects the bytes that a connection sends."""

    def __init__(self) -> None:
        self.sent = b""
        self.is_closed = False

    def get_extra_info(self, name: str) -> Any:
        return ("192.0.2.1", 1) if name == "peername" else None

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.sent += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.is_closed = True

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


@pytest.fixture
async def server() -> AsyncIterator[HttpServer]:
    def handler(request: Request) -> Response:
        return Response(200, {"X-Path": request.path})

    with ThreadPoolExecutor(1) as threads:
        async with asyncio.TaskGroup() as group:
            yield HttpServer(handler, threads, group)


def exchange(server: HttpServer, pieces: list[bytes]) -> tuple[list[int], list[bytes], bool]:
    """Return the statuses and paths of the responses, and whether the connection was closed."""
    transport = Transport()
    connection: HttpConnection = server()
    connection.connection_made(transport)  # type: ignore[arg-type]
    for piece in pieces:
        if not transport.is_closed:
            connection.data_received(piece)
    connection.connection_lost(None)
    heads = [one for one in transport.sent.split(b"HTTP/1.1 ") if one]
    statuses = [int(head[:3]) for head in heads]
    paths = [head.partition(b"X-Path: ")[2].partition(b"\r\n")[0] for head in heads]
    return statuses, paths, transport.is_closed


def split(data: bytes, chance: random.Random) -> list[bytes]:
    cuts = sorted(chance.sample(range(1, len(data)), 3))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


async def test_every_request_has_the_outcome_of_the_specification(server):
    requests = list(generate())
    assert len(requests) > 10_000
    # As many as a busy machine checks in a few seconds; each run generates other ones.
    for request in random.sample(requests, 4000):
        statuses, paths, is_closed = exchange(server, [request.data + SECOND])
        assert is_closed, request
        if request.outcome == "refuse":
            # An error in the body is found after the head was parsed and before the request is
            # answered.
            assert len(statuses) == 1, request
            assert 400 <= statuses[0] < 500, request
        else:
            expected = [b"/v2/", b"/second"] if request.outcome == "keep" else [b"/v2/"]
            assert (paths, set(statuses)) == (expected, {200}), request


async def test_the_outcome_does_not_depend_on_how_a_request_is_split(server):
    chance = random.Random(9112)
    for request in chance.sample(list(generate()), 200):
        data = request.data + SECOND
        whole = exchange(server, [data])
        assert exchange(server, split(data, chance)) == whole, request
        assert exchange(server, [bytes([one]) for one in data]) == whole, request
