"""What is in a stored image, asked for by way of the admin API."""

import asyncio
import json
import sqlite3
from contextlib import closing
from typing import Any

import pytest

from proxy.contents.sboms import attached as attached_module
from proxy.contents.sboms.attached import find_documents
from proxy.errors import (
    DeniedError,
    InvalidReferenceError,
    InvalidRequestError,
    UnknownManifestError,
)
from proxy.oci.digest import Digest
from tests.fakes.images import blobs_of, push_index, push_manifest
from tests.support.admin_api import APP, FOREIGN, NATIVE, call, pull_parts, remove_images, stream
from tests.support.layers import DPKG_STATUS, make_layer
from tests.support.openapi import validate
from tests.support.preload_api import run_preload
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


async def contents(program: Program, image: str = "app", platform: str = "") -> Any:
    found = await call(program, "get", "/api/v1/images/contents", image=image, platform=platform)
    validate(found, "ContentsAnswer")
    return found


async def ask(program: Program, question: str) -> Any:
    answer = await call(program, "get", "/api/v1/images/packages", package=question)
    validate(answer, "PackageAnswer")
    return answer


def names(found: Any) -> set[str]:
    return {f"{one['name']} {one['version']}" for one in found["contents"]["packages"]}


DEBIAN_NAMES = {
    "openssl 3.0.14-1~deb12u2",
    "libssl3 3.0.14-1~deb12u2",
    "libc-bin 2.36-9+deb12u8",
}


def rows(program: Program, table: str) -> int:
    with closing(sqlite3.connect(program.root / "index.sqlite")) as connection:
        count: int = connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    return count


@pytest.mark.parametrize("docker", [False, True])
async def test_the_packages_of_an_image_are_those_of_its_layers(registry, program, docker):
    await pull_whole(program, registry.add_image(APP, layers=[DEBIAN, PYTHON], docker=docker))
    found = await contents(program)
    assert names(found) == DEBIAN_NAMES | {"flask 3.0.1"}
    assert found["image"] == "app:latest"
    inside = found["contents"]
    assert (inside["source"], inside["sbom"], inside["problems"]) == ("layers", None, [])
    assert inside["release"]["id"] == "debian"
    assert "1 Java archives were seen" in inside["unread"]


async def test_what_was_read_is_kept(registry, program, monkeypatch):
    await pull_whole(program, registry.add_image(APP, layers=[DEBIAN]))
    first = await contents(program)
    monkeypatch.setattr("proxy.contents.process._START", "raise SystemExit(1)")
    assert await contents(program) == first
    await program.restart()
    assert await contents(program) == first


async def test_a_layer_that_images_share_is_read_once(registry, program, monkeypatch):
    await pull_whole(program, registry.add_image(APP, layers=[DEBIAN]))
    await pull_whole(program, registry.add_image("me/other", layers=[DEBIAN, PYTHON]))
    await contents(program)
    monkeypatch.setattr("proxy.contents.process._START", "raise SystemExit(1)")
    found = await contents(program, "me/other")
    assert names(found) == DEBIAN_NAMES
    assert found["contents"]["problems"] == ["layer 2: the layer could not be read: it failed"]


async def test_what_was_read_goes_with_the_image(registry, program):
    await pull_whole(program, registry.add_image(APP, layers=[DEBIAN]))
    await contents(program)
    tables = ("layer_contents", "image_contents", "packages", "image_packages")
    assert [rows(program, table) for table in tables] == [1, 1, 3, 3]
    await remove_images(program, "app:latest")
    assert [rows(program, table) for table in tables] == [0, 0, 0, 0]


async def test_an_image_that_is_not_stored_is_not_read(program):
    with pytest.raises(UnknownManifestError, match="is not in the store"):
        await contents(program)
    with pytest.raises(InvalidReferenceError):
        await contents(program, "A")


async def test_the_platform_is_chosen(registry, program):
    made = {
        NATIVE: push_manifest(registry, APP, [DEBIAN], platform=NATIVE),
        FOREIGN: push_manifest(registry, APP, [PYTHON], platform=FOREIGN),
    }
    push_index(registry, APP, "v1", made)
    await pull_parts(program, APP, "v1", made[FOREIGN], *blobs_of(registry, APP, made[FOREIGN]))
    assert (await contents(program, "app:v1"))["platform"] == FOREIGN  # the only one
    await pull_parts(program, APP, "v1", made[NATIVE], *blobs_of(registry, APP, made[NATIVE]))
    assert (await contents(program, "app:v1"))["platform"] == NATIVE
    assert names(await contents(program, "app:v1", FOREIGN)) == {"flask 3.0.1"}
    with pytest.raises(UnknownManifestError, match="not in the store for linux/mips"):
        await contents(program, "app:v1", "linux/mips")


async def test_layers_that_are_missing_are_said_and_nothing_is_kept(registry, program):
    digest = push_manifest(registry, APP, [DEBIAN, PYTHON], tag="v1")
    config, first, _ = blobs_of(registry, APP, digest)
    await pull_parts(program, APP, "v1", config, first)
    found = await contents(program, "app:v1")
    assert names(found) == DEBIAN_NAMES
    assert found["contents"]["problems"] == ["layer 2: it is not in the store, and was not read"]
    assert rows(program, "image_contents") == 0
    await pull_parts(program, APP, *blobs_of(registry, APP, digest)[2:])
    assert "flask 3.0.1" in names(await contents(program, "app:v1"))


async def test_a_damaged_layer_is_said(registry, program):
    await pull_whole(program, registry.add_image(APP, layers=[DEBIAN[:-40], b"nonsense"]))
    problems = (await contents(program))["contents"]["problems"]
    assert problems == [
        "layer 1: the layer is truncated: its gzip data has no end",
        "layer 2: the layer is truncated: its end is missing",
    ]


async def test_what_has_no_file_system_has_no_packages(registry, program):
    digest = push_artifact(
        registry, APP, b"chart", "application/vnd.cncf.helm.chart.content.v1.tar+gzip"
    )
    registry.move_tag(APP, "chart", digest)
    await pull_parts(program, APP, "chart", *blobs_of(registry, APP, digest))
    found = await contents(program, "app:chart")
    assert (found["contents"]["source"], names(found)) == ("none", set())


async def test_reading_can_be_off(registry, program):
    await pull_whole(program, registry.add_image(APP, layers=[DEBIAN]))
    await pull_whole(program, registry.add_image("me/other", layers=[PYTHON]))
    await contents(program)
    await program.reload(contents={"scan": "off"})
    assert names(await contents(program)) == DEBIAN_NAMES
    with pytest.raises(DeniedError, match=r'contents\.scan = "off"'):
        await contents(program, "me/other")


async def test_without_room_in_the_index_it_is_read_each_time(registry, program, monkeypatch):
    monkeypatch.setattr("proxy.storage.records.contents.MAX_CONTENTS_SHARE", 0)
    await pull_whole(program, registry.add_image(APP, layers=[DEBIAN]))
    for _ in range(2):
        assert names(await contents(program)) == DEBIAN_NAMES
    assert rows(program, "image_contents") == 0


# Attached SBOMs.


@pytest.fixture
def attest(registry):
    """Push `app:v1` with an attestation of each platform."""

    def push(document=None):
        manifests = {
            NATIVE: push_manifest(registry, APP, [DEBIAN], platform=NATIVE),
            FOREIGN: push_manifest(registry, APP, [PYTHON], platform=FOREIGN),
        }
        statements = {
            platform: push_artifact(
                registry,
                APP,
                document or make_statement(digest, ("zlib", f"1 {platform}")),
                "application/vnd.in-toto+json",
                predicate=SPDX,
            )
            for platform, digest in manifests.items()
        }
        push_attested(registry, APP, "v1", manifests, statements)
        return statements

    return push


async def test_an_attestation_of_buildkit_comes_with_a_preload_and_is_preferred(program, attest):
    statements = attest()
    await run_preload(program, "app:v1")
    found = await contents(program, "app:v1")
    assert names(found) == {f"zlib 1 {NATIVE}"}
    inside = found["contents"]
    assert inside["source"] == "attached"
    assert inside["sbom"]["manifest"] == statements[NATIVE]
    assert inside["sbom"]["format"] == "SPDX-2.3"
    assert "signature was not verified" in inside["unread"]


@pytest.mark.parametrize(
    "document",
    [make_statement("sha256:" + "0" * 64, ("zlib", "1")), b"nonsense", make_statement("x")],
    ids=["about another image", "damaged", "empty"],
)
async def test_an_attestation_that_says_nothing_is_passed_over(program, attest, document):
    attest(document)
    await run_preload(program, "app:v1")
    found = await contents(program, "app:v1")
    assert (found["contents"]["source"], names(found)) == ("layers", DEBIAN_NAMES)


async def test_a_referrer_is_taken(registry, program):
    image = registry.add_image(APP, layers=[DEBIAN])
    sbom = make_cyclonedx(("django", "5.0"))
    push_artifact(registry, APP, sbom, CYCLONEDX_TYPE, subject=image.digest)
    await run_preload(program, "app:latest")
    found = await contents(program)
    assert names(found) == {"django 5.0"}
    assert found["contents"]["packages"][0]["purl"] == "pkg:pypi/django@5.0"


DIGEST = Digest.from_content(b"x")


@pytest.mark.parametrize(
    ("layer", "manifest", "count"),
    [
        ({"mediaType": "application/spdx+json"}, {}, 1),
        ({"mediaType": "application/vnd.cyclonedx+json; version=1.6"}, {}, 1),
        ({"mediaType": "application/vnd.in-toto+json"}, {}, 0),
        ({"mediaType": "application/vnd.in-toto+json", "annotations": {"in-toto.io/predicate-type": "https://slsa.dev/provenance/v1"}}, {}, 0),
        ({"mediaType": "application/vnd.dsse.envelope.v1+json", "annotations": {"predicateType": "https://cyclonedx.org/bom/v1.4"}}, {}, 1),
        ({"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json"}, {"annotations": {"dev.sigstore.bundle.predicateType": SPDX}}, 1),
        ({"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json"}, {"annotations": 1}, 0),
        ({"mediaType": "application/spdx+json", "digest": "x"}, {}, 0),
        ({"mediaType": "application/spdx+json", "digest": 1}, {}, 0),
        ({"mediaType": "application/spdx+json", "size": "x"}, {}, 0),
        ({}, {}, 0),
    ],
)  # fmt: skip
def test_sboms_are_told_by_their_media_type(layer, manifest, count):
    document = {"layers": [{"digest": str(DIGEST), "size": 5} | layer, 1]} | manifest
    found = list(find_documents(DIGEST, json.dumps(document).encode()))
    assert len(found) == count
    assert all((one.manifest, one.digest, one.size) == (DIGEST, DIGEST, 5) for one in found)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"layers": 1}', b"[" * 99999])
def test_a_damaged_manifest_has_no_sboms(content):
    assert list(attached_module.find_documents(DIGEST, content)) == []


# Questions.


async def test_a_question_is_answered_from_what_was_read(registry, program):
    await pull_whole(program, registry.add_image(APP, layers=[DEBIAN]))
    await pull_whole(program, registry.add_image("me/other", "v2", layers=[DEBIAN, PYTHON]))
    await pull_whole(program, registry.add_image("me/unread", layers=[PYTHON]))
    await contents(program)
    await contents(program, "me/other:v2")
    answer = await ask(program, "openssl<3.0.15")
    assert [match["images"] for match in answer["matches"]] == [["app:latest"], ["me/other:v2"]]
    assert {one["name"] for one in answer["matches"][0]["packages"]} == {"openssl", "libssl3"}
    assert (answer["read"], answer["not_read"], answer["more"]) == (2, 1, 0)
    assert (await ask(program, "openssl >= 3.0.15"))["matches"] == []
    found = (await ask(program, "Flask<3.1"))["matches"]
    assert [match["images"] for match in found] == [["me/other:v2"]]


async def test_images_that_were_not_read_are_read_on_demand(registry, program):
    made = {
        NATIVE: push_manifest(registry, APP, [DEBIAN], platform=NATIVE),
        FOREIGN: push_manifest(registry, APP, [PYTHON], platform=FOREIGN),
    }
    push_index(registry, APP, "v1", made)
    await pull_parts(program, APP, "v1", made[NATIVE], *blobs_of(registry, APP, made[NATIVE]))
    await pull_parts(program, APP, made[FOREIGN])
    await pull_whole(program, registry.add_image("me/other", layers=[PYTHON]))
    events = await stream(program, "POST", "/api/v1/images/contents/read", {"filter": "app"})
    for event in events:
        validate(event, "ReadEvent")
    assert [(event["platform"], event["outcome"], event["packages"]) for event in events] == [
        (NATIVE, "read", 3),
        (FOREIGN, "incomplete", 0),
    ]
    assert events[1]["reason"] == "1 of 1 layers are not in the store"
    events = await stream(program, "POST", "/api/v1/images/contents/read", {})
    assert [event["outcome"] for event in events] == ["incomplete", "read"]
    answer = await ask(program, "flask")
    assert (answer["read"], answer["not_read"]) == (2, 0)


async def test_numbers_that_took_long_to_count_are_kept_for_a_while(registry, program, monkeypatch):
    monkeypatch.setattr("proxy.contents.questions.SLOW_COUNT", -1.0)
    assert (await ask(program, "openssl"))["not_read"] == 0
    await pull_whole(program, registry.add_image(APP, layers=[DEBIAN]))
    assert (await ask(program, "openssl"))["not_read"] == 0
    monkeypatch.setattr("proxy.contents.questions.COUNTS_TTL", 0.0)
    assert (await ask(program, "openssl"))["not_read"] == 1


async def test_the_images_of_a_large_store_are_counted_in_the_background(
    registry, program, monkeypatch
):
    await pull_whole(program, registry.add_image(APP, layers=[DEBIAN]))
    monkeypatch.setattr("proxy.contents.questions.QUICK_INDEX_SIZE", 0)
    monkeypatch.setattr("proxy.contents.questions.COUNT_WAIT", 0.0)
    monkeypatch.setattr("proxy.contents.questions.SLOW_COUNT", -1.0)
    answer = await ask(program, "openssl")
    assert (answer["read"], answer["not_read"]) == (None, None)
    async with asyncio.timeout(30):
        while (answer := await ask(program, "openssl"))["read"] is None:
            pass
    assert (answer["read"], answer["not_read"]) == (0, 1)


async def test_a_question_that_cannot_be_understood_is_an_error(program):
    with pytest.raises(InvalidRequestError, match="NAME<VERSION"):
        await ask(program, "openssl<<3")


async def test_an_answer_names_some_images_and_counts_the_rest(registry, program):
    for number in range(3):
        layers = [DEBIAN, str(number).encode()]
        await pull_whole(program, registry.add_image(f"me/app{number}", layers=layers))
    await stream(program, "POST", "/api/v1/images/contents/read", {})
    answer = await call(program, "get", "/api/v1/images/packages", package="openssl", limit="2")
    assert (len(answer["matches"]), answer["more"]) == (2, 1)


async def test_versions_that_cannot_be_compared_are_named(registry, program):
    odd = DPKG_STATUS.replace(b"3.0.14-1~deb12u2", b"one:two")
    await pull_whole(
        program, registry.add_image(APP, layers=[make_layer({"var/lib/dpkg/status": odd})])
    )
    await contents(program)
    answer = await ask(program, "openssl<3")
    assert answer["not_compared"] == ["libssl3 one:two (deb)", "openssl one:two (deb)"]
