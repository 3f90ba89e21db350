"""Downloads: read while they arrive, resumed after failures, verified at the end."""

import asyncio

import pytest

from proxy.download import writer
from tests.fakes.content import digest_of
from tests.fakes.faults import HTML, Fault
from tests.fakes.raw_client import RawClient
from tests.support.program import SETTINGS, Program, read

MIB = 1 << 20
BLOB = bytes(range(256)) * (3 * MIB // 256) + b"the end"
SIZE = len(BLOB)
DIGEST = digest_of(BLOB)
# The range that is requested first of a blob of unknown size.
FIRST = "bytes=0-4194303"


@pytest.fixture(params=["cdn", "no cdn"])
def blob(request, registry) -> str:
    """A blob at upstream, with or without a redirect."""
    registry.cdn = registry.auth = request.param == "cdn"
    digest: str = registry.add_blob(BLOB)
    return digest


@pytest.fixture
def body(registry, blob) -> str:
    """The match for the requests that carry the blob's bytes."""
    match: str = registry.body_of(blob)
    return match


def whole(answer) -> bool:
    return (answer.status, answer.is_whole, answer.digest) == (200, True, DIGEST)


def resumed_at(registry, body: str) -> list[str | None]:
    """Return the Range of every request for the blob's bytes."""
    return [seen.headers.get("Range") for seen in registry.seen(body) if seen.status != 401]


async def test_a_hit_opens_one_file_and_sends_no_request_upstream(registry, program, blob):
    assert whole(await program.blob(blob))
    await program.wait_for_downloads()
    before = len(registry.requests)
    assert whole(await program.blob(blob))
    assert len(registry.requests) == before
    assert program.stored() == {blob}


async def test_the_end_of_a_blob_written_past_the_page_cache_is_written_without_delay(
    program, blob, monkeypatch
):
    monkeypatch.setattr(writer, "MIN_DIRECT_SIZE", MIB)
    monkeypatch.setattr(writer, "PARTIAL_DELAY", 3600)
    assert whole(await program.blob(blob))
    await program.wait_for_downloads()
    assert program.stored() == {blob}


async def test_e07_a_download_continues_when_its_clients_disconnect(registry, program, blob, body):
    release = asyncio.Event()
    registry.fail(body, Fault(stall_at=MIB, until=release))
    async with program.opened(f"/v2/library/app/blobs/{blob}") as response:
        await response.content.readexactly(1000)
        response.close()
    release.set()
    await program.wait_for_downloads()
    assert program.stored() == {blob}


async def test_a_client_that_attaches_late_gets_the_whole_blob(registry, program, blob, body):
    release = asyncio.Event()
    registry.fail(body, Fault(stall_at=2 * MIB, until=release))
    async with program.opened(f"/v2/library/app/blobs/{blob}") as early:
        await early.content.readexactly(2 * MIB - 1)
        async with program.opened(f"/v2/library/app/blobs/{blob}") as late:
            assert "collapsed" in late.headers["Cache-Status"]
            begun = await late.content.readexactly(MIB)
            release.set()
            rest, is_whole = await read(late)
    assert is_whole
    assert begun + rest == BLOB
    assert registry.bytes_sent(body) == SIZE


async def test_the_last_byte_is_withheld_until_the_digest_is_verified(
    registry, program, blob, body
):
    release = asyncio.Event()
    registry.fail(body, Fault(stall_at=SIZE - 1, until=release))
    async with program.opened(f"/v2/library/app/blobs/{blob}") as response:
        got = await response.content.readexactly(SIZE - 1)
        release.set()
        assert (got + await response.content.read(), digest_of(BLOB)) == (BLOB, blob)


async def broken(program: Program, body: str, fault: Fault) -> tuple[bytes, bool]:
    """Fetch the blob over a transfer that breaks when the client has its first MiB.

    `fault` applies to all transfers after that.
    """
    now = asyncio.Event()
    program.registry.fail(body, Fault(stall_at=MIB, until=now, cut_at=MIB))
    program.registry.fail(body, fault, times=None)
    async with program.opened(f"/v2/library/app/blobs/{DIGEST}") as response:
        begun = await response.content.readexactly(MIB)
        now.set()
        rest, is_whole = await read(response)
    return begun + rest, is_whole


async def test_u06_a_broken_transfer_is_resumed_at_the_first_missing_byte(
    registry, program, blob, body
):
    assert await broken(program, body, Fault()) == (BLOB, True)
    assert resumed_at(registry, body) == [FIRST, f"bytes={MIB}-"]
    assert registry.bytes_sent(body) == SIZE


async def test_u06_a_transfer_without_progress_is_given_up(registry, program, blob, body):
    assert await broken(program, body, Fault(cut_at=0, reset=True)) == (BLOB[:MIB], False)
    attempts = SETTINGS["fetch"]["attempts"]
    assert resumed_at(registry, body) == [FIRST] + [f"bytes={MIB}-"] * (attempts - 1)
    assert program.stored() == set()


@pytest.mark.parametrize("cut_at", [0, 1, 64 * 1024, MIB, SIZE - 1])
@pytest.mark.parametrize("reset", [False, True])
async def test_wherever_a_transfer_breaks_the_blob_is_complete(program, body, cut_at, reset):
    program.registry.fail(body, Fault(cut_at=cut_at, reset=reset))
    assert whole(await program.blob(DIGEST))
    assert program.registry.bytes_sent(body) <= SIZE + cut_at


async def test_a_blob_is_complete_although_upstream_breaks_off_every_64_kib(registry, program):
    digest = registry.add_blob(BLOB[: MIB // 2])
    registry.fail(registry.body_of(digest), Fault(cut_at=64 * 1024), times=None)
    assert (await program.blob(digest)).digest == digest


async def test_each_attempt_makes_a_new_request_to_the_registry(registry, program):
    digest = registry.add_blob(BLOB)
    registry.fail(registry.body_of(digest), Fault(cut_at=MIB))
    assert whole(await program.blob(digest))
    fetched = [seen.target for seen in registry.seen(registry.body_of(digest))]
    assert len(set(fetched)) == 2


async def test_a_transfer_that_breaks_repeatedly_continues_while_it_makes_progress(
    registry, program, blob, body
):
    registry.fail(body, Fault(cut_at=400_000), times=7)
    assert whole(await program.blob(blob))


async def test_u07_an_upstream_that_ignores_range_is_read_from_the_start(
    registry, program, blob, body
):
    assert await broken(program, body, Fault(ignore_range=True)) == (BLOB, True)
    assert resumed_at(registry, body) == [FIRST, f"bytes={MIB}-"]
    assert registry.bytes_sent(body) == SIZE + MIB


@pytest.mark.parametrize("value", ["bytes 0-9/10", "bytes 5-100/200", None, "bytes */5"])
async def test_u08_a_range_that_was_not_requested_is_never_used(program, body, value):
    wrong = Fault(headers={"Content-Range": value})
    got, is_whole = await broken(program, body, wrong)
    assert (got, is_whole) == (BLOB[:MIB], False)
    program.registry.heal()
    await program.wait_for_upstream()
    assert whole(await program.blob(DIGEST))


async def test_a_stalled_transfer_is_restarted(registry, program, blob, body):
    registry.fail(body, Fault(stall_at=MIB, until=asyncio.Event()))
    assert whole(await program.blob(blob))
    assert len(resumed_at(registry, body)) >= 2


async def test_a_blob_of_unknown_length_is_stored(registry, program, blob, body):
    registry.front.send_length = registry.edge.send_length = False
    answers = await asyncio.gather(*(program.blob(blob) for _ in range(5)))
    for answer in answers:
        assert whole(answer)
    await program.wait_for_downloads()
    again = await program.blob(blob)
    assert whole(again)
    assert again.headers["Content-Length"] == str(SIZE)
    assert program.stored() == {blob}
    assert registry.bytes_sent(body) == SIZE


async def test_a_blob_of_unknown_length_that_breaks_is_resumed(registry, program, blob, body):
    registry.front.send_length = registry.edge.send_length = False
    registry.fail(body, Fault(cut_at=MIB))
    assert whole(await program.blob(blob))


@pytest.mark.parametrize("send_length", [True, False])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(flip_at=0),
        Fault(flip_at=SIZE - 1),
        Fault(keep=SIZE - 1, ignore_range=True),
        Fault(keep=10, ignore_range=True),
    ],
)
async def test_u10_no_client_gets_a_complete_wrong_blob_and_the_next_pull_is_right(
    program, body, fault, send_length
):
    registry = program.registry
    registry.front.send_length = registry.edge.send_length = send_length
    registry.fail(body, fault, times=None)
    answers = await asyncio.gather(*(program.blob(DIGEST) for _ in range(10)))
    for answer in answers:
        assert answer.status >= 400 or not answer.is_whole
        assert answer.status >= 400 or len(answer.body) < SIZE
    await program.wait_for_downloads()
    assert program.stored() == set()
    assert list((program.root / "ingest").iterdir()) == []
    assert await program.metric("pullcache_digest_mismatches_total") >= 1
    registry.heal()
    program.clock.advance(60)
    await program.wait_for_upstream()
    assert whole(await program.blob(DIGEST))


async def test_wrong_bytes_are_not_fetched_for_ever(registry, program, blob, body):
    registry.fail(body, Fault(flip_at=5), times=None)
    for _ in range(10):
        answer = await program.blob(blob)
        assert not whole(answer)
    assert registry.count(body) <= 6


@pytest.mark.parametrize("extra", [b"x", b"x" * 100_000])
async def test_u11_bytes_beyond_the_size_of_the_blob_are_rejected(program, body, extra):
    registry = program.registry
    registry.fail(body, Fault(body=BLOB + extra, ignore_range=True), times=None)
    answer = await program.blob(DIGEST)
    assert answer.status >= 400 or not answer.is_whole or answer.digest != DIGEST
    await program.wait_for_downloads()
    assert program.stored() == set()


async def test_contradicting_sizes_from_upstream_are_rejected(registry, program):
    image = registry.add_image(layers=[BLOB])
    await program.manifest(image)
    registry.fail(registry.body_of(DIGEST), Fault(keep=1000), times=None)
    answer = await program.blob(DIGEST)
    assert answer.status >= 400 or not answer.is_whole
    assert len(answer.body) < SIZE


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500),
        Fault(status=502, body=b"<html>"),
        Fault(status=503),
        Fault(status=401, body=b""),
        Fault(status=403, body=b""),
        Fault(hang_up=True),
        HTML,
        Fault(status=200, body=b""),
        Fault(status=204, body=b""),
        Fault(status=416, body=b""),
    ],
)
async def test_a_blob_that_cannot_be_fetched_is_404_so_that_docker_falls_back_at_once(
    program, body, fault
):
    program.registry.fail(body, fault, times=None)
    answer = await program.blob(DIGEST)
    if answer.status == 200:
        # Bytes that were sent by then cannot be taken back, but the body stays incomplete.
        assert not answer.is_whole
    else:
        assert (answer.status, answer.code) == (404, "BLOB_UNKNOWN")
    await program.wait_for_downloads()
    assert program.stored() == set()


async def test_an_upstream_that_is_down_is_a_404_for_a_blob(registry, program, blob):
    async with registry.down():
        answer = await program.blob(blob)
    assert (answer.status, answer.code) == (404, "BLOB_UNKNOWN")
    await program.wait_for_upstream()
    assert whole(await program.blob(blob))


async def test_an_incomplete_body_ends_with_fin(registry, program, blob, body):
    registry.fail(body, Fault(flip_at=SIZE - 1), times=None)
    peer = await RawClient.connect(program.url)
    peer.send(f"GET /v2/library/app/blobs/{blob} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    answer = await peer.read_to_end()
    await peer.close()
    assert answer.status == 200
    assert answer.headers["content-length"] == str(SIZE)
    assert answer.end == "fin"
    assert len(answer.body) < SIZE


async def test_a_hundred_simultaneous_blobs_are_complete(registry, make_program):
    program = await make_program(fetch={"max_waiting_per_client": 100})
    digests = [registry.add_blob(bytes([n]) * 50_000) for n in range(100)]
    answers = await asyncio.gather(*(program.blob(digest) for digest in digests))
    assert [answer.digest for answer in answers] == digests
    assert registry.count("/token") == 1


async def test_a_reader_of_a_running_download_keeps_reading_after_its_commit(
    registry, program: Program, blob
):
    content = bytes(20 * MIB)
    large = registry.add_blob(content)
    peer = await RawClient.connect(program.url, receive_buffer=4096)
    peer.send(f"GET /v2/library/app/blobs/{large} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await peer.read(1)
    await program.wait_for_downloads()
    assert program.stored() == {large}
    answer = await peer.read_response()
    await peer.close()
    assert digest_of(answer.body) == large
