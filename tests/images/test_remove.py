"""Removing images frees the blobs that no other image uses."""

import pytest

from proxy.errors import DeniedError, NotFoundError
from tests.fakes.content import digest_of
from tests.fakes.images import blobs_of, push_manifest
from tests.support.admin_api import (
    APP,
    BASE,
    OTHER,
    OWN,
    call,
    list_images,
    pull_parts,
    remove_images,
)


@pytest.fixture
async def two_images(registry, program):
    """Pull `app:v1` and `me/other:v1`, which share one layer and the config."""
    for repository, own in ((APP, OWN), ("me/other", OTHER)):
        digest = push_manifest(registry, repository, [BASE, own], tag="v1")
        await pull_parts(program, repository, "v1", *blobs_of(registry, repository, digest))


async def test_blobs_that_other_images_use_stay(program, two_images):
    unique = (await list_images(program))["app:v1"]["unique"]
    before = program.stored()
    expected = await remove_images(program, "app:v1", dry_run=True)
    assert program.stored() == before
    assert set(await list_images(program)) == {"app:v1", "me/other:v1"}
    assert await remove_images(program, "app:v1") == expected
    assert expected == {"images": ["app:v1"], "blobs": 2, "bytes": unique}
    assert len(before - program.stored()) == 2
    assert digest_of(OWN) not in program.stored()
    (remaining,) = (await list_images(program)).values()
    assert (remaining["name"], remaining["state"]) == ("me/other:v1", "complete")
    assert remaining["unique"] == remaining["size"]
    assert await program.metric("pullcache_evictions_total", reason="removed") == 2
    assert await program.metric("pullcache_store_blobs") == len(program.stored())


async def test_removing_the_last_image_leaves_an_empty_store(program, two_images):
    removed = await remove_images(program, "app:v1", "me/other:v1")
    assert removed["blobs"] == 6
    assert program.stored() == set()
    assert await program.metric("pullcache_store_bytes") == 0


async def test_a_removed_image_is_pulled_again(registry, program, two_images):
    await remove_images(program, "app:v1")
    registry.requests.clear()
    digest = registry.repository(APP).tags["v1"]
    await pull_parts(program, APP, "v1", *blobs_of(registry, APP, digest))
    assert registry.seen("manifests/v1")
    assert (await list_images(program))["app:v1"]["state"] == "complete"


async def test_a_removed_image_is_not_served_by_its_digests(registry, program, two_images):
    await remove_images(program, "app:v1")
    registry.repository(APP).blobs.clear()
    assert (await program.blob(digest_of(BASE), "me/other")).status == 200
    assert (await program.blob(digest_of(BASE), APP)).status == 404


async def test_removing_one_of_two_tags_frees_nothing_and_a_digest_stands_for_both(
    registry, program, two_images
):
    digest = registry.repository(APP).tags["v1"]
    registry.move_tag(APP, "latest", digest)
    await pull_parts(program, APP, "latest")
    images = await list_images(program)
    assert (images["app:v1"]["unique"], images["app:latest"]["unique"]) == (0, 0)
    removed = await remove_images(program, f"app@{digest}", dry_run=True)
    assert (set(removed["images"]), removed["blobs"]) == ({"app:v1", "app:latest"}, 2)
    assert (await remove_images(program, "app:v1"))["blobs"] == 0
    assert (await remove_images(program, "app:latest"))["blobs"] == 2


async def test_a_signature_is_removed_with_its_subject(registry, program, two_images):
    subject = registry.repository(APP).tags["v1"]
    signature = push_manifest(registry, APP, [b"signature"], subject=subject)
    await pull_parts(program, APP, signature, *blobs_of(registry, APP, signature))
    await remove_images(program, "app:v1")
    assert signature not in program.stored()
    assert digest_of(b"signature") not in program.stored()


async def test_with_one_unknown_or_pinned_image_none_is_removed(program, two_images):
    with pytest.raises(NotFoundError, match="app:none is not in the store"):
        await remove_images(program, "app:v1", "app:none")
    await call(program, "post", "/api/v1/images/pin", {"images": ["me/other:v1"]})
    with pytest.raises(DeniedError, match="me/other:v1 is pinned"):
        await remove_images(program, "app:v1", "me/other:v1")
    assert set(await list_images(program)) == {"app:v1", "me/other:v1"}
    assert (await remove_images(program, "me/other:v1", force=True))["blobs"] == 2
    assert await program.metric("pullcache_store_pinned_bytes") == 0


async def test_images_of_an_upstream_that_is_no_longer_configured_can_be_removed(
    registry, make_program
):
    program = await make_program(upstreams={"old.example": {"url": registry.url}})
    push_manifest(registry, "me/app", [OWN], tag="v1")
    await pull_parts(program, "me/app", "v1?ns=old.example")
    await program.stop()
    program.upstreams = {"docker.io": {"url": registry.url}}
    await program.start()
    assert set(await list_images(program)) == {"old.example/me/app:v1"}
    assert (await remove_images(program, "old.example/me/app:v1"))["blobs"] == 1
