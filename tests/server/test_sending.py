"""Sending stored files and growing blobs: fairly to all clients and in the right order."""

import asyncio
import os

import pytest

from proxy.server import sendfile
from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.fakes.raw_client import RawClient, exchange

MIB = 1 << 20
BLOB = bytes(range(256)) * (6 * MIB // 256)


def get(target: str, *headers: str, version: str = "HTTP/1.1") -> bytes:
    lines = "".join(f"{line}\r\n" for line in headers)
    return f"GET {target} {version}\r\nHost: x\r\n{lines}\r\n".encode()


@pytest.fixture
async def blob(registry, program) -> str:
    """A blob in the store."""
    digest: str = registry.add_blob(BLOB)
    assert (await program.blob(digest)).is_whole
    await program.wait_for_downloads()
    return f"/v2/library/app/blobs/{digest}"


async def test_a_file_never_overtakes_earlier_responses(registry, program, blob):
    registry.pull_limit = None
    image = registry.add_image(index=True, platforms=[f"linux/p{n}" for n in range(99)])
    manifest = await program.manifest(image)
    ask = get("/v2/library/app/manifests/latest")

    async def answered(expected: int) -> int:
        """Wait until `expected` manifests were sent, or no more are; return their number."""
        seen, unchanged = -1.0, 0
        while unchanged < 50 and seen < expected:
            count = await program.metric("pullcache_requests_total", kind="manifest", status="200")
            unchanged = unchanged + 1 if count == seen else 0
            seen = count
        return int(seen)

    # How many responses fit into the buffers of a connection whose client does not read?
    peer = await RawClient.connect(program.url, receive_buffer=4096)
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    before = await answered(1)
    peer.send(ask * 2000)
    room = await answered(2000) - before
    await peer.close()
    assert 0 < room < 2000
    # So the headers of the file are sent when the buffers are almost full, full, or over the limit.
    for count in range(room - 2, room + 2):
        peer = await RawClient.connect(program.url, receive_buffer=4096)
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        before = await answered(1)
        peer.send(ask * count + get(blob) + get("/v2/", "Connection: close"))
        await answered(before + count)
        peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
        answer = await peer.read_to_end()
        await peer.close()
        rest = memoryview(answer.data)
        for body in [manifest.body] * count + [BLOB, b"{}"]:
            head = bytes(rest[:2000]).partition(b"\r\n\r\n")[0]
            assert head.startswith(b"HTTP/1.1 200 OK")
            rest = rest[len(head) + 4 :]
            assert rest[: len(body)] == body
            rest = rest[len(body) :]
        assert not rest


async def test_many_slow_clients_do_not_delay_a_fast_one(program, blob):
    slow = [await RawClient.connect(program.url, receive_buffer=4096) for _ in range(50)]
    for peer in slow:
        peer.send(get(blob))
        await peer.read(10)
    async with asyncio.timeout(5):
        assert (await program.ask(blob)).body == BLOB
        assert (await program.ask("/v2/")).status == 200
    answers = [await slow[n].read_response() for n in (0, 49)]
    assert {digest_of(answer.body) for answer in answers} == {digest_of(BLOB)}
    for peer in slow:
        await peer.close()


async def test_a_blob_that_is_not_in_memory_is_read_from_the_disk(program, blob):
    path = program.root / "blobs" / "sha256" / blob.rpartition(":")[2]
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    assert (await program.ask(blob)).body == BLOB


async def test_c21_clients_of_http_1_0_get_a_hit_a_miss_and_a_miss_of_unknown_length(
    registry, program, blob
):
    registry.edge.send_length = False
    unsized = registry.add_blob(b"unsized" * 1000)
    registry.edge.send_length = True
    sized = registry.add_blob(b"sized" * 1000)
    for target, expected in [
        (blob, BLOB),
        (f"/v2/library/app/blobs/{sized}", b"sized" * 1000),
    ]:
        answer = await exchange(program.url, get(target, version="HTTP/1.0"))
        assert (answer.status, answer.body) == (200, expected)
    registry.edge.send_length = False
    peer = await RawClient.connect(program.url)
    peer.send(get(f"/v2/library/app/blobs/{unsized}", version="HTTP/1.0"))
    answer = await peer.read_to_end()
    await peer.close()
    assert (answer.status, answer.body) == (200, b"unsized" * 1000)


@pytest.mark.parametrize("how", ["hit", "growing", "unsized", "passed through"])
async def test_c03_a_client_that_reads_nothing_is_dropped(registry, make_program, monkeypatch, how):
    monkeypatch.setattr(sendfile, "STALL_TIMEOUT", 0.3)
    cap = "20MB" if how == "passed through" else "1GB"
    program = await make_program(store={"max_size": cap})
    digest = registry.add_blob(bytes(30 * MIB))
    if how == "hit":
        await program.blob(digest)
        await program.wait_for_downloads()
    if how == "unsized":
        registry.edge.send_length = False
    peer = await RawClient.connect(program.url, receive_buffer=4096)
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    peer.send(get(f"/v2/library/app/blobs/{digest}"))
    async with asyncio.timeout(10):
        while not await program.metric("pullcache_requests_total", kind="blob", status="499"):
            pass
    await peer.close()
    assert await program.metric("pullcache_internal_errors_total") == 0


async def test_a_client_that_disconnects_from_a_stalled_download_is_released_at_once(
    registry, program
):
    digest = registry.add_blob(BLOB)
    registry.fail(registry.body_of(digest), Fault(stall_at=MIB, until=asyncio.Event()))
    peer = await RawClient.connect(program.url)
    peer.send(get(f"/v2/library/app/blobs/{digest}"))
    await peer.read(MIB // 2)
    await peer.close()
    async with asyncio.timeout(1):
        while not await program.metric("pullcache_requests_total", kind="blob", status="499"):
            pass


async def test_a_file_that_shrinks_while_it_is_sent_ends_the_body_early(program, blob):
    peer = await RawClient.connect(program.url, receive_buffer=4096)
    peer.send(get(blob))
    await peer.read(1000)
    os.truncate(program.root / "blobs" / "sha256" / blob.rpartition(":")[2], 5 * MIB)
    answer = await peer.read_to_end()
    await peer.close()
    assert answer.end == "fin"
    assert len(answer.body) <= 5 * MIB
    assert BLOB.startswith(answer.body)
