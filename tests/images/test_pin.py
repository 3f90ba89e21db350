"""Pinned images survive eviction, and the store reports when pins leave no space."""

import pytest

from proxy.errors import DeniedError, InvalidReferenceError
from tests.fakes.images import blobs_of, push_manifest
from tests.support.admin_api import (
    APP,
    OTHER,
    OWN,
    call,
    list_images,
    pull_parts,
    remove_images,
)


async def test_pinned_images_survive_eviction_and_the_limit_holds(registry, make_program):
    program = await make_program(store={"max_size": "8MB"})
    response = await call(program, "post", "/api/v1/images/pin", {"images": ["app:v1"]})
    assert response == {"images": ["app:v1"], "absent": ["app:v1"]}
    # The pin of an image that is not stored yet is listed, too.
    (image,) = (await list_images(program)).values()
    assert (image["digest"], image["state"], image["pinned"]) == (None, "absent", True)
    layers = [bytes([number]) * 900_000 for number in range(3)]
    digest = push_manifest(registry, APP, layers, tag="v1")
    blobs = blobs_of(registry, APP, digest)
    await pull_parts(program, APP, "v1", *blobs)
    peak = 0
    for number in range(10):
        other = registry.add_blob(bytes([100 + number]) * 1_500_000, "me/other")
        answer = await program.blob(other, "me/other")
        assert (answer.status, answer.digest) == (200, other)
        peak = max(peak, program.disk_usage())
        await program.wait_for_downloads()
    assert peak <= 8_000_000
    assert {digest, *blobs} <= program.stored()
    assert await program.metric("pullcache_store_pinned_bytes") > 2_700_000
    assert await program.metric("pullcache_evictions_total", reason="size") > 3


async def test_a_store_full_of_pins_passes_other_content_through_and_reports_it(
    registry, make_program
):
    program = await make_program(store={"max_size": "4MB"})
    digest = push_manifest(registry, APP, [bytes(1_400_000), b"1" * 1_400_000], tag="v1")
    await pull_parts(program, APP, "v1", *blobs_of(registry, APP, digest))
    await call(program, "post", "/api/v1/images/pin", {"images": ["app:v1"]})
    before = program.stored()
    other = registry.add_blob(b"2" * 1_500_000, "me/other")
    for _ in range(2):
        answer = await program.blob(other, "me/other")
        assert (answer.status, answer.digest) == (200, other)
    await program.wait_for_downloads()
    assert program.stored() == before
    assert await program.metric("pullcache_uncached_total", reason="pinned") == 2
    status = await call(program, "get", "/api/v1/status")
    assert status["store"]["pinned"] > 2_800_000
    unpinned = await call(program, "post", "/api/v1/images/unpin", {"images": ["app:v1", "app"]})
    assert unpinned == {"images": ["app:v1"]}
    assert (await program.blob(other, "me/other")).status == 200
    await program.wait_for_downloads()
    assert other in program.stored()


async def test_a_pin_follows_its_tag(registry, program):
    old = push_manifest(registry, APP, [OWN], tag="v1")
    await pull_parts(program, APP, "v1", *blobs_of(registry, APP, old))
    await call(program, "post", "/api/v1/images/pin", {"images": ["app:v1"]})
    new = push_manifest(registry, APP, [OTHER], tag="v1")
    program.clock.advance(10_000)
    await pull_parts(program, APP, "v1", *blobs_of(registry, APP, new))
    images = await list_images(program)
    assert {name: image["pinned"] for name, image in images.items()} == {
        "app:v1": True,
        f"app@{old}": False,
    }
    await remove_images(program, f"app@{old}")
    assert new in program.stored()
    assert old not in program.stored()


async def test_an_image_that_may_not_be_pulled_cannot_be_pinned(program):
    for image, error in (("quay.io/me/app", DeniedError), ("NOT", InvalidReferenceError)):
        with pytest.raises(error):
            await call(program, "post", "/api/v1/images/pin", {"images": ["app:v1", image]})
    assert await list_images(program) == {}
