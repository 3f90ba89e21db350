"""The offline check: which images could be pulled without upstream."""

from tests.fakes.content import digest_of
from tests.fakes.images import blobs_of, push_manifest
from tests.support.admin_api import (
    APP,
    FOREIGN,
    NATIVE,
    OWN,
    check_images,
    pull_parts,
)
from tests.support.bundles import blob_path


async def test_an_image_is_complete_for_this_machine_by_default(registry, program, app):
    (check,) = await check_images(program, "app:v1")
    assert (check["state"], check["reason"]) == ("absent", "not in the store")
    await pull_parts(program, APP, "v1", app[NATIVE], *blobs_of(registry, APP, app[NATIVE]))
    (check,) = await check_images(program, "docker.io/library/app:v1")
    assert (check["image"], check["platform"], check["state"]) == ("app:v1", NATIVE, "complete")
    assert check["digest"] == app[NATIVE]
    await program.restart(offline=True)
    for digest in (app["index"], app[NATIVE]):
        assert (await program.manifest(APP, digest)).status == 200
    for digest in blobs_of(registry, APP, app[NATIVE]):
        assert (await program.blob(digest)).status == 200


async def test_each_requested_platform_has_a_state_of_its_own(registry, program, app):
    await pull_parts(program, APP, "v1", app[NATIVE], *blobs_of(registry, APP, app[NATIVE])[:2])
    selection = {"image": "app:v1", "platforms": [NATIVE, FOREIGN, "plan9/mips"]}
    checks = {check["platform"]: check for check in await check_images(program, selection)}
    assert {platform: check["state"] for platform, check in checks.items()} == {
        NATIVE: "partial",
        FOREIGN: "absent",
        "plan9/mips": "absent",
    }
    assert [blob["digest"] for blob in checks[NATIVE]["missing"]] == [digest_of(OWN)]
    assert checks["plan9/mips"]["reason"] == f"the image is for {NATIVE}, {FOREIGN} only"
    all_checks = await check_images(program, {"image": "app:v1", "platforms": ["all"]})
    assert [check["platform"] for check in all_checks] == [NATIVE, FOREIGN]


async def test_a_plain_manifest_matches_unless_another_platform_is_requested(registry, program):
    digest = push_manifest(registry, APP, [OWN], tag="z", platform=FOREIGN)
    await pull_parts(program, APP, "z", *blobs_of(registry, APP, digest))
    selection = {"image": "app:z", "platforms": [NATIVE]}
    checks = await check_images(program, "app:z", selection, f"app@{digest}")
    assert [check["state"] for check in checks] == ["complete", "absent", "complete"]
    assert checks[0]["platform"] == FOREIGN


async def test_a_deleted_file_is_missing(registry, program):
    digest = push_manifest(registry, APP, [OWN], tag="v1")
    await pull_parts(program, APP, "v1", *blobs_of(registry, APP, digest))
    (program.root / blob_path(digest_of(OWN))).unlink()
    (check,) = await check_images(program, "app:v1")
    assert (check["state"], len(check["missing"])) == ("partial", 1)
    (program.root / blob_path(digest)).unlink()
    (check,) = await check_images(program, "app:v1")
    assert check["state"] == "absent"


async def test_blobs_of_another_repository_do_not_count(registry, program):
    digest = push_manifest(registry, APP, [OWN], tag="v1")
    await pull_parts(program, APP, "v1", *blobs_of(registry, APP, digest))
    checks = await check_images(program, "me/copy:v1", f"me/copy@{digest}")
    assert [check["state"] for check in checks] == ["absent", "absent"]


async def test_an_invalid_or_denied_image_is_absent_with_the_reason(program):
    checks = await check_images(
        program, "Not An Image", "quay.io/me/app", {"image": "app", "platforms": ["riscv"]}
    )
    assert [check["state"] for check in checks] == ["absent"] * 3
    reasons = ("not a repository", "not configured", "not a platform")
    for check, reason in zip(checks, reasons, strict=True):
        assert reason in check["reason"]
