"""No space: clients still get their blob, verified to the last byte."""

import asyncio

import pytest

from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.fakes.raw_client import RawClient
from tests.support.program import read

MIB = 1 << 20
LARGE = bytes(range(256)) * (24 * MIB // 256)


@pytest.fixture
async def small(make_program):
    """A program whose store is smaller than the blob."""
    return await make_program(store={"max_size": "20MB"})


@pytest.fixture
async def full(make_program, tiny_disk):
    """A program whose disk is smaller than `store.max_size`."""
    return await make_program(tiny_disk(8 * MIB) / "store")


async def test_a_blob_larger_than_the_store_is_passed_through(registry, small):
    kept = registry.add_blob(b"kept")
    await small.blob(kept)
    digest = registry.add_blob(LARGE)
    for _ in range(2):
        answer = await small.blob(digest)
        assert (answer.status, answer.digest, answer.is_whole) == (200, digest, True)
        assert "stored" not in answer.headers["Cache-Status"]
    await small.wait_for_downloads()
    assert small.stored() == {kept}
    assert await small.metric("pullcache_uncached_total", reason="too_large") == 2
    assert registry.bytes_sent(registry.body_of(digest)) < 3 * len(LARGE)


async def test_the_last_byte_of_a_blob_that_is_passed_through_is_withheld_too(registry, small):
    digest = registry.add_blob(LARGE)
    registry.fail(registry.body_of(digest), Fault(flip_at=0), times=None)
    answer = await small.blob(digest)
    assert answer.status >= 400 or (not answer.is_whole and len(answer.body) < len(LARGE))


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-99", 0, 100),
        ("bytes=1000000-1999999", 1_000_000, 2_000_000),
        ("bytes=-1000", len(LARGE) - 1000, len(LARGE)),
        ("bytes=20000000-", 20_000_000, len(LARGE)),
    ],
)
async def test_ranges_of_a_blob_that_is_passed_through_are_right(
    registry, small, asked, start, stop
):
    digest = registry.add_blob(LARGE)
    answer = await small.blob(digest, Range=asked)
    assert answer.status == 206
    assert answer.body == LARGE[start:stop]
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(LARGE)}"


async def test_a_blob_of_unknown_length_that_turns_out_too_large_is_passed_through(registry, small):
    registry.edge.send_length = False
    digest = registry.add_blob(LARGE)
    answers = await asyncio.gather(*(small.blob(digest) for _ in range(3)))
    for answer in answers:
        assert (answer.status, answer.digest, answer.is_whole) == (200, digest, True)
    await small.wait_for_downloads()
    assert small.stored() == set()
    assert small.disk_usage() < 20_000_000


async def test_a_full_disk_does_not_fail_a_client(registry, full):
    digest = registry.add_blob(LARGE)
    answer = await full.blob(digest)
    assert (answer.status, answer.digest, answer.is_whole) == (200, digest, True)
    await full.wait_for_downloads()
    assert await full.metric("pullcache_uncached_total", reason="no_space") >= 1
    assert list((full.root / "ingest").iterdir()) == []
    fitting = registry.add_blob(b"fits")
    assert (await full.blob(fitting)).status == 200
    await full.wait_for_downloads()
    assert full.stored() == {fitting}


async def test_a_disk_that_fills_up_during_a_download_does_not_fail_a_client(registry, full):
    registry.edge.send_length = False
    digest = registry.add_blob(LARGE)
    release = asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(stall_at=2 * MIB, until=release))
    async with full.opened(f"/v2/library/app/blobs/{digest}") as response:
        begun = await response.content.readexactly(2 * MIB)
        filler = full.root.parent / "filler"
        filler.write_bytes(bytes(5 * MIB))
        release.set()
        rest, is_whole = await read(response)
    assert (digest_of(begun + rest), is_whole) == (digest, True)


async def test_a_manifest_is_served_although_the_disk_is_full(registry, full):
    (full.root.parent / "filler").write_bytes(bytes(7 * MIB))
    image = registry.add_image(index=True, layers=[b"x" * 2 * MIB])
    await full.pull(image)
    await full.pull(image)


async def test_a_disk_without_free_inodes_does_not_fail_a_client(registry, make_program, tiny_disk):
    registry.pull_limit = None
    program = await make_program(tiny_disk(64 * MIB, files=40) / "store")
    image = registry.add_image(layers=[b"layer %d" % number for number in range(60)])
    for _ in range(2):
        await program.pull(image)
        await program.wait_for_downloads()
    assert await program.metric("pullcache_uncached_total") >= 1
    assert 0 < len(program.stored()) < 40
    await program.restart()
    await program.pull(image)


async def test_stored_blobs_are_evicted_for_a_new_one(registry, full):
    digests = [registry.add_blob(bytes([n]) * (3 * MIB)) for n in range(6)]
    for digest in digests:
        answer = await full.blob(digest)
        assert (answer.status, answer.digest) == (200, digest)
        await full.wait_for_downloads()
    assert digests[-1] in full.stored()
    assert await full.metric("pullcache_evictions_total") >= 4


async def test_a_reader_of_an_evicted_blob_gets_the_whole_blob(registry, small):
    content = LARGE[: 12 * MIB]
    digest = registry.add_blob(content)
    await small.blob(digest)
    await small.wait_for_downloads()
    peer = await RawClient.connect(small.url, receive_buffer=4096)
    peer.send(f"GET /v2/library/app/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await peer.read(100)
    other = registry.add_blob(b"y" * 12 * MIB)
    await small.blob(other)
    await small.wait_for_downloads()
    assert small.stored() == {other}
    answer = await peer.read_response()
    await peer.close()
    assert digest_of(answer.body) == digest


async def test_a_shared_layer_is_fetched_again_for_both_repositories_after_its_eviction(
    registry, small
):
    content = LARGE[: 6 * MIB]
    images = [registry.add_image(name, layers=[content]) for name in ("me/a", "me/b")]
    for image in images:
        await small.pull(image)
        await small.wait_for_downloads()
    assert registry.bytes_sent(registry.body_of(images[0].layers[0])) == len(content) + 1
    for n in range(3):
        await small.blob(registry.add_blob(bytes([n]) * 6 * MIB))
        await small.wait_for_downloads()
    assert images[0].layers[0] not in small.stored()
    for image in images:
        await small.pull(image)


async def test_the_use_of_a_manifest_counts_as_a_use_of_its_layers(registry, small):
    image = registry.add_image(index=True, layers=[LARGE[: 5 * MIB]])
    await small.pull(image)
    await small.wait_for_downloads()
    others = [registry.add_blob(bytes([n]) * (5 * MIB)) for n in range(2)]
    for digest in others:
        small.clock.advance(1)
        await small.blob(digest)
        await small.wait_for_downloads()
    small.clock.advance(1)
    # A client that already has the layers requests only this.
    await small.manifest(image, image.digest)
    await small.manifest(image, image.manifest)
    newest = registry.add_blob(b"z" * 5 * MIB)
    await small.blob(newest)
    await small.wait_for_downloads()
    assert image.layers[0] in small.stored()
    assert others[0] not in small.stored()


async def test_a_claimed_length_evicts_only_for_bytes_that_have_arrived(registry, small):
    """`small` holds 20 MB: two blobs of 6 MB stay while 1 MiB of a claimed 15 MB has arrived."""
    kept = {registry.add_blob(bytes([n]) * 6_000_000) for n in (1, 2)}
    for digest in kept:
        assert (await small.blob(digest)).digest == digest
        await small.wait_for_downloads()
    claimed = registry.add_blob(LARGE[:15_000_000])
    release = asyncio.Event()
    registry.fail(registry.body_of(claimed), Fault(stall_at=MIB, until=release))
    async with small.opened(f"/v2/library/app/blobs/{claimed}") as response:
        await response.content.readexactly(MIB)
        assert small.stored() == kept
        assert small.disk_usage() <= 20_000_000
        response.close()
    release.set()
    await small.wait_for_downloads()
    assert claimed in small.stored()
