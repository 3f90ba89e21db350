"""Preload: what was asked for is here afterwards, and cost no more than it had to."""

import asyncio
import json

import pytest

from proxy.errors import InvalidRequestError
from tests.fakes.content import OCI_INDEX, OCI_MANIFEST, digest_of
from tests.fakes.faults import Fault
from tests.fakes.gallery import push_index, push_manifest
from tests.support.admin_api import APP, BASE, FOREIGN, NATIVE, OTHER, OWN, call, checks, images
from tests.support.preload_api import preload, preloading

PULLS = "GET /v2/.*/manifests/"
BLOBS = "GET /v2/.*/blobs/"


def push(registry, tag: str = "v1", *, repository: str = APP, own: bytes = OWN) -> dict[str, str]:
    """Push an index for this machine's platform and another."""
    made = {
        NATIVE: push_manifest(registry, repository, [BASE, own], platform=NATIVE),
        FOREIGN: push_manifest(registry, repository, [BASE, OTHER], platform=FOREIGN),
    }
    return made | {"index": push_index(registry, repository, tag, made)}


async def test_what_was_preloaded_is_pulled_without_upstream(registry, program):
    made = push(registry)
    run = await preload(program, "app:v1")
    (done,) = run.of("done")
    assert (done["image"], done["digest"], done["outcome"]) == ("app:v1", made["index"], "fetched")
    (check,) = await checks(program, "app:v1")
    assert check["state"] == "complete"
    async with registry.down():
        for reference in ("v1", made[NATIVE]):
            assert (await program.manifest(APP, reference)).status == 200
        for layer in (BASE, OWN):
            assert (await program.blob(digest_of(layer))).body == layer
    assert digest_of(OTHER) not in program.stored()


async def test_what_is_complete_costs_no_pull_and_no_blob(registry, program):
    push(registry)
    first = await preload(program, "app:v1")
    assert first.events[-1]["fetched"] == sum(
        len(registry.repository(APP).blobs[layer["digest"]])
        for layer in first.of("resolved")[0]["layers"]
    )
    asked = registry.count(PULLS), registry.count(BLOBS)
    heads = registry.count("HEAD /v2/library/app/manifests/v1$")
    run = await preload(program, "app:v1")
    assert (registry.count(PULLS), registry.count(BLOBS)) == asked
    assert registry.count("HEAD /v2/library/app/manifests/v1$") == heads + 1
    (done,) = run.of("done")
    assert (done["outcome"], done["fetched"]) == ("up_to_date", 0)
    assert run.events[-1] == {
        "event": "totals",
        "images": 1,
        "fetched_images": 0,
        "up_to_date": 1,
        "failed": 0,
        "fetched": 0,
    }


async def test_a_tag_that_has_moved_is_fetched_though_its_ttl_runs(registry, program):
    push(registry)
    await preload(program, "app:v1")
    moved = push(registry, own=b"newer")
    run = await preload(program, "app:v1")
    (done,) = run.of("done")
    assert (done["digest"], done["outcome"], done["fetched"] > 0) == (
        moved["index"],
        "fetched",
        True,
    )
    assert (await program.manifest(APP, "v1")).digest == moved["index"]


async def test_platforms_are_chosen_as_clients_choose_them(registry, program):
    push(registry)
    await preload(program, {"image": "app:v1", "platforms": [FOREIGN]})
    assert digest_of(OWN) not in program.stored()
    assert digest_of(OTHER) in program.stored()
    run = await preload(program, {"image": "app:v1", "platforms": ["all"]})
    assert run.of("resolved")[0]["platforms"] == ["all"]
    states = await checks(program, {"image": "app:v1", "platforms": ["all"]})
    assert [check["state"] for check in states] == ["complete", "complete"]


async def test_an_image_that_lacks_a_platform_has_failed_but_what_it_has_is_here(registry, program):
    push(registry)
    run = await preload(program, {"image": "app:v1", "platforms": [NATIVE, "linux/mips64le"]})
    (failed,) = run.of("failed")
    assert failed["reason"] == f"the image is for {NATIVE}, {FOREIGN} only, not for linux/mips64le"
    assert (await checks(program, "app:v1"))[0]["state"] == "complete"
    run = await preload(program, {"image": "app:v1", "platforms": ["linux/mips64le"]})
    assert "not for linux/mips64le" in run.of("failed")[0]["reason"]


async def test_a_plain_image_for_another_platform_is_taken_unless_one_is_asked_for(
    registry, program
):
    push_manifest(registry, APP, [BASE], tag="plain", platform=FOREIGN)
    assert (await preload(program, "app:plain")).of("done")
    run = await preload(program, {"image": "app:plain", "platforms": [NATIVE]})
    assert f"the image is for {FOREIGN} only" in run.of("failed")[0]["reason"]


async def test_an_index_in_an_index_is_followed(registry, program):
    inner = push(registry, "inner")
    held = registry.repository(APP).manifests[inner["index"]].content
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [{"mediaType": OCI_INDEX, "digest": inner["index"], "size": len(held)}],
    }
    registry.add_manifest(APP, "outer", json.dumps(document).encode(), OCI_INDEX)
    assert (await preload(program, "app:outer")).of("done")
    assert (await checks(program, "app:outer"))[0]["state"] == "complete"


async def test_what_fails_fails_alone(registry, program):
    push(registry)
    broken = push_manifest(registry, "me/broken", [b"gone"], tag="v1", platform=NATIVE)
    del registry.repository("me/broken").blobs[digest_of(b"gone")]
    run = await preload(
        program,
        "Bad Name",
        "quay.io/not/configured",
        "app:none",
        "me/broken:v1",
        {"image": "app", "platforms": ["amd64"]},
        "app:v1",
    )
    failed = {event["image"]: event["code"] for event in run.of("failed")}
    assert failed == {
        "Bad Name": "invalid_name",
        "quay.io/not/configured": "denied",
        "app:none": "unknown_manifest",
        "me/broken:v1": "unknown_blob",
        "app": "invalid_reference",
    }
    assert [event["image"] for event in run.of("done")] == ["app:v1"]
    assert (run.events[-1]["images"], run.events[-1]["failed"]) == (6, 5)
    assert await program.metric("pullcache_preloaded_images_total", result="failed") == 5
    assert await program.metric("pullcache_preloaded_images_total", result="complete") == 1
    assert broken in program.stored()


async def test_a_layer_of_another_size_than_is_stated_is_no_success(registry, program):
    digest = push_manifest(registry, APP, [BASE], tag="v1", platform=NATIVE)
    content = registry.repository(APP).manifests[digest].content
    wrong = content.replace(b'"size": 4000', b'"size": 4001')
    assert wrong != content
    registry.add_manifest(APP, "v1", wrong, OCI_MANIFEST)
    run = await preload(program, "app:v1")
    assert "has 4000 bytes, and not 4001" in run.of("failed")[0]["reason"]


async def test_what_another_repository_has_brought_is_proven_and_not_fetched(registry, program):
    for repository in (APP, "me/copy"):
        push(registry, repository=repository)
    await preload(program, "app:v1")
    blobs = registry.count("GET /registry-v2/")
    run = await preload(program, "me/copy:v1")
    assert run.of("done")
    assert registry.count("GET /registry-v2/") == blobs
    assert (await checks(program, "me/copy:v1"))[0]["state"] == "complete"


async def test_an_image_that_has_many_names_is_fetched_once(registry, program):
    push(registry)
    run = await preload(
        program,
        "app:v1",
        "docker.io/library/app:v1",
        {"image": "index.docker.io/app:v1", "platforms": [FOREIGN]},
    )
    (done,) = run.of("done")
    assert done["image"] == "app:v1"
    states = await checks(program, "app:v1", {"image": "app:v1", "platforms": [FOREIGN]})
    assert [check["state"] for check in states] == ["complete", "complete"]


async def test_by_digest_nothing_else_is_taken(registry, program):
    made = push(registry)
    push(registry, own=b"newer")
    run = await preload(program, f"app:v1@{made['index']}")
    assert run.of("done")[0]["image"] == f"app@{made['index']}"
    assert digest_of(OWN) in program.stored()
    assert digest_of(b"newer") not in program.stored()


async def test_pinned_is_what_was_asked_for_and_came(registry, program):
    made = push(registry)
    await preload(program, "app:v1", f"app@{made[FOREIGN]}", "app:none", pin=True)
    pinned = [name for name, image in (await images(program)).items() if image["pinned"]]
    assert sorted(pinned) == ["app:v1", f"app@{made[FOREIGN]}"]


async def test_a_dry_run_says_what_is_missing_and_fetches_manifests_only(registry, program):
    push(registry)
    await preload(program, {"image": "app:v1", "platforms": [FOREIGN]})
    before = program.stored()
    blobs = registry.count(BLOBS)
    run = await preload(program, "app:v1", dry_run=True)
    assert registry.count(BLOBS) == blobs
    (resolved,) = run.of("resolved")
    exists = {layer["digest"]: layer["exists"] for layer in resolved["layers"]}
    assert (exists[digest_of(BASE)], exists[digest_of(OWN)]) == (True, False)
    assert resolved["missing"] == sum(
        layer["size"] for layer in resolved["layers"] if not layer["exists"]
    )
    assert run.of("plan")[0]["missing"] == resolved["missing"]
    assert run.of("done")[0]["outcome"] == "would_fetch"
    new = program.stored() - before
    assert new == {run.of("resolved")[0]["digest"], push(registry)[NATIVE]} - before


class TestWhatRefersToAnImage:
    """Signatures, SBOMs: they come along, and their failure fails nothing."""

    async def test_it_is_found_by_the_api(self, registry, program):
        made = push(registry)
        sbom = push_manifest(registry, APP, [b"sbom"], subject=made["index"], artifact_type="x/y")
        sign = push_manifest(registry, APP, [b"sign"], subject=made[NATIVE], artifact_type="x/z")
        run = await preload(program, "app:v1")
        assert run.of("resolved")[0]["referrers"] == 2
        assert {sbom, sign, digest_of(b"sbom"), digest_of(b"sign")} <= program.stored()
        async with registry.down():
            answer = await program.ask(f"/v2/{APP}/referrers/{made['index']}")
            assert [one["digest"] for one in answer.json["manifests"]] == [sbom]

    async def test_it_is_found_by_the_fallback_tag_and_by_cosign_s(self, registry, program):
        registry.referrers = False
        made = push(registry)
        name = made["index"].replace(":", "-")
        listed = push_manifest(registry, APP, [b"listed"], artifact_type="x/y")
        push_index(registry, APP, name, {"unknown/unknown": listed})
        push_manifest(registry, APP, [b"signature"], tag=f"{name}.sig")
        await preload(program, "app:v1")
        assert {digest_of(b"listed"), digest_of(b"signature")} <= program.stored()
        async with registry.down():
            for tag in (name, f"{name}.sig"):
                assert (await program.manifest(APP, tag)).status == 200

    async def test_its_failure_fails_nothing(self, registry, program):
        made = push(registry)
        push_manifest(registry, APP, [b"gone"], subject=made["index"], artifact_type="x/y")
        del registry.repository(APP).blobs[digest_of(b"gone")]
        registry.fail(f"referrers/{made[NATIVE]}", Fault(status=400), times=None)
        run = await preload(program, "app:v1")
        assert [done["outcome"] for done in run.of("done")] == ["fetched"]


class TestWithClients:
    """A preload shares downloads with clients, comes after them, and takes nothing from them."""

    async def test_a_blob_that_a_client_pulls_too_comes_once(self, registry, program):
        made = push(registry)
        hold = asyncio.Event()
        body = registry.body_of(digest_of(OWN))
        registry.fail(body, Fault(stall_at=100, until=hold), times=1)
        await program.manifest(APP, "v1")
        await program.manifest(APP, made[NATIVE])
        async with preloading(program, "app:v1") as run, asyncio.TaskGroup() as group:
            await run.until("layer", digest=digest_of(OWN), state="downloading")
            pulled = group.create_task(program.blob(digest_of(OWN)))
            hold.set()
            await run.until("totals")
        assert pulled.result().body == OWN
        assert registry.count(body) == 1

    async def test_who_hangs_up_ends_it_and_its_downloads_are_resumed(self, registry, program):
        registry.referrers = False
        big = bytes(range(256)) * 8192
        push_manifest(registry, APP, [big], tag="v1", platform=NATIVE)
        hold = asyncio.Event()
        body = registry.body_of(digest_of(big))
        registry.fail(body, Fault(stall_at=len(big) // 2, until=hold), times=1)
        async with preloading(program, "app:v1") as run:
            await run.until("layer", digest=digest_of(big), offset=len(big) // 2)
        await program.settled()
        hold.set()
        run = await preload(program, "app:v1")
        assert run.events[-1]["fetched"] == len(big) // 2
        assert [seen.headers.get("Range") for seen in registry.seen(body)][-1] == (
            f"bytes={len(big) // 2}-"
        )

    async def test_a_download_that_a_client_reads_goes_on_without_it(self, registry, program):
        big = bytes(range(256)) * 8192
        push_manifest(registry, APP, [big], tag="v1", platform=NATIVE)
        hold = asyncio.Event()
        body = registry.body_of(digest_of(big))
        registry.fail(body, Fault(stall_at=len(big) // 2, until=hold), times=1)
        async with asyncio.TaskGroup() as group:
            async with preloading(program, "app:v1") as run:
                await run.until("layer", digest=digest_of(big), offset=len(big) // 2)
                async with program.opened(f"/v2/{APP}/blobs/{digest_of(big)}") as response:
                    await response.content.readany()
                    reading = group.create_task(program.blob(digest_of(big)))
                    await asyncio.sleep(0)
            hold.set()
            assert (await reading).body == big
        assert registry.count(body) == 1

    async def test_who_asks_for_what_was_just_abandoned_gets_it(self, registry, program):
        for number in range(5):
            layer = bytes([number]) * 500_000
            push_manifest(registry, APP, [layer], tag=f"v{number}", platform=NATIVE)
            hold = asyncio.Event()
            body = registry.body_of(digest_of(layer))
            registry.fail(body, Fault(stall_at=200_000, until=hold), times=1)
            async with preloading(program, f"app:v{number}") as run:
                await run.until("layer", digest=digest_of(layer), state="downloading")
            asking = [program.blob(digest_of(layer)) for _ in range(3)]
            hold.set()
            for answer in await asyncio.gather(*asking):
                assert (answer.is_whole, answer.body) == (True, layer)

    async def test_no_more_layers_come_at_once_than_it_may(self, registry, program):
        layers = [bytes([number]) * 1000 for number in range(6)]
        push_manifest(registry, APP, layers, tag="v1", platform=NATIVE)
        hold = asyncio.Event()
        registry.fail("GET /registry-v2/", Fault(until_headers=hold), times=None)
        async with preloading(program, "app:v1", jobs=2) as run:
            await registry.until(lambda: registry.count("GET /registry-v2/") == 2)
            await run.until("plan")
            assert registry.count("GET /registry-v2/") == 2
            hold.set()
            await run.until("totals")


class TestRoom:
    """What cannot fit fails before anything is fetched; what was fetched stays."""

    async def test_what_does_not_fit_fails_first_and_the_rest_comes(self, registry, make_program):
        program = await make_program(store={"max_size": "8MB"})
        for tag, size in (("a", 3_000_000), ("b", 6_000_000), ("c", 2_500_000)):
            push_manifest(registry, APP, [tag.encode() * size], tag=tag, platform=NATIVE)
        run = await preload(program, "app:a", "app:b", "app:c")
        kinds = [event["event"] for event in run.events]
        assert kinds.index("failed") < kinds.index("layer")
        assert run.of("plan")[0]["shortfall"] > 3_000_000
        assert [event["image"] for event in run.of("failed")] == ["app:b"]
        assert "raise store.max_size" in run.of("failed")[0]["reason"]
        states = [check["state"] for check in await checks(program, "app:a", "app:b", "app:c")]
        # The manifest that said how large it is came.
        assert states == ["complete", "partial", "complete"]

    async def test_nothing_of_it_makes_room_for_a_client_meanwhile(self, registry, make_program):
        program = await make_program(store={"max_size": "8MB"})
        push_manifest(registry, APP, [b"a" * 4_000_000], tag="a", platform=NATIVE)
        push_manifest(registry, APP, [b"b" * 1_000_000], tag="b", platform=NATIVE)
        await preload(program, "app:a")
        hold = asyncio.Event()
        body = registry.body_of(digest_of(b"b" * 1_000_000))
        registry.fail(body, Fault(stall_at=500_000, until=hold), times=1)
        async with preloading(program, "app:a", "app:b") as run:
            await run.until("layer", state="downloading")
            large = registry.add_blob(b"c" * 5_000_000)
            assert (await program.blob(large)).is_whole
            hold.set()
            await run.until("totals")
        states = [check["state"] for check in await checks(program, "app:a", "app:b")]
        assert states == ["complete", "complete"]
        assert large not in program.stored()

    async def test_what_was_there_makes_room_and_what_is_pinned_does_not(
        self, registry, make_program
    ):
        program = await make_program(store={"max_size": "8MB"})
        for tag in "abc":
            push_manifest(registry, APP, [tag.encode() * 3_000_000], tag=tag, platform=NATIVE)
        await preload(program, "app:a")
        await preload(program, "app:b", "app:c")
        states = [check["state"] for check in await checks(program, "app:a", "app:b", "app:c")]
        assert states[1:] == ["complete", "complete"]
        assert states[0] != "complete"
        await call(program, "post", "/api/v1/images/pin", {"images": ["app:b", "app:c"]})
        run = await preload(program, "app:a")
        assert [event["code"] for event in run.of("failed")] == ["no_space"]
        states = [check["state"] for check in await checks(program, "app:b", "app:c")]
        assert states == ["complete", "complete"]


@pytest.mark.parametrize("order", [{"jobs": 0}, {"images": "x"}, {"nothing": 1}])
async def test_an_order_that_is_none_is_refused(program, order):
    with pytest.raises(InvalidRequestError):
        await call(program, "post", "/api/v1/preload", {"images": []} | order)
