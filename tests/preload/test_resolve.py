"""What a preload fetches of an image: platforms, nested indexes and referrers."""

import json

from tests.fakes.content import OCI_INDEX, digest_of
from tests.fakes.images import push_manifest
from tests.preload.images import push_app
from tests.support.admin_api import APP, BASE, FOREIGN, NATIVE, OTHER, OWN, check_images
from tests.support.preload_api import run_preload


async def test_only_the_requested_platforms_are_fetched(registry, program):
    push_app(registry)
    await run_preload(program, {"image": "app:v1", "platforms": [FOREIGN]})
    assert digest_of(OWN) not in program.stored()
    assert digest_of(OTHER) in program.stored()
    run = await run_preload(program, {"image": "app:v1", "platforms": ["all"]})
    assert run.events_of("resolved")[0]["platforms"] == ["all"]
    checks = await check_images(program, {"image": "app:v1", "platforms": ["all"]})
    assert [check["state"] for check in checks] == ["complete", "complete"]


async def test_an_image_without_a_requested_platform_fails_after_its_other_platforms_are_fetched(
    registry, program
):
    push_app(registry)
    run = await run_preload(program, {"image": "app:v1", "platforms": [NATIVE, "linux/mips64le"]})
    (failed,) = run.events_of("failed")
    assert failed["reason"] == f"the image is for {NATIVE}, {FOREIGN} only, not for linux/mips64le"
    assert (await check_images(program, "app:v1"))[0]["state"] == "complete"
    run = await run_preload(program, {"image": "app:v1", "platforms": ["linux/mips64le"]})
    assert "not for linux/mips64le" in run.events_of("failed")[0]["reason"]


async def test_a_plain_image_for_another_platform_fails_only_if_a_platform_is_requested(
    registry, program
):
    push_manifest(registry, APP, [BASE], tag="plain", platform=FOREIGN)
    assert (await run_preload(program, "app:plain")).events_of("done")
    run = await run_preload(program, {"image": "app:plain", "platforms": [NATIVE]})
    assert f"the image is for {FOREIGN} only" in run.events_of("failed")[0]["reason"]


async def test_an_index_nested_in_an_index_is_resolved(registry, program):
    inner = push_app(registry, "inner")["index"]
    content = registry.repository(APP).manifests[inner].content
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [{"mediaType": OCI_INDEX, "digest": inner, "size": len(content)}],
    }
    registry.add_manifest(APP, "outer", json.dumps(document).encode(), OCI_INDEX)
    assert (await run_preload(program, "app:outer")).events_of("done")
    assert (await check_images(program, "app:outer"))[0]["state"] == "complete"


async def test_several_names_of_one_image_are_fetched_once(registry, program):
    push_app(registry)
    run = await run_preload(
        program,
        "app:v1",
        "docker.io/library/app:v1",
        {"image": "index.docker.io/app:v1", "platforms": [FOREIGN]},
    )
    (done,) = run.events_of("done")
    assert done["image"] == "app:v1"
    checks = await check_images(program, "app:v1", {"image": "app:v1", "platforms": [FOREIGN]})
    assert [check["state"] for check in checks] == ["complete", "complete"]


async def test_an_image_by_digest_does_not_follow_its_tag(registry, program):
    digests = push_app(registry)
    push_app(registry, layer=b"newer")
    run = await run_preload(program, f"app:v1@{digests['index']}")
    assert run.events_of("done")[0]["image"] == f"app@{digests['index']}"
    assert digest_of(OWN) in program.stored()
    assert digest_of(b"newer") not in program.stored()
