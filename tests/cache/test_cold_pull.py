"""A cold pull needs few upstream requests, tokens and redirects included."""

import asyncio
import threading

import pytest

from proxy.core import DISK_THREADS
from tests.fakes.faults import Fault

LAYERS = [bytes([n]) * 100_000 for n in range(3)]


@pytest.mark.parametrize("index", [False, True])
async def test_a_cold_pull_of_four_blobs_makes_at_most_twelve_requests(registry, program, index):
    image = registry.add_image(layers=LAYERS, index=index)
    assert len(image.blobs) == 4
    await program.pull(image)
    lines = [f"{seen.status} {seen.line[:60]}" for seen in registry.requests]
    assert len(lines) <= 12, lines
    assert registry.pulls == (2 if index else 1)
    assert registry.count("/token") == 1


async def test_a_warm_pull_makes_no_request_and_one_after_the_ttl_makes_one(registry, program):
    image = registry.add_image(layers=LAYERS, index=True)
    await program.pull(image)
    await program.wait_for_downloads()
    registry.requests.clear()
    await program.pull(image)
    assert registry.requests == []
    program.clock.advance(3600)
    await program.pull(image)
    assert [seen.method for seen in registry.requests] == ["HEAD"]


async def test_twenty_concurrent_clients_cost_as_much_as_one(registry, program):
    image = registry.add_image(layers=LAYERS, index=True)
    await asyncio.gather(*(program.pull(image) for _ in range(20)))
    assert len(registry.requests) <= 12
    for digest in image.blobs:
        assert registry.count(registry.body_of(digest)) == 1


async def test_layers_of_an_earlier_image_are_not_fetched_again(registry, program):
    await program.pull(registry.add_image(layers=LAYERS))
    await program.wait_for_downloads()
    registry.requests.clear()
    newer = registry.add_image(tag="newer", layers=[*LAYERS, b"new"])
    await program.pull(newer)
    fetched = {seen.target for seen in registry.seen("/registry-v2/")}
    assert len(fetched) == 2  # the config and the new layer


async def test_u27_a_new_signed_url_is_requested_after_one_has_expired(registry, program):
    image = registry.add_image(layers=[bytes(2_000_000)])
    layer = image.layers[0]
    expired = asyncio.Event()
    registry.fail(
        registry.body_of(layer), Fault(stall_at=1_000_000, until=expired, cut_at=1_000_000)
    )
    await program.manifest(image)
    async with program.opened(f"/v2/library/app/blobs/{layer}") as response:
        beginning = await response.content.readexactly(900_000)
        registry.expire_addresses()
        registry.tokens.revoke()
        expired.set()
        assert beginning + await response.content.read(-1) == bytes(2_000_000)


async def test_a_docker_schema_2_image_is_pulled_like_any_other(registry, program):
    image = registry.add_image(layers=LAYERS, index=True, docker=True)
    await program.pull(image)
    await program.wait_for_downloads()
    async with registry.down():
        await program.pull(image)


async def test_an_upstream_without_tokens_and_cdn_needs_at_most_six_requests(registry, program):
    registry.auth = registry.cdn = False
    image = registry.add_image(layers=LAYERS)
    await program.pull(image)
    assert len(registry.requests) <= 6


async def test_upstream_is_asked_while_the_ingest_file_is_being_created(registry, program):
    digest = registry.add_blob(LAYERS[0])
    is_requested = threading.Event()
    disk_threads = program.running._core.disk_threads
    busy = [disk_threads.submit(is_requested.wait, 10) for _ in range(DISK_THREADS)]
    async with asyncio.TaskGroup() as group:
        pulling = group.create_task(program.blob(digest))
        await registry.until(lambda: registry.count(registry.body_of(digest)) > 0)
        assert not any(future.done() for future in busy)
        is_requested.set()
    assert pulling.result().is_whole
    await program.wait_for_downloads()
    assert program.stored() == {digest}


async def test_a_pull_succeeds_uncached_if_the_ingest_file_cannot_be_created(registry, program):
    digest = registry.add_blob(LAYERS[0])
    ingests = (program.root / "ingest").rename(program.root / "elsewhere")
    for _ in range(2):
        assert (await program.blob(digest)).is_whole
        await program.wait_for_downloads()
    assert await program.metric("pullcache_uncached_total", reason="disk_error") == 2
    ingests.rename(program.root / "ingest")
    assert (await program.blob(digest)).is_whole
    await program.wait_for_downloads()
    assert program.stored() == {digest}
