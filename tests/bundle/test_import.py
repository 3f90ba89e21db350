"""Imports: an image is added as a whole or not at all, in any order of entries, and repeatable."""

import asyncio
import gzip
import json
import os
import threading
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
from backports import zstd

from proxy.cli.api_client import AdminClient
from proxy.errors import NoSpaceError
from proxy.storage.blobs import allocated_size
from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.support.bundles import (
    APP_FULL_NAME,
    LAYERS,
    LayoutBuilder,
    blob_digests,
    blob_path,
    build_layout,
    export_bundle,
    import_bundle,
    make_tar,
    pull_all_platforms,
    unpack_tar,
)

MIB = 1 << 20


def docker_manifest(layout: LayoutBuilder, digest: str, *names: str) -> bytes:
    """Return docker's manifest.json with names for an image of the layout."""
    config = json.loads(layout.files[blob_path(digest)])["config"]["digest"]
    image = {"Config": blob_path(config), "RepoTags": names, "Layers": []}
    return json.dumps([image]).encode()


@pytest.fixture
async def offline_program(make_program, tmp_path):
    """An offline program with an empty store."""
    return await make_program(tmp_path / "offline", offline=True)


async def test_an_imported_image_is_pulled_without_upstream(registry, program, offline_program):
    image = registry.add_image(layers=LAYERS, index=True)
    await pull_all_platforms(program, image)
    bundle = await export_bundle(program, "app")
    requests_before = len(registry.requests)
    report = await import_bundle(offline_program, bundle)
    (imported,) = report["images"]
    assert imported == {"name": "app:latest", "digest": image.digest, "missing": [], "reason": ""}
    assert report["added"] == len(blob_digests(bundle))
    await offline_program.pull(image)
    for digest in image.manifests.values():
        assert (await offline_program.manifest(image, digest)).digest == digest
    assert len(registry.requests) == requests_before
    # An imported image can be exported again.
    assert await export_bundle(offline_program, "app") == bundle


async def test_an_imported_tag_is_revalidated_after_its_ttl(registry, make_program, tmp_path):
    image = registry.add_image()
    program = await make_program(tmp_path / "online")
    layout, _ = build_layout(name=f"{APP_FULL_NAME}:latest")
    await import_bundle(program, layout.to_tar())
    assert (await program.manifest("library/app")).digest != image.digest
    assert not registry.requests
    program.clock.advance(3600)
    assert (await program.manifest("library/app")).digest == image.digest


async def test_an_import_clears_the_negative_cache_of_its_tag(program):
    assert (await program.manifest("library/app", "1")).status == 404
    layout, digest = build_layout()
    await import_bundle(program, layout.to_tar())
    assert (await program.manifest("library/app", "1")).digest == digest


async def test_imported_blobs_are_served_under_their_repository_only(registry, program):
    layout, _ = build_layout(b"secret")
    await import_bundle(program, layout.to_tar())
    layer = digest_of(b"secret")
    assert (await program.blob(layer)).status == 200
    assert (await program.blob(layer, "library/other")).status == 404


async def test_a_delta_is_complete_with_the_blobs_of_an_earlier_bundle(
    registry, program, offline_program
):
    base = registry.add_image(tag="1", layers=LAYERS)
    await pull_all_platforms(program, base)
    earlier = await export_bundle(program, "app:1")
    newer = registry.add_image(tag="2", layers=(*LAYERS, b"third"))
    await pull_all_platforms(program, newer)
    delta = await export_bundle(program, "app:1", "app:2", exclude=blob_digests(earlier))
    before = offline_program.stored()
    report = await import_bundle(offline_program, delta)
    first, second = report["images"]
    assert first["missing"] == [base.digest]
    assert second["missing"] == list(base.layers)
    assert (offline_program.stored(), report["added"]) == (before, 0)
    await import_bundle(offline_program, earlier)
    report = await import_bundle(offline_program, delta)
    assert [image["missing"] for image in report["images"]] == [[], []]
    await offline_program.pull(base)
    await offline_program.pull(newer)


async def test_a_delta_is_incomplete_without_the_platforms_that_it_expects(
    registry, program, offline_program
):
    image = registry.add_image(index=True)
    await pull_all_platforms(program, image)
    # As if only arm64 had changed since an earlier bundle.
    changed = {image.digest, image.manifests["linux/arm64"]}
    unchanged = blob_digests(await export_bundle(program, "app")) - changed
    delta = await export_bundle(program, "app", exclude=unchanged)
    (imported,) = (await import_bundle(offline_program, delta))["images"]
    assert image.manifests["linux/amd64"] in imported["missing"]


async def test_an_index_is_complete_if_its_manifests_in_the_bundle_are(program):
    layout = LayoutBuilder()
    present, absent = (
        layout.add_manifest(b"one", architecture=arch) for arch in ("amd64", "arm64")
    )
    del layout.files[blob_path(absent["digest"])]
    digest = layout.list_image(layout.add_index(present, absent), name=f"{APP_FULL_NAME}:1")
    (image,) = (await import_bundle(program, layout.to_tar()))["images"]
    assert image["missing"] == []
    assert (await program.manifest("library/app", "1")).digest == digest


async def test_a_partial_platform_makes_the_image_incomplete(program):
    layout = LayoutBuilder()
    first = layout.add_manifest(b"one", architecture="amd64")
    second = layout.add_manifest(b"two", architecture="arm64")
    layout.list_image(layout.add_index(first, second), name=f"{APP_FULL_NAME}:1")
    lost = digest_of(b"two")
    del layout.files[blob_path(lost)]
    report = await import_bundle(program, layout.to_tar())
    assert report["images"][0]["missing"] == [lost]
    assert program.stored() == set()
    assert (await program.manifest("library/app", "1")).status == 404


async def test_an_incomplete_image_does_not_stop_the_others(program):
    layout = LayoutBuilder()
    layout.list_image(layout.add_manifest(b"one"), name=f"{APP_FULL_NAME}:1")
    layout.list_image(layout.add_manifest(b"two", b"three"), name=f"{APP_FULL_NAME}:2")
    del layout.files[blob_path(digest_of(b"three"))]
    report = await import_bundle(program, layout.to_tar())
    assert [image["missing"] for image in report["images"]] == [[], [digest_of(b"three")]]
    # The blobs that only the incomplete image needs were removed.
    assert digest_of(b"one") in program.stored()
    assert digest_of(b"two") not in program.stored()
    assert (await program.manifest("library/app", "1")).status == 200
    assert (await program.manifest("library/app", "2")).status == 404


async def test_stored_blobs_are_skipped(program):
    layout, _ = build_layout(b"x" * MIB)
    first = await import_bundle(program, layout.to_tar())
    again = await import_bundle(program, layout.to_tar())
    assert (first["added"], first["already_stored"]) == (3, 0)
    assert (again["added"], again["added_bytes"], again["already_stored"]) == (0, 0, 3)


async def test_an_interrupted_upload_keeps_complete_blobs_for_the_next_one(program):
    layout, digest = build_layout(b"x" * MIB, b"y" * MIB)
    bundle = layout.to_tar()

    _, writer = await asyncio.open_unix_connection(program.root / "admin.sock")
    head = f"POST /api/v1/import HTTP/1.1\r\nHost: x\r\nContent-Length: {len(bundle)}\r\n\r\n"
    writer.write(head.encode() + bundle[: MIB + 200_000])
    async with asyncio.timeout(10):
        while await program.metric("pullcache_store_blobs") < 2:
            pass
    writer.close()
    async with asyncio.timeout(10):
        while list((program.root / "ingest").iterdir()):
            await program.metric("pullcache_store_blobs")
    assert digest_of(b"x" * MIB) in program.stored()
    assert len(program.stored()) == 2
    assert (await program.manifest("library/app", "1")).status == 404
    report = await import_bundle(program, bundle)
    assert (report["already_stored"], report["added"]) == (2, 2)
    assert (await program.manifest("library/app", "1")).digest == digest


@pytest.mark.parametrize("pack", [zstd.compress, gzip.compress], ids=["zstd", "gzip"])
async def test_a_compressed_bundle_is_recognised(program, pack):
    layout, digest = build_layout(bytes(3 * MIB), b"end")
    bundle = layout.to_tar()
    # Two streams, as parallel compressors write.
    await import_bundle(program, pack(bundle[:1000]) + pack(bundle[1000:]))
    assert (await program.manifest("library/app", "1")).digest == digest


async def test_entry_names_may_start_with_dot_slash(program):
    layout, digest = build_layout()
    content = unpack_tar(layout.to_tar())
    await import_bundle(program, make_tar({f"./{name}": data for name, data in content.items()}))
    assert (await program.manifest("library/app", "1")).digest == digest


@pytest.mark.parametrize(
    ("annotations", "default_name"),
    [
        ({"name": f"{APP_FULL_NAME}:1", "ref": "other"}, None),
        ({"name": "index.docker.io/library/app:1"}, None),
        ({"name": "app:1"}, None),
        ({"ref": f"{APP_FULL_NAME}:1"}, None),
        ({"ref": "1"}, "app"),
        ({}, "docker.io/library/app:1"),
    ],
)
async def test_an_image_has_the_name_of_its_most_explicit_annotation(
    program, annotations, default_name
):
    layout = LayoutBuilder()
    digest = layout.list_image(layout.add_manifest(b"layer"), **annotations)
    report = await import_bundle(program, layout.to_tar(), name=default_name)
    assert report["images"][0]["name"] == "app:1"
    assert (await program.manifest("library/app", "1")).digest == digest


async def test_an_image_without_a_full_name_has_the_one_in_dockers_manifest(program):
    layout = LayoutBuilder()
    described = layout.add_manifest(b"layer")
    digest = layout.list_image(described, ref="1")
    layout.files["manifest.json"] = docker_manifest(layout, digest, "app:7")
    await import_bundle(program, layout.to_tar())
    assert (await program.manifest("library/app", "7")).digest == digest


async def test_an_image_with_several_names_is_added_under_those_that_are_allowed(program):
    layout = LayoutBuilder()
    digest = layout.list_image(layout.add_manifest(b"layer"))
    names = ("app:7", "quay.io/some/thing:7")
    layout.files["manifest.json"] = docker_manifest(layout, digest, *names)
    report = await import_bundle(program, layout.to_tar())
    assert [bool(image["reason"]) for image in report["images"]] == [False, True]
    assert report["added"] == 3
    assert (await program.manifest("library/app", "7")).digest == digest


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "--name"),
        ("quay.io/some/thing:1", "quay.io"),
        ("docker.io/NOT/A NAME", "repository name"),
        (f"{APP_FULL_NAME}@sha256:{'0' * 64}", "under this name"),
        ("docker.io/library/forbidden:1", "does not allow"),
    ],
)
async def test_an_image_that_cannot_be_added_is_rejected_with_the_reason(
    make_program, registry, name, reason
):
    upstreams = {"docker.io": {"url": registry.url, "deny": ["library/forbidden"]}}
    program = await make_program(upstreams=upstreams)
    layout, _ = build_layout(name=name)
    report = await import_bundle(program, layout.to_tar())
    assert reason in report["images"][0]["reason"]
    assert program.stored() == set()


async def test_an_image_by_digest_is_pulled_by_digest(program):
    layout = LayoutBuilder()
    described = layout.add_manifest(b"layer")
    digest = layout.list_image(described, name=f"{APP_FULL_NAME}@{described['digest']}")
    await import_bundle(program, layout.to_tar())
    assert (await program.manifest("library/app", digest)).digest == digest


async def test_a_blob_that_is_being_downloaded_may_be_imported(registry, program):
    content = b"wanted by both" * 100_000
    image = registry.add_image(layers=(content,))
    layout, digest = build_layout(content)
    release = asyncio.Event()
    registry.fail("/blobs/", Fault(stall_at=1000, until=release))
    async with asyncio.TaskGroup() as group:
        pulling = group.create_task(program.blob(image.layers[0]))
        while not await program.metric("pullcache_downloads_in_progress"):
            pass
        await import_bundle(program, layout.to_tar())
        release.set()
    assert pulling.result().digest == image.layers[0]
    assert (await program.manifest("library/app", "1")).digest == digest
    assert program.stored() >= {digest, image.layers[0]}


async def test_two_bundles_are_imported_at_once(program):
    shared = b"shared" * MIB
    bundles = []
    for number in (1, 2):
        layout, _ = build_layout(shared, str(number).encode(), name=f"{APP_FULL_NAME}:{number}")
        bundles.append(layout.to_tar())
    await asyncio.gather(*(import_bundle(program, bundle) for bundle in bundles))
    for tag in ("1", "2"):
        assert (await program.manifest("library/app", tag)).status == 200
    assert digest_of(shared) in program.stored()


async def test_an_import_evicts_older_content_and_nothing_of_its_own(registry, make_program):
    program = await make_program(store={"max_size": "20MB"})
    old = registry.add_image("library/old", layers=(b"o" * 8 * MIB,))
    await program.pull(old)
    await program.wait_for_downloads()
    layout, _ = build_layout(*(bytes([n]) * 5 * MIB for n in range(3)))
    await import_bundle(program, layout.to_tar())
    assert program.disk_usage() <= 20_000_000
    assert old.layers[0] not in program.stored()
    for n in range(3):
        assert (await program.blob(digest_of(bytes([n]) * 5 * MIB))).status == 200


async def test_a_delta_does_not_evict_the_blobs_of_its_base(registry, make_program, tmp_path):
    source = await make_program(tmp_path / "source")
    large = [bytes([n]) * 5 * MIB for n in range(2)]
    base = registry.add_image(tag="1", layers=large[:1], index=True)
    await pull_all_platforms(source, base)
    earlier = await export_bundle(source, "app:1")
    newer = registry.add_image(tag="2", layers=large, index=True)
    await pull_all_platforms(source, newer)
    delta = await export_bundle(source, "app:2", exclude=blob_digests(earlier))
    program = await make_program(tmp_path / "small", store={"max_size": "20MB"})
    await import_bundle(program, earlier)
    # Used more recently than the base, but the delta needs the base.
    other = registry.add_blob(b"o" * 12 * MIB)
    await program.blob(other)
    await program.wait_for_downloads()
    (image,) = (await import_bundle(program, delta))["images"]
    assert image["missing"] == []
    assert other not in program.stored()


async def test_an_image_imported_under_a_pinned_name_is_pinned(program):
    await asyncio.to_thread(
        AdminClient(program.root).post, "/api/v1/images/pin", {"images": ["app:1"]}
    )
    layout = LayoutBuilder()
    manifests = [layout.add_manifest(b"one", architecture=arch) for arch in ("amd64", "arm64")]
    layout.list_image(layout.add_index(*manifests), name=f"{APP_FULL_NAME}:1")
    await import_bundle(program, layout.to_tar())
    sizes = [(program.root / blob_path(digest)).stat().st_size for digest in program.stored()]
    pinned = await program.metric("pullcache_store_pinned_bytes")
    assert (
        pinned == await program.metric("pullcache_store_bytes") == sum(map(allocated_size, sizes))
    )


async def test_the_error_for_a_full_store_names_the_bytes_of_pinned_images(make_program):
    program = await make_program(store={"max_size": "20MB"})
    layout, _ = build_layout(b"p" * 12 * MIB, name=f"{APP_FULL_NAME}:1")
    await import_bundle(program, layout.to_tar())
    await asyncio.to_thread(
        AdminClient(program.root).post, "/api/v1/images/pin", {"images": ["app:1"]}
    )
    before = program.stored()
    layout, _ = build_layout(b"n" * 8 * MIB, name=f"{APP_FULL_NAME}:2")
    with pytest.raises(NoSpaceError, match="pinned images hold"):
        await import_bundle(program, layout.to_tar())
    assert program.stored() == before
    assert (await program.manifest("library/app", "1")).status == 200


async def test_progress_is_reported_during_an_import(program, monkeypatch):
    monkeypatch.setattr("proxy.server.admin.bundles.PROGRESS_INTERVAL", 0.01)
    layout, _ = build_layout(b"x" * 4 * MIB)
    bundle = layout.to_tar()

    progress_received = threading.Event()

    def chunks() -> Iterator[bytes]:
        yield bundle[:MIB]
        assert progress_received.wait(10)
        yield bundle[MIB:]

    def work() -> list[dict[str, int]]:
        events = AdminClient(program.root).stream("POST", "/api/v1/import", upload=chunks())
        first = next(events)
        progress_received.set()
        return [first, *events]

    first, *_, last = await asyncio.to_thread(work)
    assert 0 < first["done"] <= MIB
    assert last["added"] == 3


async def test_a_shutdown_during_an_import_leaves_complete_blobs_only(program):
    layout, digest = build_layout(b"x" * MIB, os.urandom(4 * MIB))
    bundle = layout.to_tar()
    release = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield bundle[: 3 * MIB]
        await release.wait()
        yield bundle[3 * MIB :]

    async def send() -> None:
        connector = aiohttp.UnixConnector(f"{program.root}/admin.sock")
        async with aiohttp.ClientSession(connector=connector) as session:
            with pytest.raises(aiohttp.ClientError):
                async with session.post("http://localhost/api/v1/import", data=slow()) as answer:
                    await answer.read()

    async with asyncio.TaskGroup() as group:
        group.create_task(send())
        while await program.metric("pullcache_store_blobs") < 2:
            pass
        await program.stop()
        release.set()
    assert list((program.root / "ingest").iterdir()) == []
    assert digest_of(b"x" * MIB) in program.stored()
    await program.start()
    assert (await import_bundle(program, bundle))["already_stored"] >= 1
    assert (await program.manifest("library/app", "1")).digest == digest
