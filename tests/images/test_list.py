"""The list of stored images: states, sizes and times."""

import pytest

from tests.fakes.images import blobs_of, push_manifest
from tests.support.admin_api import (
    APP,
    BASE,
    FOREIGN,
    NATIVE,
    OTHER,
    OWN,
    list_images,
    pull_parts,
)
from tests.support.bundles import blob_path


async def test_an_empty_store_has_no_images(program):
    assert await list_images(program) == {}


async def test_a_platform_is_complete_when_all_its_blobs_are_stored(registry, program, app):
    config, base, own = blobs_of(registry, APP, app[NATIVE])
    await pull_parts(program, APP, "v1", app[NATIVE], config, base)
    (image,) = (await list_images(program)).values()
    native, foreign = image["platforms"]
    assert (image["name"], image["digest"]) == ("app:v1", app["index"])
    assert image["state"] == "partial"
    assert (native["platform"], native["state"]) == (NATIVE, "partial")
    assert native["missing"] == [{"digest": own, "size": len(OWN)}]
    assert (foreign["platform"], foreign["state"]) == (FOREIGN, "absent")
    assert [blob["digest"] for blob in foreign["missing"]] == [app[FOREIGN]]
    await pull_parts(program, APP, "v1", own)
    (image,) = (await list_images(program)).values()
    assert image["state"] == "complete"
    assert image["platforms"][0]["missing"] == []


async def test_sizes_are_the_stored_bytes_and_those_of_this_image_alone(registry, program):
    manifest = push_manifest(registry, APP, [BASE, OWN], tag="v1")
    push_manifest(registry, "me/other", [BASE, OTHER], tag="v1")
    for repository, tag in ((APP, "v1"), ("me/other", "v1")):
        digest = registry.repository(repository).tags[tag]
        await pull_parts(program, repository, tag, *blobs_of(registry, repository, digest))
    images = await list_images(program)
    assert set(images) == {"app:v1", "me/other:v1"}
    image, other = images["app:v1"], images["me/other:v1"]
    config, *layers = blobs_of(registry, APP, manifest)
    on_disk = sum(
        (program.root / blob_path(digest)).stat().st_size for digest in (manifest, config, *layers)
    )
    assert image["size"] == on_disk
    # The two images have the same config.
    shared = len(BASE) + len(registry.repository(APP).blobs[config])
    assert image["unique"] == on_disk - shared
    assert image["size"] - image["unique"] == other["size"] - other["unique"]


async def test_a_plain_manifest_has_the_platform_of_its_config(registry, program):
    digest = push_manifest(registry, APP, [OWN], tag="arm", platform="linux/arm/v6")
    await pull_parts(program, APP, "arm")
    (image,) = (await list_images(program)).values()
    assert [platform["platform"] for platform in image["platforms"]] == [""]
    await pull_parts(program, APP, "arm", *blobs_of(registry, APP, digest))
    (image,) = (await list_images(program)).values()
    assert [platform["platform"] for platform in image["platforms"]] == ["linux/arm/v6"]


async def test_an_image_pulled_by_digest_is_listed_by_digest(registry, program):
    digest = push_manifest(registry, APP, [OWN])
    await pull_parts(program, APP, digest)
    assert set(await list_images(program)) == {f"app@{digest}"}


async def test_times_are_of_the_commit_and_of_the_last_use(registry, program):
    push_manifest(registry, APP, [OWN], tag="v1")
    await pull_parts(program, APP, "v1")
    program.clock.advance(5000)
    before = (await list_images(program))["app:v1"]
    await pull_parts(program, APP, "v1")
    after = (await list_images(program))["app:v1"]
    assert after["used"] - before["used"] == pytest.approx(5000)
    assert after["cached"] == before["cached"]


async def test_a_filter_is_a_part_of_a_name_or_a_glob(registry, program):
    for name in ("library/nginx", "me/nginx-extra", "me/app"):
        push_manifest(registry, name, [OWN], tag="v1")
        await pull_parts(program, name, "v1")
    assert set(await list_images(program, "nginx")) == {"nginx:v1", "me/nginx-extra:v1"}
    assert set(await list_images(program, "me/*")) == {"me/nginx-extra:v1", "me/app:v1"}
    assert set(await list_images(program, "*:v1")) == {
        "nginx:v1",
        "me/nginx-extra:v1",
        "me/app:v1",
    }
    assert await list_images(program, "v2") == {}


async def test_sizes_are_the_same_in_a_long_list_as_in_a_short_one(registry, program):
    for number in range(60):
        push_manifest(registry, f"me/app{number}", [BASE, str(number).encode()], tag="v1")
        await pull_parts(program, f"me/app{number}", "v1")
    images = await list_images(program)
    assert len(images) == 60
    assert images["me/app7:v1"] == (await list_images(program, "me/app7"))["me/app7:v1"]


async def test_an_image_is_complete_without_its_foreign_layers(registry, program):
    digest = push_manifest(registry, APP, [OWN], tag="v1", foreign=[OTHER])
    config, own, _ = blobs_of(registry, APP, digest)
    await pull_parts(program, APP, "v1", config, own)
    assert (await list_images(program))["app:v1"]["state"] == "complete"


async def test_images_are_listed_in_pages_after_a_name(registry, program):
    for name in ("library/app", "me/app", "me/other"):
        for tag in ("v1", "v2"):
            await program.manifest(registry.add_image(name, tag), tag)
    digest = registry.add_image("me/other", "unused", [b"by digest"]).digest
    await program.manifest("me/other", digest)
    names = ["app:v1", "app:v2", "me/app:v1", "me/app:v2"]
    names += [f"me/other@{digest}", "me/other:v1", "me/other:v2"]
    assert list(await list_images(program)) == names
    for size in (1, 2, 3, 6, 7, 8):
        found: list[str] = []
        while page := await list_images(program, after=found[-1] if found else "", limit=size):
            assert len(page) <= size
            found += page
        assert found == names
    assert list(await list_images(program, "v1", after="me/app:v1")) == ["me/other:v1"]
    assert list(await list_images(program, "v*", limit=1)) == []
    assert list(await list_images(program, "*:v?", after="app:v2", limit=1)) == ["me/app:v1"]
    # What it follows need not exist.
    assert next(iter(await list_images(program, after="me/app:v15"))) == "me/app:v2"
