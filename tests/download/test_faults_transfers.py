"""Failing transfers (faults, table U); tests of resumed ones are in `test_download`."""

import asyncio

import pytest

from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.fakes.raw_server import HEAD_END, RawUpstream, RecvUntil, Reset, Send, SendForever, Step

MIB = 1 << 20
BLOB = bytes(range(256)) * (2 * MIB // 256)
DIGEST = digest_of(BLOB)
UNSIZED = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BLOB)


@pytest.mark.parametrize("end", [[], [Reset()]], ids=["fin", "rst"])
async def test_u09_a_body_without_a_length_is_complete_only_if_its_digest_matches(
    make_program, end
):
    cut: list[Step] = [RecvUntil(HEAD_END), Send(UNSIZED + BLOB[:-1]), *end]
    async with RawUpstream(cut) as raw:
        program = await make_program(upstreams={"docker.io": {"url": raw.url}})
        answer = await program.blob(DIGEST)
        assert answer.status == 404 or not answer.is_whole
        assert len(answer.body) < len(BLOB)
        await program.wait_for_downloads()
        assert program.stored() == set()


async def test_u11_bytes_after_the_stated_length_are_discarded(make_program):
    script: list[Step] = [
        RecvUntil(HEAD_END),
        Send(SIZED + BLOB + b"HTTP/1.1 200 OK\r\n\r\nsmuggled" * 100),
    ]
    async with RawUpstream(script) as raw:
        program = await make_program(upstreams={"docker.io": {"url": raw.url}})
        answer = await program.blob(DIGEST)
        assert (answer.status, answer.digest, answer.is_whole) == (200, DIGEST, True)
        await program.wait_for_downloads()
        assert program.stored() == {DIGEST}
        other = await program.blob(digest_of(b"other"))
        assert b"smuggled" not in other.body
        await program.wait_for_downloads()
        assert program.stored() == {DIGEST}


async def test_u12_an_endless_body_stops_with_its_reader_and_stays_within_the_store(
    make_program,
):
    forever: list[Step] = [RecvUntil(HEAD_END), Send(UNSIZED), SendForever(bytes(256 << 10))]
    async with RawUpstream(forever) as raw:
        program = await make_program(
            upstreams={"docker.io": {"url": raw.url}}, store={"max_size": "20MB"}
        )
        async with program.opened(f"/v2/library/app/blobs/{DIGEST}") as response:
            for _ in range(30):
                await response.content.readexactly(MIB)
            assert program.disk_usage() <= 20_000_000
            response.close()
        await program.wait_for_downloads()
        await raw.until_left()
        assert program.stored() == set()


async def test_u13_a_very_slow_transfer_counts_as_stalled_and_is_restarted(registry, make_program):
    program = await make_program(fetch={"stall_timeout": "1s", "min_rate": "1KB"})
    digest = registry.add_blob(BLOB)
    registry.fail(registry.body_of(digest), Fault(rate=200))
    answer = await program.blob(digest)
    assert (answer.status, answer.digest, answer.is_whole) == (200, digest, True)
    assert registry.count(registry.body_of(digest)) == 2
    assert await program.metric("pullcache_upstream_retries_total", reason="transfer") == 1


async def test_u13_a_transfer_that_stays_very_slow_is_given_up(registry, make_program):
    program = await make_program(fetch={"stall_timeout": "200ms", "min_rate": "1KB", "attempts": 2})
    digest = registry.add_blob(BLOB)
    registry.fail(registry.body_of(digest), Fault(rate=200), times=None)
    answer = await program.blob(digest)
    assert not answer.is_whole
    assert registry.count(registry.body_of(digest)) == 2


async def test_u18_a_token_that_expires_during_a_transfer_is_renewed_for_the_rest(
    registry, program
):
    digest = registry.add_blob(BLOB)
    now = asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(stall_at=MIB, until=now, cut_at=MIB))
    async with program.opened(f"/v2/library/app/blobs/{digest}") as response:
        begun = await response.content.readexactly(MIB)
        registry.tokens.revoke()
        now.set()
        assert begun + await response.content.read() == BLOB
    assert registry.count("/token") == 2
    assert registry.bytes_sent(registry.body_of(digest)) == len(BLOB)


async def test_an_outage_during_a_transfer_is_waited_out(registry, make_program):
    program = await make_program(fetch={"attempts": 10})
    digest = registry.add_blob(BLOB)
    now = asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(stall_at=MIB, until=now, cut_at=MIB))
    async with program.opened(f"/v2/library/app/blobs/{digest}") as response:
        begun = await response.content.readexactly(MIB)
        await registry.stop()
        now.set()
        while await program.metric("pullcache_upstream_up"):
            await program.manifest("library/app")
        await registry.start()
        assert begun + await response.content.read() == BLOB
