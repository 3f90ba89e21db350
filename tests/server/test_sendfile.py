"""Stored blobs: sent by the kernel, completely or cut short, on connections that are kept."""

import asyncio
import errno
import gc
import os
import re
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from proxy.server import sendfile
from proxy.server.http import HttpConnection
from proxy.server.registry.blobs import INLINE_BLOB_SIZE
from tests.fakes.content import digest_of
from tests.fakes.raw_client import RawClient
from tests.server.test_http import LATEST, TIMES, request

MIB = 1 << 20
LARGE = bytes(range(256)) * (8 * MIB // 256)
SIZES = [0, 1, 4096, INLINE_BLOB_SIZE, INLINE_BLOB_SIZE + 1, 8 * MIB]


@pytest.fixture
async def stored(registry, program) -> dict[int, str]:
    """Paths of blobs in the store, by size."""
    paths = {}
    for size in SIZES:
        digest = registry.add_blob(LARGE[:size])
        assert (await program.blob(digest)).is_whole
        paths[size] = f"/v2/library/app/blobs/{digest}"
    await program.wait_for_downloads()
    return paths


def get(path: str) -> bytes:
    return request(path, "User-Agent: fleet")


@pytest.mark.parametrize("size", SIZES)
async def test_responses_are_the_same_byte_for_byte(program, stored, size):
    answers = []
    for _ in range(3):
        peer = await RawClient.connect(program.url)
        peer.send(get(stored[size]))
        answers.append((await peer.read_response()).data)
        await peer.close()
    assert answers[0].endswith(b"\r\n\r\n" + LARGE[:size])
    assert len({TIMES.sub(b"", answer) for answer in answers}) == 1
    assert {len(TIMES.findall(answer)) for answer in answers} == {1}


async def test_a_request_pipelined_after_a_blob_is_answered_after_it(program, stored):
    path = stored[8 * MIB]
    peer = await RawClient.connect(program.url)
    last = request("/v2/", "Connection: close")
    peer.send(get(path))
    peer.send(get(path) + request("/v2/"))
    peer.send(get(path)[:30])
    peer.send(get(path)[30:])
    peer.send(b"".join([get(stored[4096])] * 2000))
    peer.send(last)
    answer = await peer.read_to_end()
    rest = answer.data
    bodies = [LARGE, LARGE, b"{}", LARGE, *[LARGE[:4096]] * 2000, b"{}"]
    for body in bodies:
        head, _, rest = rest.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK")
        assert rest.startswith(body)
        rest = rest[len(body) :]
    assert not rest
    assert answer.end == "fin"


async def test_a_request_that_arrives_with_its_connection_is_answered(program, stored):
    path = stored[4096]
    url = urlsplit(program.url)
    # The loop does not run between these two calls, so it sees connection and request together.
    with socket.create_connection((url.hostname, url.port)) as client:
        client.sendall(get(path))
        answer = b""
        async with asyncio.timeout(10):
            while not answer.endswith(LARGE[:4096]):
                answer += await asyncio.to_thread(client.recv, 8192)
        client.sendall(request("/v2/", "Connection: close"))
        answer = b""
        async with asyncio.timeout(10):
            while piece := await asyncio.to_thread(client.recv, 8192):
                answer += piece
    assert answer.endswith(b"{}")


@pytest.mark.parametrize("is_cached", [True, False])
async def test_a_client_that_disconnects_frees_everything(monkeypatch, program, stored, is_cached):
    monkeypatch.setattr(sendfile, "is_resident", lambda *_: is_cached)
    path = stored[8 * MIB]
    middleware = program.running.middleware
    for _ in range(5):
        peer = await RawClient.connect(program.url, receive_buffer=4096)
        peer.send(get(path))
        await peer.read(100)
        assert middleware.in_flight == 1
        await peer.close()
        async with asyncio.timeout(10):
            while middleware.in_flight:  # noqa: ASYNC110 (the event is the middleware's)
                await asyncio.sleep(0)
    status = {"kind": "blob", "cache": "hit", "status": "499"}
    assert await program.metric("pullcache_requests_total", **status) == 5


async def test_a_client_that_reads_nothing_is_dropped(monkeypatch, program, stored):
    path = stored[8 * MIB]
    monkeypatch.setattr(sendfile, "STALL_TIMEOUT", 0.2)
    peer = await RawClient.connect(program.url, receive_buffer=4096)
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    peer.send(get(path))
    async with asyncio.timeout(10):
        while not await program.metric("pullcache_requests_total", kind="blob", status="499"):
            pass
    peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
    answer = await peer.read_to_end()
    assert len(answer.body) < len(LARGE)


async def test_a_file_that_shrank_is_sent_incomplete_and_not_served_again(program, stored):
    path = stored[8 * MIB]
    peer = await RawClient.connect(program.url)
    await peer.close()
    peer = await RawClient.connect(program.url, receive_buffer=4096)
    peer.send(get(path))
    await peer.read(100)
    file = next((program.root / "blobs" / "sha256").glob(digest_of(LARGE).partition(":")[2]))
    with file.open("r+b") as opened:
        opened.truncate(7 * MIB)
    answer = await peer.read_to_end()
    assert (answer.end, len(answer.body)) == ("fin", 7 * MIB)
    # With another size, the file is no longer a blob of the store.
    again = await program.ask(path)
    assert (again.status, again.digest) == (200, digest_of(LARGE))


async def test_a_blob_that_is_not_in_memory_is_sent_by_a_thread(monkeypatch, program, stored):
    parts = []
    kernel_sendfile = os.sendfile

    def sending(out: int, fd: int, offset: int, count: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        sent = kernel_sendfile(out, fd, offset, count)
        parts.append((offset, count, sent))
        return sent

    peer = await RawClient.connect(program.url)
    monkeypatch.setattr(sendfile, "is_resident", lambda *_: False)
    monkeypatch.setattr(sendfile, "READAHEAD_SIZE", 2 * MIB)
    monkeypatch.setattr(os, "sendfile", sending)
    peer.send(get(stored[8 * MIB]))
    assert (await peer.read_response()).body == LARGE
    assert parts[0][:2] == (0, 2 * MIB)
    assert all(count <= 2 * MIB for _, count, _ in parts)
    assert sum(sent for *_, sent in parts) == 8 * MIB


@pytest.mark.parametrize("lacking", [0, 8 * MIB - 1])
async def test_a_blob_that_is_partly_in_memory_is_sent_by_a_thread_too(
    monkeypatch, program, stored, lacking
):
    sent = []
    is_resident, send = sendfile.is_resident, sendfile._send_from_disk

    def sending(connection: int, file: int, offset: int, count: int) -> int:
        sent.append((offset, count))
        return send(connection, file, offset, count)

    peer = await RawClient.connect(program.url)
    monkeypatch.setattr(
        sendfile, "is_resident", lambda fd, offset: offset != lacking and is_resident(fd, offset)
    )
    monkeypatch.setattr(sendfile, "_send_from_disk", sending)
    peer.send(get(stored[8 * MIB]))
    assert (await peer.read_response()).body == LARGE
    assert sent[0] == (0, 8 * MIB)


@pytest.mark.parametrize("number", [errno.EIO, errno.EUCLEAN])
@pytest.mark.parametrize("is_cached", [True, False])
async def test_a_disk_error_cuts_the_body_short(monkeypatch, program, stored, is_cached, number):
    monkeypatch.setattr(sendfile, "is_resident", lambda *_: is_cached)
    path = stored[8 * MIB]
    peer = await RawClient.connect(program.url)
    kernel_sendfile = os.sendfile

    def broken(out: int, fd: int, offset: int, count: int) -> int:
        if offset >= 4 * MIB:
            raise OSError(number, "the disk fails")
        return kernel_sendfile(out, fd, offset, min(count, 4 * MIB - offset))

    monkeypatch.setattr(os, "sendfile", broken)
    peer.send(get(path))
    answer = await peer.read_to_end()
    assert (answer.end, answer.body) == ("fin", LARGE[: 4 * MIB])
    monkeypatch.undo()
    status = {"kind": "blob", "status": "502"}
    assert await program.metric("pullcache_requests_total", **status) == 1


async def test_without_a_free_descriptor_the_transport_sends_the_blob(monkeypatch, program, stored):
    path = stored[8 * MIB]
    peer = await RawClient.connect(program.url)

    def exhausted(fd: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "dup", exhausted)
    peer.send(get(path))
    assert (await peer.read_response()).body == LARGE


async def test_a_head_that_the_kernel_accepts_in_parts_is_complete_before_the_blob(
    monkeypatch, program, stored
):
    class Short(socket.socket):
        def send(self, data: Any, flags: int = 0) -> int:
            return super().send(data[:100], flags)

    def duplicate(transport: asyncio.Transport) -> socket.socket:
        own = transport.get_extra_info("socket")
        copy = Short(own.family, own.type, own.proto, fileno=os.dup(own.fileno()))
        copy.setblocking(False)
        return copy

    path = stored[8 * MIB]
    peer = await RawClient.connect(program.url)
    monkeypatch.setattr(sendfile, "duplicate_socket", duplicate)
    peer.send(get(path))
    answer = await peer.read_response()
    assert (answer.status, answer.body) == (200, LARGE)


async def test_segments_are_full_until_the_last_one_which_is_sent_at_once(
    monkeypatch, program, stored
):
    sent_on: list[socket.socket] = []
    real = sendfile.duplicate_socket

    def duplicate(transport: asyncio.Transport) -> socket.socket:
        sent_on.append(transport.get_extra_info("socket"))
        return real(transport)

    def is_corked() -> int:
        return sent_on[-1].getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK)

    path = stored[8 * MIB]
    peer = await RawClient.connect(program.url)
    monkeypatch.setattr(sendfile, "duplicate_socket", duplicate)
    peer.send(get(path))
    await peer.read(100)
    assert is_corked()
    assert (await peer.read_response()).body == LARGE
    assert not is_corked()


def count_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_an_exception_in_a_handler_is_500_and_frees_everything(monkeypatch, program, stored):
    def broken(*args: Any) -> Any:
        raise RuntimeError("a bug")

    for name in ("blob_headers", "hit_headers"):
        monkeypatch.setattr(f"proxy.server.registry.blobs.{name}", broken)
    descriptors = count_descriptors()
    for path in [stored[4096], stored[8 * MIB]] * 2:
        peer = await RawClient.connect(program.url)
        peer.send(get(path))
        answer = await peer.read_response()
        assert (answer.status, b"see the daemon's log" in answer.body) == (500, True)
        await peer.close()
        program.expected_internal_errors += 1
    assert program.running.middleware.in_flight == 0
    await program.ask("/v2/")
    assert count_descriptors() <= descriptors + 1


@pytest.mark.parametrize("end", ["after the body", "during the body", "by the server"])
async def test_the_descriptors_of_a_connection_are_freed_at_its_end(program, stored, end):
    await program.ask("/v2/")
    before = count_descriptors()
    for _ in range(3):
        peer = await RawClient.connect(program.url, receive_buffer=4096)
        if end == "during the body":
            peer.send(get(stored[8 * MIB]))
            await peer.read(100)
        elif end == "after the body":
            peer.send(get(stored[INLINE_BLOB_SIZE + 1]))
            await peer.read_response()
        else:
            peer.send(request(stored[INLINE_BLOB_SIZE + 1], "Connection: close"))
            assert (await peer.read_to_end()).end == "fin"
        await peer.close()
    async with asyncio.timeout(10):
        while count_descriptors() > before:
            await program.ask("/v2/")


@pytest.mark.parametrize(
    "sent",
    [b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n", b"rubbish\r\n\r\n", get("{path}")],
    ids=["small", "malformed", "large"],
)
async def test_a_closed_connection_is_freed_without_the_garbage_collector(program, stored, sent):
    def count_connections() -> int:
        return sum(type(one) is HttpConnection for one in gc.get_objects())

    await program.ask("/v2/")
    gc.collect()
    before = count_connections()
    gc.disable()
    try:
        for _ in range(3):
            peer = await RawClient.connect(program.url)
            peer.send(sent.replace(b"{path}", stored[8 * MIB].encode()))
            await peer.read_response()
            await peer.close()
        async with asyncio.timeout(10):
            while count_connections() > before:
                await program.ask("/v2/")
    finally:
        gc.enable()


async def test_a_shutdown_finishes_the_response_and_closes_the_connection(program, stored):
    path = stored[8 * MIB]
    peer = await RawClient.connect(program.url, receive_buffer=4096)
    peer.send(get(path))
    await peer.read(100)
    async with asyncio.TaskGroup() as group:
        stopping = group.create_task(program.stop())
        answer = await peer.read_to_end()
        assert answer.body == LARGE
        await stopping


async def test_manifests_and_blobs_alternate_on_one_connection(registry, program, stored):
    registry.add_image()
    peer = await RawClient.connect(program.url)
    asked = [LATEST, get(stored[8 * MIB]), get(stored[4096]), LATEST]
    first = []
    for one in asked:
        peer.received.clear()
        peer.send(one)
        first.append(TIMES.sub(b"", (await peer.read_response()).data))
    for _ in range(3):
        for one, expected in zip(asked, first, strict=True):
            peer.received.clear()
            peer.send(one)
            got = TIMES.sub(b"", (await peer.read_response()).data)
            assert re.sub(rb"fwd=miss; stored", b"hit", expected) == got
