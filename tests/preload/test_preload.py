"""A preload fetches what the store lacks, and reports each image."""

import pytest

from proxy.errors import InvalidRequestError
from tests.fakes.content import digest_of
from tests.fakes.images import push_manifest
from tests.preload.images import push_app
from tests.support.admin_api import (
    APP,
    BASE,
    FOREIGN,
    NATIVE,
    OTHER,
    OWN,
    call,
    check_images,
    list_images,
)
from tests.support.preload_api import run_preload

# Requests to the registry. A GET of a manifest counts as a pull, a HEAD does not.
PULLS = "GET /v2/.*/manifests/"
BLOBS = "GET /v2/.*/blobs/"
TAG_HEADS = "HEAD /v2/library/app/manifests/v1$"


async def test_a_preloaded_image_is_pulled_without_upstream(registry, program):
    digests = push_app(registry)
    run = await run_preload(program, "app:v1")
    (done,) = run.events_of("done")
    assert (done["image"], done["digest"]) == ("app:v1", digests["index"])
    assert done["outcome"] == "fetched"
    (check,) = await check_images(program, "app:v1")
    assert check["state"] == "complete"
    async with registry.down():
        for reference in ("v1", digests[NATIVE]):
            assert (await program.manifest(APP, reference)).status == 200
        for layer in (BASE, OWN):
            assert (await program.blob(digest_of(layer))).body == layer
    assert digest_of(OTHER) not in program.stored()


async def test_a_complete_image_costs_one_head_and_no_pull(registry, program):
    push_app(registry)
    first = await run_preload(program, "app:v1")
    assert first.events[-1]["fetched"] == sum(
        len(registry.repository(APP).blobs[layer["digest"]])
        for layer in first.events_of("resolved")[0]["layers"]
    )
    before = [registry.count(requests) for requests in (PULLS, BLOBS, TAG_HEADS)]
    run = await run_preload(program, "app:v1")
    after = [registry.count(requests) for requests in (PULLS, BLOBS, TAG_HEADS)]
    assert after == [before[0], before[1], before[2] + 1]
    (done,) = run.events_of("done")
    assert (done["outcome"], done["fetched"]) == ("up_to_date", 0)
    assert run.events[-1] == {
        "event": "totals",
        "images": 1,
        "fetched_images": 0,
        "up_to_date": 1,
        "failed": 0,
        "fetched": 0,
        "missing_referrers": 0,
    }


async def test_a_moved_tag_is_fetched_within_its_ttl(registry, program):
    push_app(registry)
    await run_preload(program, "app:v1")
    moved = push_app(registry, layer=b"newer")
    run = await run_preload(program, "app:v1")
    (done,) = run.events_of("done")
    assert (done["digest"], done["outcome"]) == (moved["index"], "fetched")
    assert done["fetched"] > 0
    assert (await program.manifest(APP, "v1")).digest == moved["index"]


async def test_an_error_fails_only_its_image(registry, program):
    push_app(registry)
    broken = push_manifest(registry, "me/broken", [b"deleted"], tag="v1", platform=NATIVE)
    del registry.repository("me/broken").blobs[digest_of(b"deleted")]
    run = await run_preload(
        program,
        "Bad Name",
        "quay.io/not/configured",
        "app:none",
        "me/broken:v1",
        {"image": "app", "platforms": ["amd64"]},
        "app:v1",
    )
    failed = {event["image"]: event["code"] for event in run.events_of("failed")}
    assert failed == {
        "Bad Name": "invalid_name",
        "quay.io/not/configured": "denied",
        "app:none": "unknown_manifest",
        "me/broken:v1": "unknown_blob",
        "app": "invalid_reference",
    }
    assert [event["image"] for event in run.events_of("done")] == ["app:v1"]
    assert (run.events[-1]["images"], run.events[-1]["failed"]) == (6, 5)
    assert await program.metric("pullcache_preloaded_images_total", result="failed") == 5
    assert await program.metric("pullcache_preloaded_images_total", result="complete") == 1
    assert broken in program.stored()


async def test_pin_pins_the_requested_images_that_are_complete(registry, program):
    digests = push_app(registry)
    await run_preload(program, "app:v1", f"app@{digests[FOREIGN]}", "app:none", pin=True)
    pinned = [name for name, image in (await list_images(program)).items() if image["pinned"]]
    assert sorted(pinned) == ["app:v1", f"app@{digests[FOREIGN]}"]


async def test_a_dry_run_reports_what_is_missing_and_fetches_manifests_only(registry, program):
    digests = push_app(registry)
    await run_preload(program, {"image": "app:v1", "platforms": [FOREIGN]})
    stored_before = program.stored()
    blob_requests = registry.count(BLOBS)
    run = await run_preload(program, "app:v1", dry_run=True)
    assert registry.count(BLOBS) == blob_requests
    (resolved,) = run.events_of("resolved")
    exists = {layer["digest"]: layer["exists"] for layer in resolved["layers"]}
    assert (exists[digest_of(BASE)], exists[digest_of(OWN)]) == (True, False)
    assert resolved["missing"] == sum(
        layer["size"] for layer in resolved["layers"] if not layer["exists"]
    )
    assert run.events_of("plan")[0]["missing"] == resolved["missing"]
    assert run.events_of("done")[0]["outcome"] == "would_fetch"
    assert program.stored() - stored_before == {digests[NATIVE]}


@pytest.mark.parametrize("options", [{"jobs": 0}, {"images": "x"}, {"nothing": 1}])
async def test_an_invalid_request_is_rejected(program, options):
    with pytest.raises(InvalidRequestError):
        await call(program, "post", "/api/v1/preload", {"images": []} | options)
