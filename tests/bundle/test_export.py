"""Images leave the store as one tar that every loader reads, the same bytes each time."""

import asyncio
import json
from typing import Any

import pytest

from proxy.cli.api_client import AdminClient
from proxy.errors import (
    DaemonUnavailableError,
    DeniedError,
    InvalidNameError,
    InvalidReferenceError,
    UnknownManifestError,
)
from tests.fakes.content import digest_of
from tests.fakes.faults import flip
from tests.fakes.gallery import parts_of, push_index, push_manifest
from tests.support.admin_api import pull as pull_by_digest
from tests.support.bundles import APP, LAYERS, NAME, REF_NAME, blobs, export, files, path, pull
from tests.support.program import Program

LIBRARY = "library/app"


async def plan(program: Program, *images: str) -> Any:
    """Return what the program says an export would hold."""
    api = AdminClient(program.root)
    return await asyncio.to_thread(api.post, "/api/v1/export/plan", {"images": images})


async def test_a_bundle_is_a_layout_that_holds_the_bytes_of_the_store(registry, program):
    image = registry.add_image(layers=LAYERS, index=True)
    await pull(program, image)
    bundle = await export(program, "app")
    assert blobs(bundle) == program.stored()
    content = files(bundle)
    assert json.loads(content["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    (listed,) = json.loads(content["index.json"])["manifests"]
    assert (listed["digest"], listed["mediaType"]) == (image.digest, image.media_type)
    assert listed["annotations"][NAME] == f"{APP}:latest"
    assert listed["annotations"][REF_NAME] == "latest"
    (loadable,) = json.loads(content["manifest.json"])
    assert loadable["RepoTags"] == [f"{APP}:latest"]
    assert loadable["Config"] == path(image.config)
    assert loadable["Layers"] == [path(layer) for layer in image.layers]


async def test_what_a_bundle_is_about_comes_before_its_layers(registry, program):
    image = registry.add_image(layers=LAYERS, index=True)
    await pull(program, image)
    names = [*files(await export(program, "app"))]
    assert names[:4] == ["oci-layout", "index.json", "pullcache.json", "manifest.json"]
    manifests = [path(digest) for digest in (image.digest, *image.manifests.values())]
    assert names[4:7] == manifests
    assert names[-2:] == [path(layer) for layer in image.layers]


async def test_the_same_images_are_the_same_bytes_however_they_are_asked_for(registry, program):
    for name in ("library/one", "library/two"):
        await pull(program, registry.add_image(name, layers=LAYERS, index=True))
    first = await export(program, "one", "two:latest")
    program.clock.turn(1000)
    await program.restart()
    assert await export(program, "docker.io/library/two", "one", "one:latest") == first


async def test_a_tag_that_two_images_have_is_spelled_in_full(registry, program):
    for name in ("library/one", "library/two"):
        await pull(program, registry.add_image(name))
    content = files(await export(program, "one", "two"))
    named = [one["annotations"][REF_NAME] for one in json.loads(content["index.json"])["manifests"]]
    assert named == ["docker.io/library/one:latest", "docker.io/library/two:latest"]


async def test_an_image_by_digest_has_no_tag(registry, program):
    image = registry.add_image()
    await pull(program, image)
    content = files(await export(program, f"app@{image.digest}"))
    (listed,) = json.loads(content["index.json"])["manifests"]
    assert listed["annotations"] == {NAME: f"{APP}@{image.digest}"}
    assert [one["RepoTags"] for one in json.loads(content["manifest.json"])] == [[]]


async def test_platforms_that_were_not_pulled_are_left_out_and_named(registry, program):
    image = registry.add_image(layers=LAYERS, index=True)
    await program.pull(image)
    await program.settled()
    bundle = await export(program, "app")
    assert blobs(bundle) == {image.digest, image.manifest, *image.blobs}
    (exported,) = (await plan(program, "app"))["images"]
    assert (exported["platforms"], exported["skipped_platforms"]) == (
        ["linux/amd64"],
        ["linux/arm64"],
    )


async def test_only_the_platforms_that_are_named_go_out(registry, program):
    image = registry.add_image(index=True, platforms=("linux/amd64", "linux/arm64"))
    await pull(program, image)
    bundle = await export(program, "app", platforms=["linux/arm64"])
    assert image.manifests["linux/arm64"] in blobs(bundle)
    assert image.manifests["linux/amd64"] not in blobs(bundle)
    (loadable,) = json.loads(files(bundle)["manifest.json"])
    assert loadable["Config"] != path(image.config)


@pytest.mark.parametrize(
    ("asked", "taken"),
    [("linux/aarch64", "linux/arm64/v8"), ("linux/arm/v7", "linux/arm/v6"), ("linux/arm", None)],
)
async def test_of_an_index_goes_out_what_clients_of_a_platform_take(
    registry, program, asked, taken
):
    made = ("linux/amd64", "linux/arm64/v8", "linux/arm/v6", "linux/arm/v5")
    manifests = {one: push_manifest(registry, LIBRARY, [LAYERS[0]], platform=one) for one in made}
    index = push_index(registry, LIBRARY, "latest", manifests)
    for one in manifests.values():
        parts = parts_of(registry, LIBRARY, one)
        await pull_by_digest(program, LIBRARY, "latest", one, *parts)
    found = blobs(await export(program, "app", platforms=[asked]))
    expected = manifests[taken or "linux/arm/v6"]
    assert found == {index, expected, *parts_of(registry, LIBRARY, expected)}


async def test_a_plain_image_for_another_platform_than_is_asked_is_an_error(registry, program):
    await pull(program, registry.add_image())
    await export(program, "app", platforms=["linux/amd64"])
    with pytest.raises(UnknownManifestError, match="no linux/arm64, only linux/amd64"):
        await export(program, "app", platforms=["linux/arm64"])
    with pytest.raises(InvalidReferenceError, match="not a platform"):
        await export(program, "app", platforms=["arm64"])


async def test_an_attestation_that_was_not_pulled_is_no_platform_that_is_left_out(
    registry, program
):
    manifests = {
        "linux/amd64": push_manifest(registry, LIBRARY, [LAYERS[0]]),
        "unknown/unknown": push_manifest(registry, LIBRARY, [b"provenance"]),
    }
    push_index(registry, LIBRARY, "latest", manifests)
    digest = manifests["linux/amd64"]
    await pull_by_digest(program, LIBRARY, "latest", digest, *parts_of(registry, LIBRARY, digest))
    (exported,) = (await plan(program, "app"))["images"]
    assert (exported["platforms"], exported["skipped_platforms"]) == (["linux/amd64"], [])


async def test_docker_loads_amd64_where_there_is_a_choice(registry, program):
    image = registry.add_image(index=True, platforms=("linux/arm64", "linux/amd64"))
    await pull(program, image)
    (loadable,) = json.loads(files(await export(program, "app"))["manifest.json"])
    config = json.loads(files(await export(program, "app"))[loadable["Config"]])
    assert config["architecture"] == "amd64"


@pytest.mark.parametrize("platforms", [["linux/arm64"], ["linux/s390x"]])
async def test_a_platform_that_is_not_here_is_an_error(registry, program, platforms):
    image = registry.add_image(index=True)
    await program.pull(image)
    await program.settled()
    with pytest.raises(UnknownManifestError, match="app:latest"):
        await export(program, "app", platforms=platforms)


async def test_an_image_that_is_not_whole_is_an_error_that_says_so(registry, program):
    image = registry.add_image(layers=LAYERS)
    await pull(program, image)
    await program.stop()
    (program.root / path(image.layers[0])).unlink()
    await program.start()
    with pytest.raises(UnknownManifestError, match=image.layers[0]):
        await export(program, "app")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("library/unseen", UnknownManifestError),
        (f"app@sha256:{'0' * 64}", UnknownManifestError),
        ("quay.io/x/y", DeniedError),
        ("NOT A NAME", InvalidNameError),
    ],
)
async def test_an_image_that_cannot_be_had_is_an_error(program, name, error):
    with pytest.raises(error):
        await export(program, name)


async def test_what_an_earlier_bundle_has_is_left_out(registry, program):
    base = registry.add_image(tag="1", layers=LAYERS)
    await pull(program, base)
    earlier = await export(program, "app:1")
    newer = registry.add_image(tag="2", layers=(*LAYERS, b"third"))
    await pull(program, newer)
    delta = await export(program, "app:1", "app:2", exclude=blobs(earlier))
    assert blobs(delta) == {newer.digest, newer.config, digest_of(b"third")}
    # What docker cannot load from this alone is not offered to it.
    assert "manifest.json" not in files(delta)


async def test_bytes_that_rotted_on_the_disk_are_not_handed_on(registry, program):
    image = registry.add_image(layers=LAYERS)
    await pull(program, image)
    rotten = program.root / path(image.layers[0])
    rotten.write_bytes(flip(rotten.read_bytes(), 100))
    with pytest.raises(DaemonUnavailableError):
        await export(program, "app")
    assert not rotten.exists()


async def test_attestations_go_along_and_are_nothing_to_load(registry, program):
    image = registry.add_image(index=True, platforms=("linux/amd64", "unknown/unknown"))
    await pull(program, image)
    bundle = await export(program, "app")
    assert image.manifests["unknown/unknown"] in blobs(bundle)
    assert len(json.loads(files(bundle)["manifest.json"])) == 1
    only = await export(program, "app", platforms=["linux/amd64"])
    assert image.manifests["unknown/unknown"] not in blobs(only)


async def test_names_too_long_for_a_plain_header_survive(registry, program):
    layer = b"by its longer name"
    digest = digest_of(layer, "sha512")
    image = registry.add_image()
    document = registry.repositories[image.repository].manifests[image.digest].document
    registry.add_blob(layer, image.repository, algorithm="sha512")
    document["layers"].append({**document["layers"][0], "digest": digest, "size": len(layer)})
    content = json.dumps(document).encode()
    registry.add_manifest(image.repository, "latest", content, image.media_type)
    await program.manifest(image)
    for named in (document["config"], *document["layers"]):
        assert (await program.blob(named["digest"])).status == 200
    await program.settled()
    bundle = await export(program, "app")
    assert digest in blobs(bundle)
