"""Ranges of blobs that are stored, that are arriving, and that were not requested before."""

import asyncio

import pytest

from proxy.server.ranges import MAX_RANGES
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
    "asked",
    [
        "bytes=5-2",
        "bytes=a-b",
        "lines=1-2",
        "bytes=0-0,3-2",
        "bytes=0-,0-",
        "bytes=" + "0-0;" * 1000,
        "bytes=" + ",".join(["0-0"] * (MAX_RANGES + 1)),
    ],
)
async def test_a_range_that_is_malformed_or_asks_for_too_much_gives_the_whole(program, blob, asked):
    answer = await program.blob(blob, Range=asked)
    assert (answer.status, answer.body) == (200, LAYER)
    assert "Content-Range" not in answer.headers


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("bytes=0-0,2-3", [(0, 1), (2, 4)]),
        ("bytes=1000-1999, 10-19, -5", [(1000, 2000), (10, 20), (SIZE - 5, SIZE)]),
        (f"bytes={SIZE}-,1-2,7-8", [(1, 3), (7, 9)]),
        (f"bytes=0-{MIB},{MIB + 1}-{SIZE - 1}", [(0, MIB + 1), (MIB + 1, SIZE)]),
    ],
)
async def test_several_ranges_are_one_multipart_body(program, blob, asked, expected):
    answer = await program.blob(blob, Range=asked)
    assert (answer.status, answer.is_whole) == (206, True)
    assert answer.headers["Content-Length"] == str(len(answer.body))
    assert answer.headers["Content-Type"].startswith("multipart/byteranges; boundary=")
    boundary = answer.headers["Content-Type"].partition("boundary=")[2]
    pieces = answer.body.split(f"\r\n--{boundary}".encode())
    assert (pieces[0], pieces[-1]) == (b"", b"--\r\n")
    for piece, (start, stop) in zip(pieces[1:-1], expected, strict=True):
        head, _, content = piece.partition(b"\r\n\r\n")
        assert f"Content-Range: bytes {start}-{stop - 1}/{SIZE}".encode() in head
        assert content == LAYER[start:stop]


async def test_one_range_left_of_several_is_a_plain_206(program, blob):
    answer = await program.blob(blob, Range=f"bytes={SIZE}-,1-2")
    assert (answer.status, answer.body) == (206, LAYER[1:3])
    assert answer.headers["Content-Range"] == f"bytes 1-2/{SIZE}"


async def test_several_ranges_beyond_the_end_are_416(program, blob):
    answer = await program.blob(blob, Range=f"bytes={SIZE}-,{SIZE + 1}-")
    assert answer.status == 416


async def test_as_many_ranges_as_podman_asks_for_are_served(program, blob):
    asked = [(n * 2000, n * 2000 + 1000) for n in range(MAX_RANGES)]
    value = ",".join(f"{start}-{stop - 1}" for start, stop in asked)
    answer = await program.blob(blob, Range=f"bytes={value}")
    assert (answer.status, answer.is_whole) == (206, True)
    for start, stop in asked:
        assert LAYER[start:stop] in answer.body


async def test_head_has_no_ranges(program, blob):
    answer = await program.ask(f"/v2/library/app/blobs/{blob}", "HEAD", Range="bytes=0-0,2-3")
    assert (answer.status, answer.headers["Content-Length"]) == (200, str(SIZE))


async def test_the_end_of_a_wrong_blob_is_withheld_from_several_ranges_too(program, registry):
    digest = registry.add_blob(LAYER)
    registry.fail(registry.body_of(digest), Fault(flip_at=5), times=None)
    answer = await program.blob(digest, Range="bytes=0-99,-10")
    assert answer.status >= 400 or not answer.is_whole


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
    await program.wait_for_downloads()
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


async def test_several_ranges_of_a_blob_that_is_not_stored_cost_no_transfer_each(
    make_program, registry
):
    program = await make_program(store={"max_size": "1MB"})
    digest = registry.add_blob(LAYER)
    asked = "bytes=" + ",".join(f"{n * 1000}-{n * 1000 + 9}" for n in reversed(range(1000)))
    answer = await program.blob(digest, Range=asked)
    if answer.status == 200:
        assert answer.body == LAYER
    else:
        assert answer.status >= 400 or not answer.is_whole
    assert registry.count(registry.body_of(digest)) <= 4
