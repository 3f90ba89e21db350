"""Prefetch: pulling a manifest starts its layers, behind the downloads of clients."""

import asyncio

import pytest
from structlog.testing import capture_logs

from proxy.cache import prefetch
from tests.fakes.faults import Fault
from tests.fakes.registry import FakeRegistry

MIB = 1 << 20


@pytest.fixture
async def program(make_program):
    return await make_program(fetch={"prefetch": "layers"})


async def test_a_get_of_a_manifest_downloads_its_missing_layers(registry, program):
    image = registry.add_image()
    await program.manifest(image)
    await program.manifest(image, image.manifest)
    await program.wait_for_downloads()
    assert set(image.blobs) <= program.stored()


@pytest.mark.parametrize("method", ["HEAD", "GET"])
async def test_a_head_or_an_index_downloads_nothing(registry, program, method):
    image = registry.add_image(index=True)
    assert image.digest != image.manifest
    await program.manifest(image, method=method)
    if method == "HEAD":
        await program.manifest(image, image.manifest, method="HEAD")
    await program.wait_for_downloads()
    assert program.stored().isdisjoint(image.blobs)


async def test_with_prefetch_off_nothing_is_downloaded(registry, make_program):
    program = await make_program(fetch={"prefetch": "off"})
    image = registry.add_image()
    await program.manifest(image, image.manifest)
    await program.wait_for_downloads()
    assert program.stored() == {image.manifest}


async def test_a_layer_is_fetched_once_by_prefetch_and_client_together(registry, program):
    image = registry.add_image(layers=[bytes([n]) * MIB for n in range(6)])
    await program.pull(image)
    for digest in image.blobs:
        assert registry.count(registry.body_of(digest)) == 1


async def test_a_clients_download_does_not_wait_for_prefetched_ones(registry, make_program):
    program = await make_program(fetch={"prefetch": "layers", "max_downloads": 4})
    image = registry.add_image(layers=[bytes([n]) * MIB for n in range(10)])
    other = registry.add_blob(b"urgent")
    release = asyncio.Event()
    for digest in image.blobs:
        registry.fail(registry.body_of(digest), Fault(stall_at=0, until=release))
    await program.manifest(image, image.manifest)
    async with asyncio.timeout(10):
        assert (await program.blob(other, image.repository)).body == b"urgent"
    release.set()
    await program.wait_for_downloads()


async def test_a_failed_prefetch_is_not_repeated_at_every_pull(registry, program):
    image = registry.add_image()
    for digest in image.blobs:
        registry.fail(registry.body_of(digest), Fault(status=404, body=b""), times=None)
    for _ in range(5):
        await program.manifest(image, image.manifest)
    await program.wait_for_downloads()
    for digest in image.blobs:
        assert registry.count(registry.body_of(digest)) <= 1


async def test_a_layer_that_is_stored_for_another_repository_is_proven_before_clients_ask(
    registry, program
):
    base, image = (
        registry.add_image(name, layers=[b"base" * 1000]) for name in ("me/base", "me/app")
    )
    await program.manifest(base)
    await registry.until(lambda: registry.count("/registry-v2/") == 2)
    await program.wait_for_downloads()
    await program.manifest(image)
    await registry.until(lambda: sum(one.done for one in registry.seen("/registry-v2/")) == 4)
    assert [one.bytes_sent for one in registry.seen("/registry-v2/")][2:] == [1, 1]
    # The proof arrives before a link is written.
    async with asyncio.timeout(10), registry.down():
        for digest in image.blobs:
            while (await program.blob(digest, "me/app")).digest != digest:
                pass


async def test_a_layer_that_only_another_upstream_has_sent_is_fetched_anew(make_program, registry):
    async with FakeRegistry() as other:
        program = await make_program(
            fetch={"prefetch": "layers"}, upstreams={"other.test": {"url": other.url}}
        )
        image = registry.add_image("me/app")
        other.add_image("me/app")
        for name in ("me/app", "other.test/me/app"):
            await program.manifest(name)
            await program.wait_for_downloads()
        assert other.bytes_sent(other.body_of(image.layers[0])) == len(b"layer")
        async with registry.down(), other.down():
            for digest in image.blobs:
                assert (await program.blob(digest, "other.test/me/app")).digest == digest


async def test_m05_few_blobs_are_prefetched_at_a_time_and_the_rest_waits(
    registry, make_program, monkeypatch
):
    monkeypatch.setattr(prefetch, "MAX_STARTED", 12)
    program = await make_program(fetch={"prefetch": "layers", "max_downloads": 4})
    registry.pull_limit = None
    release = asyncio.Event()
    images = [
        registry.add_image(
            f"library/app{number}", layers=[b"%d.%d" % (number, n) for n in range(9)]
        )
        for number in range(5)
    ]
    registry.fail("GET /registry-v2/", Fault(stall_at=0, until=release), times=None)
    for image in images:
        await program.manifest(image)
    assert 0 < await program.metric("pullcache_downloads_in_progress") <= 12
    release.set()
    stored = {digest for image in images for digest in image.blobs}
    async with asyncio.timeout(20):
        while not stored <= program.stored():
            await registry.until(lambda: True)
            await asyncio.sleep(0.01)
    assert await program.metric("pullcache_prefetch_dropped_total") == 0


async def test_m05_blobs_beyond_the_queue_are_fetched_when_clients_ask(
    registry, make_program, monkeypatch
):
    monkeypatch.setattr(prefetch, "MAX_QUEUED_BLOBS", 5)
    monkeypatch.setattr(prefetch, "MAX_STARTED", 2)
    program = await make_program(fetch={"prefetch": "layers", "max_downloads": 4})
    image = registry.add_image(layers=[b"%d" % number for number in range(50)])
    with capture_logs() as logs:
        await program.manifest(image)
    assert [one["blobs"] for one in logs if one["event"] == "prefetch_queue_full"] == [5]
    await program.wait_for_downloads()
    assert await program.metric("pullcache_prefetch_dropped_total") == len(image.blobs) - 5
    for digest in image.blobs:
        assert (await program.blob(digest)).digest == digest
