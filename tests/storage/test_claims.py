"""A length that upstream merely claims reserves nothing and evicts nothing."""

import asyncio

from tests.fakes.faults import Fault

MIB = 1 << 20


async def test_a_claimed_length_evicts_only_for_bytes_that_have_arrived(registry, make_program):
    program = await make_program(store={"max_size": "20MB"}, fetch={"connections_per_blob": 1})
    kept = [registry.add_blob(bytes([number]) * MIB) for number in range(10)]
    for digest in kept:
        assert (await program.blob(digest)).digest == digest
    await program.wait_for_downloads()
    claimed = registry.add_blob(b"x" * 18 * MIB)
    go_on = asyncio.Event()
    registry.fail(registry.body_of(claimed), Fault(stall_at=2 * MIB, until=go_on), times=None)
    async with program.opened(f"/v2/library/app/blobs/{claimed}") as response:
        await response.content.readexactly(2 * MIB - 1)
        assert program.stored() == set(kept)
        assert await program.metric("pullcache_store_reserved_bytes") < 5 * MIB
        go_on.set()
        assert len(await response.content.read()) == 16 * MIB + 1
    await program.wait_for_downloads()
    assert claimed in program.stored()
    assert program.disk_usage() <= 20_000_000
