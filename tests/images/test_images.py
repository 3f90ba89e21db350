"""The images of the store over the admin API: what there is, and what it takes to pull it."""

from typing import Any

import pytest

from proxy.errors import InvalidReferenceError, InvalidRequestError, NotFoundError
from tests.fakes.content import digest_of
from tests.fakes.gallery import parts_of, push_index, push_manifest
from tests.support.admin_api import (
    APP,
    BASE,
    FOREIGN,
    NATIVE,
    OTHER,
    OWN,
    call,
    checks,
    images,
    inspect,
    pull,
)


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
        with pytest.raises(NotFoundError, match="app:none is not in the store"):
            await inspect(program, "app:none")
        with pytest.raises(InvalidReferenceError):
            await inspect(program, "NOT AN IMAGE")
        with pytest.raises(InvalidRequestError):
            await call(program, "get", "/api/v1/images/inspect")
