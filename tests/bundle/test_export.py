"""Exports: one tar that every loader reads, with the same bytes each time."""

import asyncio
import io
import json
from typing import Any

import pytest

from proxy.cli.api_client import AdminClient
from proxy.errors import (
    BusyError,
    DaemonUnavailableError,
    DeniedError,
    InvalidNameError,
    InvalidReferenceError,
    UnknownManifestError,
)
from tests.fakes.content import digest_of
from tests.fakes.faults import flip
from tests.fakes.images import blobs_of, push_index, push_manifest
from tests.support.admin_api import APP, pull_parts
from tests.support.bundles import (
    APP_FULL_NAME,
    IMAGE_NAME_ANNOTATION,
    LAYERS,
    REF_NAME_ANNOTATION,
    blob_digests,
    blob_path,
    export_bundle,
    pull_all_platforms,
    unpack_tar,
)
from tests.support.program import Program

MIB = 1 << 20


async def plan_export(program: Program, *images: str) -> Any:
    """Return the plan of an export."""
    api = AdminClient(program.root)
    return await asyncio.to_thread(api.post, "/api/v1/export/plan", {"images": images})


async def test_a_bundle_is_a_layout_with_the_bytes_of_the_store(registry, program):
    image = registry.add_image(layers=LAYERS, index=True)
    await pull_all_platforms(program, image)
    bundle = await export_bundle(program, "app")
    assert blob_digests(bundle) == program.stored()
    content = unpack_tar(bundle)
    assert json.loads(content["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    (listed,) = json.loads(content["index.json"])["manifests"]
    assert (listed["digest"], listed["mediaType"]) == (image.digest, image.media_type)
    assert listed["annotations"][IMAGE_NAME_ANNOTATION] == f"{APP_FULL_NAME}:latest"
    assert listed["annotations"][REF_NAME_ANNOTATION] == "latest"
    (loadable,) = json.loads(content["manifest.json"])
    assert loadable["RepoTags"] == [f"{APP_FULL_NAME}:latest"]
    assert loadable["Config"] == blob_path(image.config)
    assert loadable["Layers"] == [blob_path(layer) for layer in image.layers]


async def test_documents_and_manifests_come_before_layers(registry, program):
    image = registry.add_image(layers=LAYERS, index=True)
    await pull_all_platforms(program, image)
    names = [*unpack_tar(await export_bundle(program, "app"))]
    assert names[:4] == ["oci-layout", "index.json", "pullcache.json", "manifest.json"]
    manifests = [blob_path(digest) for digest in (image.digest, *image.manifests.values())]
    assert names[4:7] == manifests
    assert names[-2:] == [blob_path(layer) for layer in image.layers]


async def test_the_same_images_in_another_order_make_the_same_bytes(registry, program):
    for name in ("library/one", "library/two"):
        await pull_all_platforms(program, registry.add_image(name, layers=LAYERS, index=True))
    first = await export_bundle(program, "one", "two:latest")
    program.clock.advance(1000)
    await program.restart()
    assert await export_bundle(program, "docker.io/library/two", "one", "one:latest") == first


async def test_a_tag_that_two_images_have_is_written_as_a_full_name(registry, program):
    for name in ("library/one", "library/two"):
        await pull_all_platforms(program, registry.add_image(name))
    content = unpack_tar(await export_bundle(program, "one", "two"))
    listed = json.loads(content["index.json"])["manifests"]
    names = [image["annotations"][REF_NAME_ANNOTATION] for image in listed]
    assert names == ["docker.io/library/one:latest", "docker.io/library/two:latest"]


async def test_an_image_by_digest_has_no_tag(registry, program):
    image = registry.add_image()
    await pull_all_platforms(program, image)
    content = unpack_tar(await export_bundle(program, f"app@{image.digest}"))
    (listed,) = json.loads(content["index.json"])["manifests"]
    assert listed["annotations"] == {IMAGE_NAME_ANNOTATION: f"{APP_FULL_NAME}@{image.digest}"}
    (loadable,) = json.loads(content["manifest.json"])
    assert loadable["RepoTags"] == []


async def test_platforms_that_were_not_pulled_are_skipped_and_reported(registry, program):
    image = registry.add_image(layers=LAYERS, index=True)
    await program.pull(image)
    await program.wait_for_downloads()
    bundle = await export_bundle(program, "app")
    assert blob_digests(bundle) == {image.digest, image.manifest, *image.blobs}
    (exported,) = (await plan_export(program, "app"))["images"]
    assert exported["platforms"] == ["linux/amd64"]
    assert exported["skipped_platforms"] == ["linux/arm64"]


async def test_only_the_requested_platforms_are_exported(registry, program):
    image = registry.add_image(index=True, platforms=("linux/amd64", "linux/arm64"))
    await pull_all_platforms(program, image)
    bundle = await export_bundle(program, "app", platforms=["linux/arm64"])
    assert image.manifests["linux/arm64"] in blob_digests(bundle)
    assert image.manifests["linux/amd64"] not in blob_digests(bundle)
    (loadable,) = json.loads(unpack_tar(bundle)["manifest.json"])
    assert loadable["Config"] != blob_path(image.config)


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("linux/aarch64", "linux/arm64/v8"),
        ("linux/arm/v7", "linux/arm/v6"),
        ("linux/arm", "linux/arm/v6"),
    ],
)
async def test_a_platform_selects_the_manifest_that_its_clients_take(
    registry, program, requested, expected
):
    platforms = ("linux/amd64", "linux/arm64/v8", "linux/arm/v6", "linux/arm/v5")
    manifests = {
        platform: push_manifest(registry, APP, [LAYERS[0]], platform=platform)
        for platform in platforms
    }
    index = push_index(registry, APP, "latest", manifests)
    for digest in manifests.values():
        await pull_parts(program, APP, "latest", digest, *blobs_of(registry, APP, digest))
    exported = blob_digests(await export_bundle(program, "app", platforms=[requested]))
    manifest = manifests[expected]
    assert exported == {index, manifest, *blobs_of(registry, APP, manifest)}


async def test_a_plain_image_for_another_platform_than_requested_is_an_error(registry, program):
    await pull_all_platforms(program, registry.add_image())
    await export_bundle(program, "app", platforms=["linux/amd64"])
    with pytest.raises(UnknownManifestError, match="no platform linux/arm64, only linux/amd64"):
        await export_bundle(program, "app", platforms=["linux/arm64"])
    with pytest.raises(InvalidReferenceError, match="not a platform"):
        await export_bundle(program, "app", platforms=["arm64"])


async def test_an_attestation_that_was_not_pulled_is_not_a_skipped_platform(registry, program):
    manifests = {
        "linux/amd64": push_manifest(registry, APP, [LAYERS[0]]),
        "unknown/unknown": push_manifest(registry, APP, [b"provenance"]),
    }
    push_index(registry, APP, "latest", manifests)
    digest = manifests["linux/amd64"]
    await pull_parts(program, APP, "latest", digest, *blobs_of(registry, APP, digest))
    (exported,) = (await plan_export(program, "app"))["images"]
    assert (exported["platforms"], exported["skipped_platforms"]) == (["linux/amd64"], [])


async def test_docker_loads_amd64_if_there_are_several_platforms(registry, program):
    image = registry.add_image(index=True, platforms=("linux/arm64", "linux/amd64"))
    await pull_all_platforms(program, image)
    content = unpack_tar(await export_bundle(program, "app"))
    (loadable,) = json.loads(content["manifest.json"])
    config = json.loads(content[loadable["Config"]])
    assert config["architecture"] == "amd64"


@pytest.mark.parametrize("platforms", [["linux/arm64"], ["linux/s390x"]])
async def test_a_requested_platform_that_is_not_stored_is_an_error(registry, program, platforms):
    image = registry.add_image(index=True)
    await program.pull(image)
    await program.wait_for_downloads()
    with pytest.raises(UnknownManifestError, match="app:latest"):
        await export_bundle(program, "app", platforms=platforms)


async def test_an_incomplete_image_is_an_error_that_names_a_missing_blob(registry, program):
    image = registry.add_image(layers=LAYERS)
    await pull_all_platforms(program, image)
    await program.stop()
    (program.root / blob_path(image.layers[0])).unlink()
    await program.start()
    with pytest.raises(UnknownManifestError, match=image.layers[0]):
        await export_bundle(program, "app")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("library/unseen", UnknownManifestError),
        (f"app@sha256:{'0' * 64}", UnknownManifestError),
        ("quay.io/x/y", DeniedError),
        ("NOT A NAME", InvalidNameError),
    ],
)
async def test_an_unknown_denied_or_invalid_image_is_an_error(program, name, error):
    with pytest.raises(error):
        await export_bundle(program, name)


async def test_blobs_of_an_earlier_bundle_are_excluded(registry, program):
    base = registry.add_image(tag="1", layers=LAYERS)
    await pull_all_platforms(program, base)
    earlier = await export_bundle(program, "app:1")
    newer = registry.add_image(tag="2", layers=(*LAYERS, b"third"))
    await pull_all_platforms(program, newer)
    delta = await export_bundle(program, "app:1", "app:2", exclude=blob_digests(earlier))
    assert blob_digests(delta) == {newer.digest, newer.config, digest_of(b"third")}
    # docker cannot load a delta alone, so it has no manifest for docker.
    assert "manifest.json" not in unpack_tar(delta)


async def test_a_damaged_blob_does_not_complete_a_bundle(registry, program):
    image = registry.add_image(layers=LAYERS)
    await pull_all_platforms(program, image)
    damaged = program.root / blob_path(image.layers[0])
    damaged.write_bytes(flip(damaged.read_bytes(), 100))
    with pytest.raises(DaemonUnavailableError):
        await export_bundle(program, "app")
    assert not damaged.exists()


async def test_attestations_are_exported_and_docker_does_not_load_them(registry, program):
    image = registry.add_image(index=True, platforms=("linux/amd64", "unknown/unknown"))
    await pull_all_platforms(program, image)
    bundle = await export_bundle(program, "app")
    assert image.manifests["unknown/unknown"] in blob_digests(bundle)
    assert len(json.loads(unpack_tar(bundle)["manifest.json"])) == 1
    amd64 = await export_bundle(program, "app", platforms=["linux/amd64"])
    assert image.manifests["unknown/unknown"] not in blob_digests(amd64)


async def test_names_too_long_for_a_plain_header_are_kept(registry, program):
    layer = b"by its longer name"
    digest = digest_of(layer, "sha512")
    image = registry.add_image()
    document = registry.repositories[image.repository].manifests[image.digest].document
    registry.add_blob(layer, image.repository, algorithm="sha512")
    document["layers"].append({**document["layers"][0], "digest": digest, "size": len(layer)})
    content = json.dumps(document).encode()
    registry.add_manifest(image.repository, "latest", content, image.media_type)
    await program.manifest(image)
    for blob in (document["config"], *document["layers"]):
        assert (await program.blob(blob["digest"])).status == 200
    await program.wait_for_downloads()
    bundle = await export_bundle(program, "app")
    assert digest in blob_digests(bundle)


async def test_an_image_that_is_being_exported_is_not_removed(registry, program):
    image = registry.add_image(layers=(b"x" * 3 * MIB,))
    await pull_all_platforms(program, image)
    api, bundle = AdminClient(program.root), io.BytesIO()
    errors: list[str] = []

    class RemovingOutput(io.BytesIO):
        def write(self, data: Any) -> int:
            if not errors:
                with pytest.raises(BusyError, match="export or import is using it") as raised:
                    api.post("/api/v1/images/remove", {"images": ["app"]})
                errors.append(str(raised.value))
            return bundle.write(data)

    await asyncio.to_thread(
        api.post_to_file, "/api/v1/export", {"images": ["app"]}, RemovingOutput()
    )
    assert blob_digests(bundle.getvalue()) == program.stored()
    assert errors
    await asyncio.to_thread(api.post, "/api/v1/images/remove", {"images": ["app"]})
    assert program.stored() == set()
