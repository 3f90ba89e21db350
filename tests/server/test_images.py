"""The images of the store over the admin API: what there is, what it takes to pull it, what goes."""

import asyncio
import platform
from typing import Any

import pytest

from proxy.cli.api import AdminApi
from proxy.errors import DeniedError, InvalidReferenceError, InvalidRequestError, UnknownError
from proxy.oci.platform import of_machine
from tests.fakes.content import digest_of
from tests.fakes.gallery import parts_of, push_index, push_manifest
from tests.server.test_openapi import check

APP = "library/app"
NATIVE = str(of_machine(platform.machine()))
FOREIGN = "linux/s390x"
BASE, OWN, OTHER = b"base" * 1000, b"own" * 1000, b"other" * 1000


async def call(program, method: str, *arguments, **query) -> Any:
    return await asyncio.to_thread(getattr(AdminApi(program.root), method), *arguments, **query)


async def stream(program, *arguments, **query) -> list[Any]:
    client = AdminApi(program.root)
    return await asyncio.to_thread(lambda: list(client.stream(*arguments, **query)))


async def images(program, pattern: str = "") -> dict[str, Any]:
    found = await stream(program, "GET", "/api/v1/images", filter=pattern)
    for image in found:
        check(image, "Image")
    assert len({image["name"] for image in found}) == len(found)
    return {image["name"]: image for image in found}


async def checks(program, *wanted: dict[str, Any] | str) -> list[dict[str, Any]]:
    documents = [{"image": one} if isinstance(one, str) else one for one in wanted]
    found = await stream(program, "POST", "/api/v1/images/check", {"images": documents})
    for one in found:
        check(one, "ImageCheck")
    return found


async def inspect(program, image: str) -> Any:
    detail = await call(program, "get", "/api/v1/images/inspect", image=image)
    check(detail, "ImageDetail")
    return detail


async def remove(program, *names: str, **kw: bool) -> Any:
    answer = await call(program, "post", "/api/v1/images/remove", {"images": names, **kw})
    check(answer, "Removed")
    return answer


async def pull(program, repository: str, reference: str, *digests: str) -> None:
    """Pull a manifest, then manifests and blobs below it by digest."""
    held = program.registry.repository(repository)
    for one in (reference, *digests):
        is_blob = one in held.blobs
        answer = await (
            program.blob(one, repository) if is_blob else program.manifest(repository, one)
        )
        assert (answer.status, answer.is_whole) == (200, True)
    await program.settled()


@pytest.fixture
def app(registry):
    """An index for this machine and another, with an attestation, as buildx makes them."""
    made = {
        NATIVE: push_manifest(registry, APP, [BASE, OWN], platform=NATIVE),
        FOREIGN: push_manifest(registry, APP, [OTHER], platform=FOREIGN),
        "unknown/unknown": push_manifest(
            registry, APP, [b"provenance"], platform="unknown/unknown"
        ),
    }
    return made | {"index": push_index(registry, APP, "v1", made)}


class TestListing:
    """What there is, and how much of it."""

    async def test_an_empty_store_has_no_images(self, program):
        assert await images(program) == {}

    async def test_a_platform_is_complete_when_all_of_it_is_here(self, registry, program, app):
        config, base, own = parts_of(registry, APP, app[NATIVE])
        await pull(program, APP, "v1", app[NATIVE], config, base)
        (image,) = (await images(program)).values()
        native, foreign = image["platforms"]
        assert (image["name"], image["state"], image["digest"]) == (
            "app:v1",
            "partial",
            app["index"],
        )
        assert (native["platform"], native["state"]) == (NATIVE, "partial")
        assert native["missing"] == [{"digest": own, "size": len(OWN)}]
        assert (foreign["platform"], foreign["state"]) == (FOREIGN, "absent")
        assert [one["digest"] for one in foreign["missing"]] == [app[FOREIGN]]
        await pull(program, APP, "v1", own)
        (image,) = (await images(program)).values()
        assert image["state"] == "complete"
        assert image["platforms"][0]["missing"] == []

    async def test_sizes_are_what_lies_on_the_disk_and_what_only_this_image_has(
        self, registry, program
    ):
        mine = push_manifest(registry, APP, [BASE, OWN], tag="v1")
        push_manifest(registry, "me/other", [BASE, OTHER], tag="v1")
        for repository, tag in ((APP, "v1"), ("me/other", "v1")):
            digest = registry.repository(repository).tags[tag]
            await pull(program, repository, tag, *parts_of(registry, repository, digest))
        found = await images(program)
        assert set(found) == {"app:v1", "me/other:v1"}
        image, other = found["app:v1"], found["me/other:v1"]
        on_disk = sum(
            (program.root / "blobs" / "sha256" / one.removeprefix("sha256:")).stat().st_size
            for one in (mine, *parts_of(registry, APP, mine))
        )
        assert image["size"] == on_disk
        config = parts_of(registry, APP, mine)[0]
        shared = len(BASE) + len(registry.repository(APP).blobs[config])
        assert image["unique"] == on_disk - shared
        assert image["size"] - image["unique"] == other["size"] - other["unique"]

    async def test_a_single_manifest_takes_its_platform_from_its_configuration(
        self, registry, program
    ):
        digest = push_manifest(registry, APP, [OWN], tag="arm", platform="linux/arm/v6")
        await pull(program, APP, "arm")
        (image,) = (await images(program)).values()
        assert [one["platform"] for one in image["platforms"]] == [""]
        await pull(program, APP, "arm", *parts_of(registry, APP, digest))
        (image,) = (await images(program)).values()
        assert [one["platform"] for one in image["platforms"]] == ["linux/arm/v6"]

    async def test_what_was_pulled_by_digest_alone_is_listed_by_digest(self, registry, program):
        digest = push_manifest(registry, APP, [OWN])
        await pull(program, APP, digest)
        assert set(await images(program)) == {f"app@{digest}"}

    async def test_times_are_those_of_the_commit_and_of_the_last_use(self, registry, program):
        push_manifest(registry, APP, [OWN], tag="v1")
        await pull(program, APP, "v1")
        program.clock.turn(5000)
        before = (await images(program))["app:v1"]
        await pull(program, APP, "v1")
        after = (await images(program))["app:v1"]
        assert after["used"] - before["used"] == pytest.approx(5000)
        assert after["cached"] == before["cached"]

    async def test_a_filter_is_part_of_a_name_or_a_glob(self, registry, program):
        for name in ("library/nginx", "me/nginx-extra", "me/app"):
            push_manifest(registry, name, [OWN], tag="v1")
            await pull(program, name, "v1")
        assert set(await images(program, "nginx")) == {"nginx:v1", "me/nginx-extra:v1"}
        assert set(await images(program, "me/*")) == {"me/nginx-extra:v1", "me/app:v1"}
        assert set(await images(program, "*:v1")) == {"nginx:v1", "me/nginx-extra:v1", "me/app:v1"}
        assert await images(program, "v2") == {}

    async def test_many_images_are_weighed_as_few_are(self, registry, program):
        for number in range(60):
            push_manifest(registry, f"me/app{number}", [BASE, str(number).encode()], tag="v1")
            await pull(program, f"me/app{number}", "v1")
        everything = await images(program)
        assert len(everything) == 60
        assert everything["me/app7:v1"] == (await images(program, "me/app7"))["me/app7:v1"]

    async def test_foreign_layers_make_nothing_incomplete(self, registry, program):
        digest = push_manifest(registry, APP, [OWN], tag="v1", foreign=[OTHER])
        config, own, _ = parts_of(registry, APP, digest)
        await pull(program, APP, "v1", config, own)
        assert (await images(program))["app:v1"]["state"] == "complete"


class TestChecking:
    """What could be pulled with the network unplugged."""

    async def test_an_image_is_complete_for_this_machine_by_default(self, registry, program, app):
        assert [(one["state"], one["reason"]) for one in await checks(program, "app:v1")] == [
            ("absent", "not in the store")
        ]
        await pull(program, APP, "v1", app[NATIVE], *parts_of(registry, APP, app[NATIVE]))
        (found,) = await checks(program, "docker.io/library/app:v1")
        assert (found["image"], found["platform"], found["state"]) == ("app:v1", NATIVE, "complete")
        assert found["digest"] == app[NATIVE]
        await program.restart(offline=True)
        for one in (app["index"], app[NATIVE], *parts_of(registry, APP, app[NATIVE])):
            is_blob = one in registry.repository(APP).blobs
            answer = await (program.blob(one) if is_blob else program.manifest(APP, one))
            assert answer.status == 200

    async def test_platforms_that_are_asked_for_are_told_apart(self, registry, program, app):
        await pull(program, APP, "v1", app[NATIVE], *parts_of(registry, APP, app[NATIVE])[:2])
        asked = {"image": "app:v1", "platforms": [NATIVE, FOREIGN, "plan9/mips"]}
        found = {one["platform"]: one for one in await checks(program, asked)}
        assert {name: one["state"] for name, one in found.items()} == {
            NATIVE: "partial",
            FOREIGN: "absent",
            "plan9/mips": "absent",
        }
        assert [one["digest"] for one in found[NATIVE]["missing"]] == [digest_of(OWN)]
        assert found["plan9/mips"]["reason"] == f"the image is for {NATIVE}, {FOREIGN} only"
        every = await checks(program, {"image": "app:v1", "platforms": ["all"]})
        assert [one["platform"] for one in every] == [NATIVE, FOREIGN]

    async def test_a_single_manifest_is_for_whoever_does_not_ask(self, registry, program):
        digest = push_manifest(registry, APP, [OWN], tag="z", platform=FOREIGN)
        await pull(program, APP, "z", *parts_of(registry, APP, digest))
        asked = {"image": "app:z", "platforms": [NATIVE]}
        found = await checks(program, "app:z", asked, f"app@{digest}")
        assert [one["state"] for one in found] == ["complete", "absent", "complete"]
        assert found[0]["platform"] == FOREIGN

    async def test_a_file_that_is_gone_is_noticed(self, registry, program):
        digest = push_manifest(registry, APP, [OWN], tag="v1")
        await pull(program, APP, "v1", *parts_of(registry, APP, digest))
        blobs = program.root / "blobs" / "sha256"
        (blobs / digest_of(OWN).removeprefix("sha256:")).unlink()
        (found,) = await checks(program, "app:v1")
        assert (found["state"], len(found["missing"])) == ("partial", 1)
        (blobs / digest.removeprefix("sha256:")).unlink()
        (found,) = await checks(program, "app:v1")
        assert found["state"] == "absent"

    async def test_what_another_repository_holds_is_not_this_ones(self, registry, program):
        digest = push_manifest(registry, APP, [OWN], tag="v1")
        await pull(program, APP, "v1", *parts_of(registry, APP, digest))
        assert [
            one["state"] for one in await checks(program, "me/copy:v1", f"me/copy@{digest}")
        ] == [
            "absent",
            "absent",
        ]

    async def test_what_cannot_be_meant_is_absent_and_says_why(self, program):
        found = await checks(
            program, "Not An Image", "quay.io/me/app", {"image": "app", "platforms": ["riscv"]}
        )
        assert [one["state"] for one in found] == ["absent"] * 3
        for one, words in zip(
            found, ("not a repository", "not configured", "not a platform"), strict=True
        ):
            assert words in one["reason"]


class TestInspecting:
    """One image in every detail."""

    async def test_layers_come_with_their_commands_and_those_who_share_them(
        self, registry, program
    ):
        history: list[dict[str, Any]] = [
            {"created_by": "ADD rootfs / # buildkit"},
            {"created_by": "ENV A=1", "empty_layer": True},
            {"created_by": "RUN make # buildkit"},
        ]
        run = {
            "Env": ["A=1"],
            "Cmd": ["serve"],
            "Labels": {"x": "y"},
            "ExposedPorts": {"80/tcp": {}},
        }
        digest = push_manifest(registry, APP, [BASE, OWN], tag="v1", history=history, run=run)
        other = push_manifest(registry, "me/other", [BASE, OTHER], tag="v2")
        await pull(program, APP, "v1", *parts_of(registry, APP, digest)[:2])
        await pull(program, "me/other", "v2", *parts_of(registry, "me/other", other))
        detail = await inspect(program, "app:v1")
        (one,) = detail["platforms"]
        assert one["state"]["state"] == "partial"
        assert [(layer["command"], layer["cached"], layer["size"]) for layer in one["layers"]] == [
            ("ADD rootfs /", True, len(BASE)),
            ("RUN make", False, len(OWN)),
        ]
        assert [layer["shared"] for layer in one["layers"]] == [["me/other:v2"], []]
        assert one["config"]["cmd"] == ["serve"]
        assert one["config"]["ports"] == ["80/tcp"]
        assert detail["names"] == ["app:v1"]

    async def test_referrers_of_a_platform_are_listed(self, registry, program, app):
        bill = push_manifest(registry, APP, [b"bill"], subject=app[NATIVE])
        await pull(program, APP, "v1", app[NATIVE], bill)
        (referrer,) = (await inspect(program, "app:v1"))["referrers"]
        assert (referrer["digest"], referrer["subject"]) == (bill, app[NATIVE])

    async def test_referrers_are_listed(self, registry, program):
        digest = push_manifest(registry, APP, [OWN], tag="v1")
        kind = "application/spdx+json"
        bill = push_manifest(registry, APP, [b"bill"], subject=digest, artifact_type=kind)
        await pull(program, APP, "v1", bill)
        (referrer,) = (await inspect(program, "app:v1"))["referrers"]
        assert (referrer["digest"], referrer["artifact_type"]) == (bill, kind)
        assert set(await images(program)) == {"app:v1"}

    async def test_an_image_is_found_by_digest_as_well(self, registry, program, app):
        await pull(program, APP, "v1", app[NATIVE], *parts_of(registry, APP, app[NATIVE]))
        detail = await inspect(program, f"app@{app[NATIVE]}")
        assert detail["names"] == []
        assert detail["platforms"][0]["state"]["platform"] == NATIVE
        whole = await inspect(program, f"app@{app['index']}")
        assert whole["names"] == ["app:v1"]
        assert whole["size"] >= detail["size"] > 0

    async def test_what_is_not_there_is_not_found(self, program):
        with pytest.raises(UnknownError, match="app:none is not in the store"):
            await inspect(program, "app:none")
        with pytest.raises(InvalidReferenceError):
            await inspect(program, "NOT AN IMAGE")
        with pytest.raises(InvalidRequestError):
            await call(program, "get", "/api/v1/images/inspect")


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
        with pytest.raises(UnknownError, match="app:none is not in the store"):
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
