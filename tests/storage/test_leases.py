"""What an export sends, or an import brings, stays while it lasts: whatever else wants its room."""

import pytest

from proxy.errors import BusyError
from proxy.oci.digest import Digest
from proxy.oci.reference import Tag
from tests.storage.test_pins import V1, put_image
from tests.storage.test_space import APP, CAP, KIB, opened


@pytest.fixture
async def shop(tmp_path):
    async with opened(tmp_path / "store") as shop:
        yield shop


async def test_what_is_held_is_never_idle(shop):
    held, other = await shop.fetch(KIB), await shop.fetch(KIB)
    shop.clock.turn(10_000)
    with shop.space.lease() as hold:
        hold.digests.add(held)
        await shop.space.sweep(max_idle=1000, ingest_ttl=1000)
        assert shop.holds(held)
        assert not shop.holds(other)
    await shop.space.sweep(max_idle=1000, ingest_ttl=1000)
    assert not shop.holds(held)


async def test_an_image_is_not_removed_while_its_blobs_are_held(shop):
    image = await put_image(shop, V1, 10 * KIB)
    with shop.space.lease() as hold:
        hold.digests.add(min(image, key=str))
        with pytest.raises(BusyError, match="export or import is using it"):
            await shop.space.remove_images([(APP, V1)])
        assert all(map(shop.holds, image))
        assert shop.index.tag(APP, V1)
    assert {digest for digest, _ in await shop.space.remove_images([(APP, V1)])} == image


async def test_an_image_whose_blobs_another_one_has_too_is_removed_while_they_are_held(shop):
    image = await put_image(shop, V1, 10 * KIB)
    top = shop.index.tag(APP, V1).digest
    await shop.index.set_tag(APP, Tag("v2"), top)
    with shop.space.lease() as hold:
        hold.digests |= image
        assert await shop.space.remove_images([(APP, V1)]) == []


async def test_a_blob_that_is_being_committed_takes_no_room_twice(shop):
    """Held before the account knows it, it must not make room look taken that can be made."""
    old = await shop.fetch(1000 * KIB)
    assert await shop.space.reserve(1000 * KIB)
    with shop.space.lease() as hold:
        hold.digests.add(Digest.from_content(b"coming"))
        assert await shop.space.reserve(1500 * KIB)
    assert not shop.holds(old)


async def test_what_was_brought_in_vain_goes_unless_something_has_come_to_need_it(shop):
    wanted = await shop.fetch(KIB)  # by APP, which is linked to it
    nobodys = await shop.fetch(2 * KIB, None)
    await shop.space.remove_unlinked([wanted, nobodys])
    assert shop.holds(wanted)
    assert not shop.holds(nobodys)


async def test_what_is_held_is_passed_over_for_what_was_used_after_it(tmp_path):
    async with opened(tmp_path / "store", cap=2 * CAP) as shop:
        with shop.space.lease() as hold:
            for _ in range(300):
                blob = await shop.fetch(KIB)
                assert blob
                hold.digests.add(blob)
            others = [await shop.fetch(1000 * KIB) for _ in range(4)]
            assert await shop.fetch(2000 * KIB)
            assert all(map(shop.holds, hold.digests))
            assert [shop.holds(others[0]), shop.holds(others[3])] == [False, True]
        assert shop.on_disk() <= 2 * CAP
