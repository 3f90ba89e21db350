"""SBOMs that upstream has: fetched when the packages of an image are asked for."""

import json
from typing import Any

import pytest

from proxy.contents.sboms.attached import list_blobs, may_have_sbom
from proxy.oci.manifest import MAX_MANIFEST_SIZE
from tests.fakes.content import OCI_INDEX, descriptor, digest_of
from tests.fakes.faults import Fault
from tests.fakes.images import push_manifest
from tests.fakes.registry import FakeRegistry
from tests.support.admin_api import APP, FOREIGN, NATIVE, call, pull_parts, stream
from tests.support.bundles import export_bundle, import_bundle
from tests.support.program import Program
from tests.support.sboms import (
    CYCLONEDX_TYPE,
    DEBIAN,
    PYTHON,
    SPDX,
    make_cyclonedx,
    make_statement,
    pull_whole,
    push_artifact,
    push_attested,
)

SBOM = make_cyclonedx(("django", "5.0"))
STATEMENT = "application/vnd.in-toto+json"
PROVENANCE = "https://slsa.dev/provenance/v1"


async def read(program: Program, image: str = "app", platform: str = "") -> Any:
    found = await call(program, "get", "/api/v1/images/contents", image=image, platform=platform)
    return found["contents"]


def names(inside: Any) -> set[str]:
    return {one["name"] for one in inside["packages"]}


@pytest.fixture
async def image(registry, program):
    """Pull `app:latest` as a client does, without what refers to it."""
    made = registry.add_image(APP, layers=[DEBIAN])
    await pull_whole(program, made)
    return made


def attest(registry: FakeRegistry, document: bytes | None = None) -> dict[str, str]:
    """Push `app:v1` with provenance and an SBOM of each platform; return the digests by platform."""
    made = {
        NATIVE: push_manifest(registry, APP, [DEBIAN], platform=NATIVE),
        FOREIGN: push_manifest(registry, APP, [PYTHON], platform=FOREIGN),
    }
    attested = {
        platform: push_artifact(
            registry,
            APP,
            document or make_statement(digest, ("zlib", f"1 {platform}")),
            STATEMENT,
            predicate=SPDX,
        )
        for platform, digest in made.items()
    }
    push_attested(registry, APP, "v1", made, attested)
    return made


async def pull_native(registry: FakeRegistry, program: Program, made: dict[str, str]) -> None:
    blobs = json.loads(registry.repository(APP).manifests[made[NATIVE]].content)
    layers = [one["digest"] for one in (blobs["config"], *blobs["layers"])]
    await pull_parts(program, APP, "v1", made[NATIVE], *layers)


async def test_an_attestation_of_buildkit_is_fetched_for_the_platform_that_is_asked_for(
    registry, program
):
    made = attest(registry)
    await pull_native(registry, program, made)
    before = program.stored()
    inside = await read(program, "app:v1")
    assert (inside["source"], names(inside), inside["not_fetched"]) == ("attached", {"zlib"}, "")
    assert inside["packages"][0]["version"] == f"1 {NATIVE}"
    # The attestation's manifest, config and statement; nothing of the other platform.
    assert len(program.stored() - before) == 3
    assert registry.count("referrers") == 0


async def test_provenance_is_not_fetched(registry, program, image):
    provenance = b'{"predicateType": "slsa"}'
    push_artifact(registry, APP, provenance, STATEMENT, subject=image.digest, predicate=PROVENANCE)
    assert (await read(program))["source"] == "layers"
    assert digest_of(provenance) not in program.stored()


@pytest.mark.parametrize("has_api", [True, False])
async def test_a_referrer_is_fetched_by_the_api_or_by_the_fallback_tag(
    registry, program, image, has_api
):
    pushed = push_artifact(registry, APP, SBOM, CYCLONEDX_TYPE, subject=image.digest)
    if not has_api:
        registry.referrers = False
        content = registry.repository(APP).manifests[pushed].content
        listed = descriptor(content, "application/vnd.oci.image.manifest.v1+json")
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [listed]}
        tag = image.digest.replace(":", "-")
        registry.add_manifest(APP, tag, json.dumps(index).encode(), OCI_INDEX)
    inside = await read(program)
    assert (inside["source"], names(inside)) == ("attached", {"django"})
    async with registry.down():
        assert await read(program) == inside
    images = await stream(program, "GET", "/api/v1/images")
    assert [one["name"] for one in images] == ["app:latest"]


@pytest.mark.parametrize("way", ["referrer", "attestation"])
async def test_a_fetched_sbom_is_exported_with_its_image(
    registry, program, make_program, tmp_path, way
):
    if way == "referrer":
        made = registry.add_image(APP, layers=[DEBIAN])
        await pull_whole(program, made)
        push_artifact(registry, APP, SBOM, CYCLONEDX_TYPE, subject=made.digest)
        name = "app:latest"
    else:
        await pull_native(registry, program, attest(registry))
        name = "app:v1"
    inside = await read(program, name)
    assert inside["source"] == "attached"
    bundle = await export_bundle(program, name, platforms=[NATIVE])
    other = await make_program(tmp_path / "other")
    await import_bundle(other, bundle)
    async with registry.down():
        assert names(await read(other, name)) == names(inside)


async def test_an_sbom_under_the_tag_of_cosign_is_fetched(registry, program, image):
    pushed = push_artifact(registry, APP, SBOM, CYCLONEDX_TYPE)
    registry.move_tag(APP, image.digest.replace(":", "-") + ".sbom", pushed)
    assert names(await read(program)) == {"django"}


async def test_an_image_without_sboms_has_its_layers_read_and_upstream_is_asked_once(
    registry, program, image
):
    inside = await read(program)
    assert (inside["source"], inside["not_fetched"], inside["problems"]) == ("layers", "", [])
    asked = registry.count()
    assert await read(program) == inside
    assert registry.count() == asked


async def test_without_upstream_the_layers_are_read_and_it_is_asked_later(registry, program, image):
    push_artifact(registry, APP, SBOM, CYCLONEDX_TYPE, subject=image.digest)
    async with registry.down():
        inside = await read(program)
        assert (inside["source"], "openssl" in names(inside)) == ("layers", True)
        assert "docker.io" in inside["not_fetched"]
    assert (await read(program))["source"] == "layers"  # upstream is not asked at once
    program.clock.advance(601)
    inside = await read(program)
    assert (inside["source"], names(inside), inside["not_fetched"]) == ("attached", {"django"}, "")


async def test_reading_all_images_fetches_nothing(registry, program, image):
    push_artifact(registry, APP, SBOM, CYCLONEDX_TYPE, subject=image.digest)
    asked = registry.count()
    await stream(program, "POST", "/api/v1/images/contents/read", {})
    assert registry.count() == asked
    shown = await call(program, "get", "/api/v1/images/contents", image="app", read="false")
    assert shown["contents"]["source"] == "layers"
    assert "alone" in shown["contents"]["not_fetched"]
    assert (await read(program))["source"] == "attached"
    answer = await call(program, "get", "/api/v1/images/packages", package="openssl")
    assert answer["matches"] == []  # what the layers had is forgotten


async def test_a_crash_while_an_sbom_is_read_leaves_the_layers(
    registry, program, image, monkeypatch
):
    push_artifact(registry, APP, SBOM, CYCLONEDX_TYPE, subject=image.digest)
    start = "import os, sys; sys.argv[2:] == ['sbom'] and os.abort(); "
    monkeypatch.setattr(
        "proxy.contents.process._START",
        start + __import__("proxy.contents.process", fromlist=["x"])._START,
    )
    inside = await read(program)
    assert (inside["source"], "openssl" in names(inside)) == ("layers", True)
    (problem,) = inside["problems"]
    assert problem.startswith(f"the attached SBOM {digest_of(SBOM)[:19]} was not taken: ")
    assert "it ended with status -6" in problem


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"nonsense", "not JSON"),
        (b"{}", "neither SPDX nor CycloneDX"),
        (make_cyclonedx(), "it lists no packages"),
        (make_statement("sha256:" + "0" * 64, ("zlib", "1")), "it is about another image"),
    ],
)
async def test_an_sbom_that_cannot_be_taken_is_named(registry, program, image, document, reason):
    push_artifact(registry, APP, document, CYCLONEDX_TYPE, subject=image.digest)
    inside = await read(program)
    assert inside["source"] == "layers"
    assert reason in inside["problems"][0]


async def test_the_next_sbom_is_taken_if_one_cannot_be_read(registry, program, image):
    push_artifact(registry, APP, b"nonsense", CYCLONEDX_TYPE, subject=image.digest)
    push_artifact(registry, APP, SBOM, CYCLONEDX_TYPE, subject=image.digest)
    assert names(await read(program)) == {"django"}


# What is not fetched.


async def test_an_sbom_that_is_too_large_is_not_fetched(registry, program, image, monkeypatch):
    monkeypatch.setattr("proxy.contents.sboms.fetcher.MAX_SBOM_SIZE", len(SBOM) - 1)
    push_artifact(registry, APP, SBOM, CYCLONEDX_TYPE, subject=image.digest)
    inside = await read(program)
    assert f"an SBOM has {len(SBOM)} bytes" in inside["not_fetched"]
    assert digest_of(SBOM) not in program.stored()


async def test_an_sbom_of_another_size_than_stated_is_not_fetched(registry, program, image):
    document = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "artifactType": CYCLONEDX_TYPE,
            "config": descriptor(b"{}", "application/vnd.oci.empty.v1+json"),
            "layers": [{**descriptor(SBOM, CYCLONEDX_TYPE), "size": 10}],
            "subject": {**descriptor(b"", "application/vnd.oci.image.manifest.v1+json"), "digest": image.digest},
        }
    ).encode()  # fmt: skip
    for blob in (b"{}", SBOM):
        registry.add_blob(blob, APP)
    registry.add_manifest(APP, None, document, "application/vnd.oci.image.manifest.v1+json")
    inside = await read(program)
    assert inside["source"] == "layers"
    assert f"has {len(SBOM)} bytes, not 10" in inside["not_fetched"]


async def test_a_damaged_sbom_is_not_stored(registry, program, image):
    push_artifact(registry, APP, SBOM, CYCLONEDX_TYPE, subject=image.digest)
    registry.fail(registry.body_of(digest_of(SBOM)), Fault(flip_at=5), times=None)
    inside = await read(program)
    assert inside["source"] == "layers"
    assert inside["not_fetched"]
    assert digest_of(SBOM) not in program.stored()


async def test_of_many_referrers_some_are_fetched(registry, program, image, monkeypatch):
    monkeypatch.setattr("proxy.contents.sboms.fetcher.MAX_FETCHED_ATTACHMENTS", 2)
    for number in range(4):
        push_artifact(registry, APP, b"%d" % number, CYCLONEDX_TYPE, subject=image.digest)
    before = len(program.stored())
    inside = await read(program)
    assert "only 2 are fetched" in inside["not_fetched"]
    assert len(program.stored()) - before <= 2 * 3
    assert len(inside["problems"]) == 2


async def test_an_upstream_that_is_slow_is_not_waited_for(registry, program, image, monkeypatch):
    monkeypatch.setattr("proxy.contents.sboms.fetcher.MAX_SBOM_FETCH_SECONDS", 0.0)
    inside = await read(program)
    assert inside["not_fetched"] == "docker.io took more than 0 s"


async def test_what_the_configuration_denies_is_not_fetched(registry, program, image):
    push_artifact(registry, APP, SBOM, CYCLONEDX_TYPE, subject=image.digest)
    await program.reload(upstreams={"docker.io": {"url": registry.url, "deny": ["library/app"]}})
    inside = await read(program)
    assert "does not allow library/app" in inside["not_fetched"]


async def test_with_reading_off_nothing_is_fetched(registry, program, image):
    await stream(program, "POST", "/api/v1/images/contents/read", {})
    await program.reload(contents={"scan": "off"})
    asked = registry.count()
    assert (await read(program))["source"] == "layers"
    assert registry.count() == asked


async def test_the_last_pulls_of_a_quota_are_left_to_clients(registry, program, image):
    push_artifact(registry, APP, SBOM, CYCLONEDX_TYPE, subject=image.digest)
    registry.pull_limit = 3
    other = registry.add_image("me/other", layers=[PYTHON])
    await pull_whole(program, other)
    inside = await read(program)
    assert inside["source"] == "layers"
    assert "reserved for clients" in inside["not_fetched"]


@pytest.mark.parametrize(
    ("item", "is_wanted"),
    [
        ({}, True),
        ({"artifactType": None}, True),
        ({"artifactType": CYCLONEDX_TYPE}, True),
        ({"artifactType": "application/spdx+json; charset=utf-8"}, True),
        ({"artifactType": "application/vnd.example.sbom.v1"}, True),
        ({"artifactType": "application/vnd.dev.sigstore.bundle.v0.3+json"}, True),
        ({"artifactType": STATEMENT, "annotations": {"in-toto.io/predicate-type": SPDX}}, True),
        ({"artifactType": STATEMENT, "annotations": {"predicateType": PROVENANCE}}, False),
        ({"artifactType": STATEMENT, "annotations": 1}, True),
        ({"artifactType": "application/vnd.dev.cosign.artifact.sig.v1+json"}, False),
        ({"artifactType": "application/vnd.docker.attestation.manifest.v1+json"}, True),
        ({"artifactType": 7}, False),
    ],
)
def test_referrers_that_may_be_sboms_are_told_by_their_descriptor(item, is_wanted):
    assert may_have_sbom(item) is is_wanted


@pytest.mark.parametrize("content", [b"no manifest", b" " * (MAX_MANIFEST_SIZE + 1)])
def test_what_is_no_manifest_names_no_blobs(content):
    assert list_blobs(content) == []
