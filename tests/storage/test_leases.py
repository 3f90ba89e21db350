"""Leases: content of a running export or import is not evicted."""

import pytest

from proxy.errors import BusyError
from proxy.oci.digest import Digest
from proxy.oci.reference import Tag
from tests.storage.test_pins import V1, put_image
from tests.storage.test_space import APP, CAP, KIB, open_rig


@pytest.fixture
async def rig(tmp_path):
    async with open_rig(tmp_path / "store") as rig:
        yield rig


async def test_leased_content_is_never_idle(rig):
    held, other = await rig.fetch(KIB), await rig.fetch(KIB)
    rig.clock.advance(10_000)
    with rig.space.lease() as hold:
        hold.digests.add(held)
        await rig.space.sweep(max_idle=1000, ingest_ttl=1000)
        assert rig.holds(held)
        assert not rig.holds(other)
    await rig.space.sweep(max_idle=1000, ingest_ttl=1000)
    assert not rig.holds(held)


async def test_an_image_is_not_removed_while_its_blobs_are_leased(rig):
    image = await put_image(rig, V1, 10 * KIB)
    with rig.space.lease() as hold:
        hold.digests.add(min(image, key=str))
        with pytest.raises(BusyError, match="export or import is using it"):
            await rig.space.remove_images([(APP, V1)])
        assert all(map(rig.holds, image))
        assert rig.index.tag(APP, V1)
    assert {digest for digest, _ in await rig.space.remove_images([(APP, V1)])} == image


async def test_an_image_whose_blobs_belong_to_another_one_too_is_removed_while_they_are_leased(rig):
    image = await put_image(rig, V1, 10 * KIB)
    top = rig.index.tag(APP, V1).digest
    await rig.index.set_tag(APP, Tag("v2"), top)
    with rig.space.lease() as hold:
        hold.digests |= image
        assert await rig.space.remove_images([(APP, V1)]) == []


async def test_a_blob_that_is_being_committed_is_counted_once(rig):
    """A lease on an uncounted blob must not reduce the space that evictions can free."""
    old = await rig.fetch(1000 * KIB)
    assert await rig.space.reserve(1000 * KIB)
    with rig.space.lease() as hold:
        hold.digests.add(Digest.from_content(b"coming"))
        assert await rig.space.reserve(1500 * KIB)
    assert not rig.holds(old)


async def test_unneeded_blobs_of_an_import_are_removed_unless_linked_meanwhile(rig):
    wanted = await rig.fetch(KIB)  # by APP, which is linked to it
    nobodys = await rig.fetch(2 * KIB, None)
    await rig.space.remove_unlinked([wanted, nobodys])
    assert rig.holds(wanted)
    assert not rig.holds(nobodys)


async def test_an_eviction_skips_leased_content(tmp_path):
    async with open_rig(tmp_path / "store", cap=2 * CAP) as rig:
        with rig.space.lease() as hold:
            for _ in range(300):
                blob = await rig.fetch(KIB)
                assert blob
                hold.digests.add(blob)
            others = [await rig.fetch(1000 * KIB) for _ in range(4)]
            assert await rig.fetch(2400 * KIB)
            assert all(map(rig.holds, hold.digests))
            assert [rig.holds(others[0]), rig.holds(others[3])] == [False, True]
        assert rig.on_disk() <= 2 * CAP
