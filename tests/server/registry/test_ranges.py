"""Ranges of blobs that are here, that are coming, and that are not begun."""

import asyncio

import pytest

from tests.fakes.faults import Fault
from tests.support.program import Program, read

MIB = 1 << 20
LAYER = bytes(range(256)) * (2 * MIB // 256)
SIZE = len(LAYER)


@pytest.fixture(params=["hit", "miss"])
async def blob(request, registry, program: Program) -> str:
    digest: str = registry.add_blob(LAYER)
    if request.param == "hit":
        await program.blob(digest)
    return digest


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, SIZE),
        ("bytes=100-199", 100, 200),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        ("bytes=-1", SIZE - 1, SIZE),
        ("bytes=-1000", SIZE - 1000, SIZE),
        (f"bytes=-{SIZE * 2}", 0, SIZE),
        (f"bytes=1000000-{SIZE * 2}", 1000000, SIZE),
    ],
)
async def test_a_single_range_is_206_with_exactly_these_bytes(program, blob, asked, start, stop):
    answer = await program.blob(blob, Range=asked)
    assert answer.status == 206
    assert answer.body == LAYER[start:stop]
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert answer.headers["Content-Length"] == str(stop - start)


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", "bytes=999999999-", "bytes=-0"])
async def test_a_range_beyond_the_end_is_416_without_a_body(program, blob, asked):
    answer = await program.blob(blob, Range=asked)
    assert answer.status == 416
    assert answer.headers["Content-Range"] == f"bytes */{SIZE}"
    assert answer.body == b""
    assert answer.headers["Content-Length"] == "0"


@pytest.mark.parametrize(
    "asked", ["bytes=5-2", "bytes=a-b", "lines=1-2", "bytes=0-0,2-3", "bytes=" + "0-0," * 1000]
)
async def test_a_range_that_is_none_or_many_gives_the_whole(program, blob, asked):
    answer = await program.blob(blob, Range=asked)
    assert (answer.status, answer.body) == (200, LAYER)
    assert "Content-Range" not in answer.headers


async def test_a_range_of_another_version_gives_the_whole(program, blob):
    for condition, status in [
        (f'"{blob}"', 206),
        ('"other"', 200),
        (f'W/"{blob}"', 200),
        ("Tue, 14 Nov 2023 22:14:20 GMT", 200),
    ]:
        answer = await program.blob(blob, Range="bytes=1-2", If_Range=condition)
        assert answer.status == status


async def test_a_range_of_a_miss_stores_the_whole_blob(program, registry):
    digest = registry.add_blob(LAYER)
    assert (await program.blob(digest, Range="bytes=100-199")).body == LAYER[100:200]
    assert (await program.blob(digest)).body == LAYER
    assert registry.count(registry.body_of(digest)) == 1
    assert registry.seen(registry.body_of(digest))[0].headers["Range"] == "bytes=0-4194303"
    await program.settled()
    assert program.stored() == {digest}


async def test_e09_a_range_comes_as_soon_as_its_bytes_are_in(program, registry):
    digest = registry.add_blob(LAYER)
    release = asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(stall_at=MIB, until=release))
    async with asyncio.timeout(5):
        answer = await program.blob(digest, Range="bytes=1000-1999")
    assert answer.body == LAYER[1000:2000]
    async with program.opened(
        f"/v2/library/app/blobs/{digest}", headers={"Range": "bytes=-1000"}
    ) as response:
        assert response.status == 206
        release.set()
        assert await read(response) == (LAYER[-1000:], True)


async def test_the_end_of_a_wrong_blob_is_withheld_from_ranges_too(program, registry):
    digest = registry.add_blob(LAYER)
    registry.fail(registry.body_of(digest), Fault(flip_at=5), times=None)
    answer = await program.blob(digest, Range="bytes=-10")
    assert answer.status >= 400 or not answer.is_whole


async def test_a_manifest_has_no_ranges(program, registry):
    image = registry.add_image()
    answer = await program.manifest(image, Range="bytes=0-1")
    assert (answer.status, answer.digest) == (200, image.digest)
