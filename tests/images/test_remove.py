"""Images that go, with what only they held; images that stay, whatever comes."""

import pytest

from proxy.errors import DeniedError, InvalidReferenceError, NotFoundError
from tests.fakes.content import digest_of
from tests.fakes.gallery import parts_of, push_manifest
from tests.support.admin_api import APP, BASE, OTHER, OWN, call, images, pull, remove


class TestRemoving:
    """rm frees what only that image held, and says how much."""

    @pytest.fixture
    async def two(self, registry, program):
        for repository, own in ((APP, OWN), ("me/other", OTHER)):
            digest = push_manifest(registry, repository, [BASE, own], tag="v1")
            await pull(program, repository, "v1", *parts_of(registry, repository, digest))

    async def test_what_others_hold_stays(self, program, two):
        unique = (await images(program))["app:v1"]["unique"]
        before = program.stored()
        expected = await remove(program, "app:v1", dry_run=True)
        assert program.stored() == before
        assert set(await images(program)) == {"app:v1", "me/other:v1"}
        assert await remove(program, "app:v1") == expected
        assert expected == {"images": ["app:v1"], "blobs": 2, "bytes": unique}
        assert len(before - program.stored()) == 2
        assert digest_of(OWN) not in program.stored()
        (left,) = (await images(program)).values()
        assert (left["name"], left["state"]) == ("me/other:v1", "complete")
        assert left["unique"] == left["size"]
        assert await program.metric("pullcache_evictions_total", reason="removed") == 2
        assert await program.metric("pullcache_store_blobs") == len(program.stored())

    async def test_the_last_image_leaves_nothing(self, program, two):
        freed = await remove(program, "app:v1", "me/other:v1")
        assert freed["blobs"] == 6
        assert program.stored() == set()
        assert await program.metric("pullcache_store_bytes") == 0

    async def test_what_was_removed_is_pulled_again(self, registry, program, two):
        await remove(program, "app:v1")
        registry.requests.clear()
        digest = registry.repository(APP).tags["v1"]
        await pull(program, APP, "v1", *parts_of(registry, APP, digest))
        assert registry.seen("manifests/v1")
        assert (await images(program))["app:v1"]["state"] == "complete"

    async def test_a_removed_image_is_not_served_to_those_who_know_its_digest(
        self, registry, program, two
    ):
        await remove(program, "app:v1")
        registry.repository(APP).blobs.clear()
        assert (await program.blob(digest_of(BASE), "me/other")).status == 200
        assert (await program.blob(digest_of(BASE), APP)).status == 404

    async def test_one_of_two_tags_frees_nothing_and_a_digest_is_all_its_names(
        self, registry, program, two
    ):
        digest = registry.repository(APP).tags["v1"]
        registry.move_tag(APP, "latest", digest)
        await pull(program, APP, "latest")
        found = await images(program)
        assert (found["app:v1"]["unique"], found["app:latest"]["unique"]) == (0, 0)
        freed = await remove(program, f"app@{digest}", dry_run=True)
        assert (set(freed["images"]), freed["blobs"]) == ({"app:v1", "app:latest"}, 2)
        assert (await remove(program, "app:v1"))["blobs"] == 0
        assert (await remove(program, "app:latest"))["blobs"] == 2

    async def test_a_signature_goes_with_what_it_signs(self, registry, program, two):
        subject = registry.repository(APP).tags["v1"]
        signature = push_manifest(registry, APP, [b"signature"], subject=subject)
        await pull(program, APP, signature, *parts_of(registry, APP, signature))
        await remove(program, "app:v1")
        assert signature not in program.stored()
        assert digest_of(b"signature") not in program.stored()

    async def test_all_go_or_none(self, program, two):
        with pytest.raises(NotFoundError, match="app:none is not in the store"):
            await remove(program, "app:v1", "app:none")
        await call(program, "post", "/api/v1/images/pin", {"images": ["me/other:v1"]})
        with pytest.raises(DeniedError, match="me/other:v1 is pinned"):
            await remove(program, "app:v1", "me/other:v1")
        assert set(await images(program)) == {"app:v1", "me/other:v1"}
        assert (await remove(program, "me/other:v1", force=True))["blobs"] == 2
        assert await program.metric("pullcache_store_pinned_bytes") == 0

    async def test_an_upstream_that_is_configured_no_more_can_be_cleaned_up(
        self, registry, make_program
    ):
        program = await make_program(upstreams={"old.example": {"url": registry.url}})
        push_manifest(registry, "me/app", [OWN], tag="v1")
        await pull(program, "me/app", "v1?ns=old.example")
        await program.stop()
        program.upstreams = {"docker.io": {"url": registry.url}}
        await program.start()
        assert set(await images(program)) == {"old.example/me/app:v1"}
        assert (await remove(program, "old.example/me/app:v1"))["blobs"] == 1


class TestPinning:
    """Pinned images survive any pressure, and the store says when there is no room beside them."""

    async def test_under_pressure_what_is_pinned_stays_and_the_cap_holds(
        self, registry, make_program
    ):
        program = await make_program(store={"max_size": "8MB"})
        answer = await call(program, "post", "/api/v1/images/pin", {"images": ["app:v1"]})
        assert answer == {"images": ["app:v1"]}
        (waiting,) = (await images(program)).values()
        assert (waiting["digest"], waiting["state"], waiting["pinned"]) == (None, "absent", True)
        layers = [bytes([number]) * 900_000 for number in range(3)]
        digest = push_manifest(registry, APP, layers, tag="v1")
        blobs = parts_of(registry, APP, digest)
        await pull(program, APP, "v1", *blobs)
        peak = 0
        for number in range(10):
            other = registry.add_blob(bytes([100 + number]) * 1_500_000, "me/other")
            answer = await program.blob(other, "me/other")
            assert (answer.status, answer.digest) == (200, other)
            peak = max(peak, program.on_disk())
            await program.settled()
        assert peak <= 8_000_000
        assert {digest, *blobs} <= program.stored()
        assert await program.metric("pullcache_store_pinned_bytes") > 2_700_000
        assert await program.metric("pullcache_evictions_total", reason="size") > 3

    async def test_when_pins_fill_the_store_the_rest_passes_through_and_it_is_said(
        self, registry, make_program
    ):
        program = await make_program(store={"max_size": "4MB"})
        digest = push_manifest(registry, APP, [bytes(1_400_000), b"1" * 1_400_000], tag="v1")
        await pull(program, APP, "v1", *parts_of(registry, APP, digest))
        await call(program, "post", "/api/v1/images/pin", {"images": ["app:v1"]})
        before = program.stored()
        other = registry.add_blob(b"2" * 1_500_000, "me/other")
        for _ in range(2):
            answer = await program.blob(other, "me/other")
            assert (answer.status, answer.digest) == (200, other)
        await program.settled()
        assert program.stored() == before
        assert await program.metric("pullcache_uncached_total", reason="pinned") == 2
        status = await call(program, "get", "/api/v1/status")
        assert status["store"]["pinned"] > 2_800_000
        freed = await call(program, "post", "/api/v1/images/unpin", {"images": ["app:v1", "app"]})
        assert freed == {"images": ["app:v1"]}
        assert (await program.blob(other, "me/other")).status == 200
        await program.settled()
        assert other in program.stored()

    async def test_a_pin_follows_its_tag(self, registry, program):
        old = push_manifest(registry, APP, [OWN], tag="v1")
        await pull(program, APP, "v1", *parts_of(registry, APP, old))
        await call(program, "post", "/api/v1/images/pin", {"images": ["app:v1"]})
        new = push_manifest(registry, APP, [OTHER], tag="v1")
        program.clock.turn(10_000)
        await pull(program, APP, "v1", *parts_of(registry, APP, new))
        found = await images(program)
        assert {name: image["pinned"] for name, image in found.items()} == {
            "app:v1": True,
            f"app@{old}": False,
        }
        await remove(program, f"app@{old}")
        assert new in program.stored()
        assert old not in program.stored()

    async def test_what_may_not_be_pulled_cannot_be_pinned(self, program):
        for image, kind in (("quay.io/me/app", DeniedError), ("NOT", InvalidReferenceError)):
            with pytest.raises(kind):
                await call(program, "post", "/api/v1/images/pin", {"images": ["app:v1", image]})
        assert await images(program) == {}
