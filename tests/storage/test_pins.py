"""Pins in a full store: pinned content stays, other content is evicted, and a refusal is quick."""

import asyncio
import json
import os

import pytest
from hypothesis import given, settings, strategies as st

from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.oci.reference import Tag
from proxy.storage.space import SpaceManager
from tests.fakes.content import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, descriptor
from tests.storage.test_space import APP, CAP, KIB, StoreRig, open_rig
from tests.support.examples import scaled

V1 = Tag("v1")


async def put(rig: StoreRig, content: bytes, manifest: oci.Manifest | None = None) -> Digest | None:
    """Store content as a download would; return None if there is no space."""
    digest = Digest.from_content(content)
    reservation = await rig.space.reserve(len(content))
    if reservation is None:
        return None
    if manifest:
        await rig.committer.commit_manifest(APP, digest, content, manifest, reservation)
    else:
        ingest = await asyncio.to_thread(rig.write, digest, content)
        await rig.committer.commit_ingest(ingest, reservation, APP)
        ingest.close()
    return digest


async def put_image(rig: StoreRig, tag: Tag, size: int) -> set[Digest]:
    """Store an image of two layers of `size` bytes each; return all its digests."""
    config, *layers = blobs = [os.urandom(8) + bytes(length) for length in (8, size, size)]
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(config, OCI_CONFIG),
        "layers": [descriptor(layer, OCI_LAYER) for layer in layers],
    }
    content = json.dumps(document).encode()
    digests = {await put(rig, content, oci.parse_manifest(content, OCI_MANIFEST))}
    await rig.index.set_tag(APP, tag, Digest.from_content(content))
    for blob in blobs:
        digests.add(await put(rig, blob))
    assert None not in digests
    return {digest for digest in digests if digest}


@pytest.fixture
async def rig(tmp_path):
    async with open_rig(tmp_path / "store") as rig:
        yield rig


async def test_a_pinned_image_survives_any_load_and_the_limit_holds(rig):
    await rig.index.pin([(APP, V1)])
    image = await put_image(rig, V1, 500 * KIB)
    for _ in range(12):
        assert await rig.fetch(900 * KIB)
        assert rig.on_disk() <= CAP
    assert all(map(rig.holds, image))
    await rig.index.unpin([(APP, V1)])
    for _ in range(4):
        assert await rig.fetch(900 * KIB)
    assert not any(map(rig.holds, image))


async def test_when_pins_fill_the_store_nothing_is_evicted_and_the_reason_is_known(rig):
    other = await rig.fetch(400 * KIB)
    image = await put_image(rig, V1, 1350 * KIB)
    await rig.index.pin([(APP, V1)])
    assert await rig.space.reserve(1000 * KIB) is None
    assert rig.space.uncached_reason(1000 * KIB) == "pinned"
    assert rig.space.uncached_reason(CAP) == "too_large"
    assert rig.space.uncached_reason(KIB) == "no_space"
    assert rig.holds(other)
    assert all(map(rig.holds, image))
    assert 2700 * KIB < rig.space.pinned_bytes <= rig.space.stored_bytes
    assert await rig.fetch(350 * KIB)
    assert not rig.holds(other)


async def test_pinned_content_is_never_idle(rig):
    image = await put_image(rig, V1, KIB)
    await rig.index.pin([(APP, V1)])
    other = await rig.fetch(KIB)
    rig.clock.advance(10_000)
    await rig.space.sweep(max_idle=1000, ingest_ttl=1000)
    assert not rig.holds(other)
    assert all(map(rig.holds, image))


async def test_a_limit_below_the_pinned_size_evicts_everything_but_the_pins(tmp_path):
    async with open_rig(tmp_path / "store") as rig:
        image = await put_image(rig, V1, 1000 * KIB)
        await rig.index.pin([(APP, V1)])
        other = await rig.fetch(1000 * KIB)
    async with open_rig(tmp_path / "store", cap=1 << 20) as rig:
        assert not rig.holds(other)
        assert all(map(rig.holds, image))
        assert await rig.space.reserve(KIB) is None


steps = st.lists(
    st.tuples(
        st.sampled_from(["fetch", "fetch", "image", "pin", "unpin"]),
        st.sampled_from([Tag("a"), Tag("b"), Tag("c")]),
        st.integers(8, 700 * KIB),
    ),
    max_size=15,
)


@settings(max_examples=scaled(20), deadline=None)
@given(steps=steps)
async def test_whatever_happens_pins_and_limit_hold(tmp_path_factory, steps):
    async with open_rig(tmp_path_factory.mktemp("rig") / "store") as rig:
        images: dict[Tag, set[Digest]] = {}
        pinned: set[Tag] = set()
        for what, tag, size in steps:
            if what == "fetch":
                await rig.fetch(size)
            elif what == "image" and tag not in images and _has_room(rig.space, 2 * size):
                images[tag] = await put_image(rig, tag, size)
            elif what == "pin" and all(map(rig.holds, images.get(tag, ()))):
                pinned.add(tag)
                await rig.index.pin([(APP, tag)])
            elif what == "unpin":
                pinned.discard(tag)
                await rig.index.unpin([(APP, tag)])
            assert rig.on_disk() <= CAP
            held = set().union(*(images.get(tag, set()) for tag in pinned))
            assert all(map(rig.holds, held))


def _has_room(space: SpaceManager, size: int) -> bool:
    return space.pinned_bytes + size + 900 * KIB < CAP
