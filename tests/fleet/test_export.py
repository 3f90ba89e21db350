"""Exports of images that other nodes of the fleet have."""

import io
import os
import tarfile

import pytest

from tests.fakes.registry import FakeRegistry
from tests.support.bundles import export_bundle, pull_all_platforms
from tests.support.fleet import FleetProgram, running_fleet


@pytest.fixture
async def pair(tmp_path, server):
    async with FakeRegistry() as registry:
        nodes = [FleetProgram(tmp_path / f"node{n}", registry, server) for n in range(2)]
        async with running_fleet(*nodes):
            yield registry, *nodes


def digests_in(bundle: bytes) -> set[str]:
    with tarfile.open(fileobj=io.BytesIO(bundle)) as archive:
        names = [name.split("/") for name in archive.getnames()]
    return {f"{parts[1]}:{parts[2]}" for parts in names if parts[0] == "blobs" and parts[2:]}


async def test_an_export_brings_what_the_node_lacks_from_another_one(pair):
    registry, one, two = pair
    image = registry.add_image(layers=[os.urandom(1 << 20), b"second"], index=True)
    await one.pull(image)
    await one.wait_for_downloads()
    sent = registry.bytes_sent("GET /registry-v2")
    await two.until(lambda: two.members)
    bundle = await export_bundle(two, "app")
    assert digests_in(bundle) == {image.digest, image.manifest, *image.blobs}
    assert bundle == await export_bundle(one, "app")
    # Upstream sends a byte of each blob, as a proof.
    assert registry.bytes_sent("GET /registry-v2") - sent <= len(image.blobs)


async def test_an_export_brings_the_missing_part_of_an_image(pair):
    registry, one, two = pair
    image = registry.add_image(layers=[os.urandom(1 << 16), os.urandom(1 << 16)])
    await one.pull(image)
    await one.wait_for_downloads()
    await two.manifest(image)
    await two.blob(image.layers[0])
    await two.wait_for_downloads()
    async with registry.down():
        bundle = await export_bundle(two, "app")
    assert digests_in(bundle) == {image.digest, *image.blobs}


async def test_platforms_that_no_node_has_are_not_asked_for_upstream(pair):
    registry, one, two = pair
    platforms = ["linux/amd64", "linux/arm64"]
    image = registry.add_image(layers=[b"layer"], index=True, platforms=platforms)
    await one.pull(image)
    await one.wait_for_downloads()
    exported = digests_in(await export_bundle(two, "app"))
    assert exported == digests_in(await export_bundle(one, "app"))
    with pytest.raises(Exception, match="cannot be exported: it lacks"):
        await export_bundle(two, "app", platforms=["linux/arm64"])
    await pull_all_platforms(one, image)
    assert digests_in(await export_bundle(two, "app", platforms=["linux/arm64"])) > {image.digest}


async def test_what_no_node_has_cannot_be_exported(pair):
    registry, _, two = pair
    image = registry.add_image()
    before = len(registry.requests)
    for name in ("app", f"app@{image.digest}"):
        with pytest.raises(Exception, match="it is not stored; pull or preload it first"):
            await export_bundle(two, name)
    assert len(registry.requests) == before
