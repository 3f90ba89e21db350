"""The bytes of a blob arrive as they were sent, and their connection is used again."""

import asyncio
import random
import ssl
from pathlib import Path

import pytest
import trustme

from proxy.errors import UpstreamUnavailableError
from proxy.oci.digest import Digest
from proxy.upstream.body import BATCH_SIZE
from proxy.upstream.client import Upstream
from tests.fakes.raw_server import HEAD_END, RawUpstream, RecvUntil, Reset, Send
from tests.fakes.registry import FakeRegistry

BUFFER_SIZE = 1 << 20
BLOB = random.Random(3).randbytes(5 * BUFFER_SIZE + 12_345)
DIGEST = Digest.from_content(BLOB)


async def received(upstream: Upstream, digest: Digest, into: bytearray) -> None:
    async with upstream.open_blob("library/app", digest) as transfer:
        buffer = memoryview(bytearray(BUFFER_SIZE))
        while count := await transfer.read_into(buffer):
            into += buffer[:count]


@pytest.fixture(params=["plain", "tls"])
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ssl.SSLContext, ...] | None:
    """What upstream presents, and what trusts it."""
    if request.param == "plain":
        return None
    authority = trustme.CA()
    presented = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(presented)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    return presented, trusting


async def test_a_large_body_comes_whole_and_its_connection_is_used_again(connect, tls):
    presented, trusting = tls or (None, None)
    async with FakeRegistry(tls=presented) as registry:
        digest = registry.add_blob(BLOB)
        upstream = await connect(registry.url, tls=trusting)
        for _ in range(3):
            body = bytearray()
            await received(upstream, DIGEST, body)
            assert body == BLOB
        bodies = registry.seen(registry.body_of(digest))
        assert len(bodies) == 3
        assert len({seen.peer for seen in bodies}) == 1


@pytest.mark.parametrize("extra", [b"", b"what follows belongs to nobody"])
async def test_a_body_ends_where_its_length_says(connect, extra):
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(BLOB)}\r\n".encode() + HEAD_END[2:]
    async with RawUpstream([RecvUntil(), Send(head), Send(BLOB + extra)]) as raw:
        body = bytearray()
        await received(await connect(raw.url), DIGEST, body)
        assert body == BLOB


async def test_the_first_bytes_go_on_before_a_batch_is_in(connect):
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(BLOB)}\r\n".encode() + HEAD_END[2:]
    async with RawUpstream([RecvUntil(), Send(head + BLOB[:1000])]) as raw:
        upstream = await connect(raw.url)
        async with upstream.open_blob("library/app", DIGEST) as transfer:
            buffer = memoryview(bytearray(BUFFER_SIZE))
            async with asyncio.timeout(5):
                count = await transfer.read_into(buffer)
    assert buffer[:count] == BLOB[:1000]


async def test_later_bytes_come_in_batches(connect):
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(BLOB)}\r\n".encode() + HEAD_END[2:]
    async with RawUpstream([RecvUntil(), Send(head + BLOB)]) as raw:
        upstream = await connect(raw.url)
        async with upstream.open_blob("library/app", DIGEST) as transfer:
            buffer = memoryview(bytearray(BUFFER_SIZE))
            sizes = []
            while count := await transfer.read_into(buffer):
                sizes.append(count)
    assert sum(sizes) == len(BLOB)
    assert len(sizes) < 2 * len(BLOB) // BATCH_SIZE


@pytest.mark.parametrize("length", [0, 1, 1000])
async def test_a_body_that_came_whole_with_its_head_is_whole(connect, length):
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n".encode() + HEAD_END[2:]
    async with RawUpstream([RecvUntil(), Send(head + BLOB[:length])]) as raw:
        body = bytearray()
        await received(await connect(raw.url), DIGEST, body)
        assert body == BLOB[:length]


async def test_a_body_in_chunks_of_a_byte_comes_whole(connect):
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BLOB[:100_000])
    async with RawUpstream([RecvUntil(), Send(head), Send(chunks + b"0\r\n\r\n")]) as raw:
        body = bytearray()
        await received(await connect(raw.url), DIGEST, body)
        assert body == BLOB[:100_000]


@pytest.mark.parametrize("length", [1, BUFFER_SIZE - 1, BUFFER_SIZE, 3 * BUFFER_SIZE + 1])
@pytest.mark.parametrize("end", [[], [Reset()]], ids=["fin", "reset"])
async def test_what_arrived_before_a_break_is_there(connect, length, end):
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(BLOB)}\r\n\r\n".encode()
    async with RawUpstream([RecvUntil(), Send(head), Send(BLOB[:length]), *end]) as raw:
        body = bytearray()
        with pytest.raises(UpstreamUnavailableError):
            await received(await connect(raw.url), DIGEST, body)
        # A reset may overtake what the kernel holds.
        assert BLOB.startswith(body)
        assert end or len(body) == length


async def test_a_body_that_came_whole_disturbs_none_that_follows_on_its_connection(connect):
    """aiohttp resumes reading whenever bytes are taken from it, also for an earlier body."""
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwhole"
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(BLOB)}\r\n\r\n".encode()
    async with RawUpstream([RecvUntil(), Send(whole), RecvUntil(), Send(head), Send(BLOB)]) as raw:
        upstream = await connect(raw.url)
        async with (
            upstream.open_blob("library/app", Digest.from_content(b"whole")) as first,
            upstream.open_blob("library/app", DIGEST) as second,
        ):
            buffer = memoryview(bytearray(64 << 10))
            body = bytearray(buffer[: await second.read_into(buffer)])
            await asyncio.sleep(0.1)  # what follows fills the socket
            small = memoryview(bytearray(10))
            assert bytes(small[: await first.read_into(small)]) == b"whole"
            await asyncio.sleep(0.1)
            while count := await second.read_into(buffer):
                body += buffer[:count]
        assert body == BLOB
        assert raw.connections == 1
