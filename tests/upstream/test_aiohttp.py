"""What `DirectReader` relies on in aiohttp beyond its documentation: a failure names what has moved.

`DirectReader` in `proxy/upstream/body.py` takes a connection from aiohttp for the time of a body, and gives
it back. These tests use aiohttp alone, so they fail only if aiohttp has changed.
"""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import ClientResponse, StreamReader
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection

from tests.fakes.raw_server import RawUpstream, RecvUntil, Reset, Send, Step, Wait

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"
READ_TIMEOUT = 0.1
STAY_OPEN = RecvUntil(b"never sent")


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(sock_read=READ_TIMEOUT)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield session


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (ClientResponse, ["connection", "content", "content_length"]),
        (Connection, ["protocol", "transport"]),
        (ResponseHandler, ["connection_lost", "pause_reading"]),
        (StreamReader, ["exception", "feed_eof", "is_eof", "read_nowait", "readany"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_aiohttp_has_the_attributes_that_the_reader_uses(owner: type, names: list[str]):
    # ClientResponse sets `content` in its instances.
    moved = [name for name in names if not hasattr(owner, name)]
    assert moved == [], f"{owner.__name__} of aiohttp {aiohttp.__version__} has no {moved}"


async def test_the_protocol_of_a_connection_is_the_one_that_its_transport_calls(session):
    async with (
        RawUpstream([RecvUntil(), Send(HEAD), STAY_OPEN]) as raw,
        session.get(raw.url) as response,
    ):
        assert response.connection.transport.get_protocol() is response.connection.protocol


async def test_bytes_that_arrived_with_the_head_can_be_taken_without_waiting(session):
    async with (
        RawUpstream([RecvUntil(), Send(HEAD + b"01234"), STAY_OPEN]) as raw,
        session.get(raw.url) as response,
    ):
        early = b"".join(iter(response.content.read_nowait, b""))
        assert early in (b"", b"01234")
        if not early:
            assert await response.content.readany() == b"01234"
        assert response.content.read_nowait() == b""


async def test_a_paused_protocol_has_no_read_timeout(session):
    async with (
        RawUpstream([RecvUntil(), Send(HEAD), STAY_OPEN]) as raw,
        session.get(raw.url) as response,
    ):
        response.connection.protocol.pause_reading()
        await asyncio.sleep(3 * READ_TIMEOUT)
        assert response.content.exception() is None


async def test_a_body_that_is_declared_ended_releases_its_connection_for_the_next_request(session):
    """The bytes are read by another protocol, so aiohttp's parser never sees them."""

    class Other(asyncio.Protocol):
        def __init__(self) -> None:
            self.received = b""
            self.has_all = asyncio.Event()

        def data_received(self, data: bytes) -> None:
            self.received += data
            if len(self.received) == 10:
                self.has_all.set()

    is_taken = asyncio.Event()
    script: list[Step] = [RecvUntil(), Send(HEAD), Wait(is_taken), Send(b"0123456789")]
    async with RawUpstream([*script, RecvUntil(), Send(HEAD + b"9876543210")]) as raw:
        async with session.get(raw.url) as response:
            protocol, transport = response.connection.protocol, response.connection.transport
            protocol.pause_reading()
            other = Other()
            transport.set_protocol(other)
            transport.resume_reading()
            is_taken.set()
            await other.has_all.wait()
            transport.pause_reading()
            transport.set_protocol(protocol)
            response.content.feed_eof()
            assert response.connection is None
        async with session.get(raw.url) as response:
            assert await response.read() == b"9876543210"
        assert raw.connections == 1


@pytest.mark.parametrize("end", [[], [Reset()]], ids=["fin", "reset"])
async def test_a_lost_connection_sets_the_exception_of_the_body(session, end):
    async with (
        RawUpstream([RecvUntil(), Send(HEAD), *end]) as raw,
        session.get(raw.url) as response,
    ):
        with pytest.raises(aiohttp.ClientError):
            await response.read()
        assert isinstance(response.content.exception(), aiohttp.ClientError)
