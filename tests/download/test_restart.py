"""Content, order of uses and partial downloads survive a restart."""

import asyncio
import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.content import digest_of
from tests.fakes.faults import Fault, flip
from tests.fakes.raw_client import RawClient

MIB = 1 << 20
BLOB = bytes(range(256)) * (4 * MIB // 256)


async def interrupted(registry, program, content: bytes = BLOB) -> str:
    """Stop the daemon when half of a blob has arrived; return its digest."""
    digest: str = registry.add_blob(content)
    half = len(content) // 2
    registry.fail(registry.body_of(digest), Fault(stall_at=half, until=asyncio.Event()))
    async with program.opened(f"/v2/library/app/blobs/{digest}") as response:
        await response.content.readexactly(half)
        response.close()
    await program.stop()
    return digest


async def test_an_interrupted_download_is_resumed_by_the_next_request(registry, program):
    digest = await interrupted(registry, program)
    await program.start()
    answer = await program.blob(digest)
    assert (answer.status, answer.digest, answer.is_whole) == (200, digest, True)
    first, second = registry.seen(registry.body_of(digest))
    assert second.headers["Range"] == f"bytes={2 * MIB}-"
    assert second.bytes_sent == 2 * MIB
    await program.wait_for_downloads()
    assert program.stored() == {digest}
    assert list((program.root / "ingest").iterdir()) == []
    assert first.bytes_sent == 2 * MIB


async def test_bytes_of_an_interrupted_download_are_served_before_upstream_answers(
    registry, program
):
    digest = await interrupted(registry, program)
    await program.start()
    release = asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(until_headers=release))
    head = asyncio.timeout(5)
    async with head, program.opened(f"/v2/library/app/blobs/{digest}") as response:
        if response.headers.get("Content-Length"):
            assert await response.content.readexactly(1000) == BLOB[:1000]
        release.set()
        await response.read()


async def test_a_damaged_interrupted_download_is_discarded(registry, program):
    digest = await interrupted(registry, program)
    path = program.root / "ingest" / digest.replace(":", "-")
    path.write_bytes(flip(path.read_bytes(), 3))
    await program.start()
    first = await program.blob(digest)
    assert first.digest == digest or not first.is_whole
    second = await program.blob(digest)
    assert (second.status, second.digest, second.is_whole) == (200, digest, True)
    await program.wait_for_downloads()
    assert program.stored() == {digest}


async def test_the_state_on_disk_covers_all_bytes_while_upstream_pauses(registry, program):
    """So a kill then loses none of them."""
    digest = registry.add_blob(BLOB)
    half = len(BLOB) // 2
    registry.fail(registry.body_of(digest), Fault(stall_at=half, until=asyncio.Event()))
    state = program.root / "ingest" / f"{digest.replace(':', '-')}.state"
    async with program.opened(f"/v2/library/app/blobs/{digest}") as response:
        await response.content.readexactly(half)
        async with asyncio.timeout(5):
            while not state.exists() or f'"have":{half},' not in state.read_text():  # noqa: ASYNC110 (a file has no event)
                await asyncio.sleep(0.01)
        response.close()


async def test_interrupted_downloads_are_counted_until_they_are_too_old(registry, make_program):
    program = await make_program(fetch={"ingest_ttl": "1h"})
    digest = await interrupted(registry, program)
    path = program.root / "ingest" / digest.replace(":", "-")
    os.utime(path, (program.clock() - 1800, program.clock() - 1800))
    await program.start()
    assert await program.metric("pullcache_store_reserved_bytes") >= 2 * MIB
    assert path.exists()


async def test_a_blob_that_was_served_completely_survives_an_immediate_stop(registry, program):
    digest = registry.add_blob(BLOB)
    assert (await program.blob(digest)).is_whole
    await program.stop()
    await registry.stop()
    await program.start()
    answer = await program.blob(digest)
    assert (answer.status, answer.digest) == (200, digest)


async def test_the_order_of_uses_survives_a_restart(registry, make_program):
    program = await make_program(store={"max_size": "20MB"})
    blobs = [registry.add_blob(bytes([n]) * (5 * MIB)) for n in range(3)]
    for digest in blobs:
        await program.blob(digest)
        # The commit of a blob is its first use.
        await program.wait_for_downloads()
        program.clock.advance(1)
    await program.blob(blobs[0])
    await program.restart()
    newest = registry.add_blob(b"x" * 5 * MIB)
    await program.blob(newest)
    await program.wait_for_downloads()
    assert program.stored() == {blobs[0], blobs[2], newest}


async def test_a_running_response_is_finished_before_the_daemon_ends(registry, program):
    digest = registry.add_blob(BLOB)
    release = asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(stall_at=MIB, until=release))
    peer = await RawClient.connect(program.url)
    peer.send(f"GET /v2/library/app/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await peer.read(MIB // 2)
    async with asyncio.TaskGroup() as group:
        group.create_task(program.stop())
        await refused(program.url)
        release.set()
    answer = await peer.read_to_end()
    await peer.close()
    assert digest_of(answer.body) == digest


async def refused(url: str) -> None:
    """Wait until no socket listens at `url`."""
    async with asyncio.timeout(5):
        while True:
            try:
                peer = await RawClient.connect(url)
            except ConnectionRefusedError:
                return
            await peer.close()


async def test_tags_and_their_times_survive_a_restart(registry, program):
    image = registry.add_image(index=True)
    await program.pull(image)
    await program.wait_for_downloads()
    program.clock.advance(500)
    await program.restart()
    registry.requests.clear()
    answer = await program.manifest(image)
    assert (answer.digest, answer.headers["Age"]) == (image.digest, "500")
    assert registry.requests == []


@pytest.mark.parametrize("how", ["gone", "truncated", "empty", "longer", "a directory", "a link"])
async def test_a_blob_that_was_damaged_on_the_disk_is_fetched_again(registry, program, how):
    image = registry.add_image(layers=[BLOB])
    await program.pull(image)
    await program.wait_for_downloads()
    layer = image.layers[0]
    path = program.root / "blobs" / "sha256" / layer[7:]
    if how == "truncated":
        os.truncate(path, 1000)
    elif how == "empty":
        os.truncate(path, 0)
    elif how == "longer":
        os.truncate(path, len(BLOB) + 1)
    else:
        path.unlink()
        if how == "a directory":
            path.mkdir()
        if how == "a link":
            path.symlink_to("/etc/passwd")
    answer = await program.blob(layer)
    assert (answer.status, answer.digest, answer.is_whole) == (200, layer, True)
    await program.wait_for_downloads()
    if how != "a directory":
        assert layer in program.stored()
        before = len(registry.requests)
        assert (await program.blob(layer)).digest == layer
        assert len(registry.requests) == before


async def test_a_manifest_that_was_damaged_on_the_disk_is_never_served(registry, program):
    image = registry.add_image()
    await program.pull(image)
    await program.restart()
    path = program.root / "blobs" / "sha256" / image.digest[7:]
    path.write_bytes(flip(path.read_bytes(), 20))
    async with registry.down():
        assert (await program.manifest(image)).status >= 400
        assert (await program.manifest(image, image.digest)).status >= 400
    await program.wait_for_upstream()
    for reference in (image.digest, "latest"):
        while (answer := await program.manifest(image, reference)).status == 503:
            pass  # the breaker is open, and upstream is tried again in a moment
        assert (answer.status, answer.digest) == (200, image.digest)


async def test_a_lost_index_does_not_make_the_store_larger_than_allowed(registry, make_program):
    program = await make_program(store={"max_size": "20MB"})
    for n in range(3):
        await program.blob(registry.add_blob(bytes([n]) * 5 * MIB))
    await program.wait_for_downloads()
    await program.stop()
    for path in program.root.glob("index.sqlite*"):
        path.unlink()
    await program.start()
    for n in range(3, 6):
        digest = registry.add_blob(bytes([n]) * 5 * MIB)
        assert (await program.blob(digest)).digest == digest
        await program.wait_for_downloads()
        assert program.disk_usage() <= 20_000_000


async def test_a_blob_that_a_kill_left_out_of_the_index_is_counted_or_removed(
    registry, make_program
):
    program = await make_program(store={"max_size": "20MB"})
    await program.stop()
    orphan = bytes(15 * MIB)
    path = program.root / "blobs" / "sha256" / digest_of(orphan)[7:]
    path.write_bytes(orphan)
    await program.start()
    digest = registry.add_blob(b"x" * 10 * MIB)
    assert (await program.blob(digest)).digest == digest
    await program.wait_for_downloads()
    assert program.disk_usage() <= 20_000_000


async def test_a_manifest_that_a_kill_left_half_written_is_removed(program):
    left = program.root / "ingest" / "put-abcdefgh"
    left.write_bytes(b"half a manifest")
    await program.restart()
    assert not left.exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
async def test_a_file_that_cannot_be_opened_stays_and_is_fetched_again(
    monkeypatch, registry, program, number
):
    image = registry.add_image(layers=[BLOB])
    await program.pull(image)
    await program.wait_for_downloads()
    await program.restart()
    before = program.stored()
    blobs = str(program.root / "blobs")
    open_, opened = os.open, io.open

    def refuse(path: Any) -> None:
        if str(path).startswith(blobs) and not Path(path).is_dir():
            raise OSError(number, os.strerror(number))

    def os_open(path: Any, *rest: Any, **kw: Any) -> int:
        refuse(path)
        return open_(path, *rest, **kw)

    def io_open(path: Any, *rest: Any, **kw: Any) -> Any:
        refuse(path)
        return opened(path, *rest, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", os_open)
        patch.setattr("aiofiles.threadpool.sync_open", io_open)
        await program.pull(image)
        await program.wait_for_downloads()
        async with registry.down():
            assert (await program.blob(image.layers[0])).status >= 400
        await program.wait_for_downloads()
    assert program.stored() == before
    await program.wait_for_upstream()
    registry.requests.clear()
    await program.pull(image)
    assert not registry.requests
