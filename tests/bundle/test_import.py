"""Bundles come into the store: whole images or nothing of them, in any order, as often as it takes."""

import asyncio
import gzip
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from backports import zstd

from proxy.cli.api_client import AdminClient
from proxy.errors import BusyError, NoSpaceError
from proxy.storage.blobs import allocated_size
from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.support.bundles import (
    APP,
    LAYERS,
    Layout,
    blobs,
    export,
    files,
    layout,
    path,
    pull,
    take,
    tar,
)

MIB = 1 << 20


@pytest.fixture
async def island(make_program, tmp_path):
    """A program that may ask nobody, with an empty store."""
    return await make_program(tmp_path / "island", offline=True)


async def test_an_imported_image_is_pulled_without_any_upstream(registry, program, island):
    image = registry.add_image(layers=LAYERS, index=True)
    await pull(program, image)
    bundle = await export(program, "app")
    asked = len(registry.requests)
    report = await take(island, bundle)
    (imported,) = report["images"]
    assert imported == {"name": "app:latest", "digest": image.digest, "missing": [], "reason": ""}
    assert report["added"] == len(blobs(bundle))
    await island.pull(image)
    for digest in image.manifests.values():
        assert (await island.manifest(image, digest)).digest == digest
    assert len(registry.requests) == asked
    # And what was imported can be exported again.
    assert await export(island, "app") == bundle


async def test_an_imported_tag_is_asked_for_again_after_its_ttl(registry, make_program, tmp_path):
    image = registry.add_image()
    program = await make_program(tmp_path / "online")
    made, _ = layout(name=f"{APP}:latest")
    await take(program, made.tar())
    assert (await program.manifest("library/app")).digest != image.digest
    assert not registry.requests
    program.clock.turn(3600)
    assert (await program.manifest("library/app")).digest == image.digest


async def test_a_tag_that_was_not_there_a_moment_ago_is_there_once_imported(program):
    assert (await program.manifest("library/app", "1")).status == 404
    made, digest = layout()
    await take(program, made.tar())
    assert (await program.manifest("library/app", "1")).digest == digest


async def test_what_is_imported_is_shown_under_its_repository_only(registry, program):
    made, _ = layout(b"secret")
    await take(program, made.tar())
    layer = digest_of(b"secret")
    assert (await program.blob(layer)).status == 200
    assert (await program.blob(layer, "library/other")).status == 404


async def test_a_delta_completes_what_is_here(registry, program, island):
    base = registry.add_image(tag="1", layers=LAYERS)
    await pull(program, base)
    earlier = await export(program, "app:1")
    newer = registry.add_image(tag="2", layers=(*LAYERS, b"third"))
    await pull(program, newer)
    delta = await export(program, "app:1", "app:2", exclude=blobs(earlier))
    before = island.stored()
    report = await take(island, delta)
    first, second = report["images"]
    assert first["missing"] == [base.digest]
    assert second["missing"] == list(base.layers)
    assert (island.stored(), report["added"]) == (before, 0)
    await take(island, earlier)
    report = await take(island, delta)
    assert [one["missing"] for one in report["images"]] == [[], []]
    await island.pull(base)
    await island.pull(newer)


async def test_a_delta_says_which_platform_it_takes_to_be_here(registry, program, island):
    both = registry.add_image(index=True)
    await pull(program, both)
    # Only arm64 has changed since, and an earlier bundle has the rest.
    whole = await export(program, "app")
    kept = {digest for digest in blobs(whole) if digest != both.manifests["linux/arm64"]}
    delta = await export(program, "app", exclude=kept - {both.digest})
    (image,) = (await take(island, delta))["images"]
    assert both.manifests["linux/amd64"] in image["missing"]


async def test_a_sparse_index_is_whole_if_what_it_brings_is(program):
    made = Layout()
    there, absent = (made.add_manifest(b"one", architecture=arch) for arch in ("amd64", "arm64"))
    del made.files[f"blobs/sha256/{absent['digest'][7:]}"]
    digest = made.list(made.add_index(there, absent), name=f"{APP}:1")
    (image,) = (await take(program, made.tar()))["images"]
    assert image["missing"] == []
    assert (await program.manifest("library/app", "1")).digest == digest


async def test_a_platform_that_is_there_in_part_makes_the_image_incomplete(program):
    made = Layout()
    first = made.add_manifest(b"one", architecture="amd64")
    second = made.add_manifest(b"two", architecture="arm64")
    made.list(made.add_index(first, second), name=f"{APP}:1")
    lost = digest_of(b"two")
    del made.files[f"blobs/sha256/{lost[7:]}"]
    report = await take(program, made.tar())
    assert report["images"][0]["missing"] == [lost]
    assert program.stored() == set()
    assert (await program.manifest("library/app", "1")).status == 404


async def test_one_image_that_is_not_whole_keeps_no_other_back(program):
    made = Layout()
    made.list(made.add_manifest(b"one"), name=f"{APP}:1")
    made.list(made.add_manifest(b"two", b"three"), name=f"{APP}:2")
    del made.files[f"blobs/sha256/{digest_of(b'three')[7:]}"]
    report = await take(program, made.tar())
    assert [one["missing"] for one in report["images"]] == [[], [digest_of(b"three")]]
    # What only the other one needed is gone again.
    assert digest_of(b"one") in program.stored()
    assert digest_of(b"two") not in program.stored()
    assert (await program.manifest("library/app", "1")).status == 200
    assert (await program.manifest("library/app", "2")).status == 404


async def test_what_is_here_already_is_read_over(program):
    made, _ = layout(b"x" * MIB)
    first = await take(program, made.tar())
    again = await take(program, made.tar())
    assert (first["added"], first["already_stored"]) == (3, 0)
    assert (again["added"], again["added_bytes"], again["already_stored"]) == (0, 0, 3)


async def test_an_upload_that_breaks_off_is_gone_on_with(program):
    made, digest = layout(b"x" * MIB, b"y" * MIB)
    bundle = made.tar()

    async def broken() -> AsyncIterator[bytes]:
        yield bundle[: MIB + 200_000]
        while await program.metric("pullcache_store_blobs") < 2:
            pass
        raise ConnectionResetError

    url = "http://localhost/api/v1/import"
    connector = aiohttp.UnixConnector(str(program.root / "admin.sock"))
    async with aiohttp.ClientSession(connector=connector) as session:
        with pytest.raises(aiohttp.ClientError):
            await session.post(url, data=broken())
    async with asyncio.timeout(10):
        while list((program.root / "ingest").iterdir()):
            await program.metric("pullcache_store_blobs")
    assert digest_of(b"x" * MIB) in program.stored()
    assert len(program.stored()) == 2
    assert (await program.manifest("library/app", "1")).status == 404
    report = await take(program, bundle)
    assert (report["already_stored"], report["added"]) == (2, 2)
    assert (await program.manifest("library/app", "1")).digest == digest


@pytest.mark.parametrize("pack", [zstd.compress, gzip.compress], ids=["zstd", "gzip"])
async def test_a_compressed_bundle_is_recognised(program, pack):
    made, digest = layout(bytes(3 * MIB), b"end")
    bundle = made.tar()
    # In two streams, as parallel compressors write.
    await take(program, pack(bundle[:1000]) + pack(bundle[1000:]))
    assert (await program.manifest("library/app", "1")).digest == digest


async def test_a_tar_of_the_current_directory_is_a_bundle(program):
    made, digest = layout()
    content = files(made.tar())
    await take(program, tar({f"./{name}": data for name, data in content.items()}))
    assert (await program.manifest("library/app", "1")).digest == digest


@pytest.mark.parametrize(
    ("annotations", "given"),
    [
        ({"name": f"{APP}:1", "ref": "other"}, None),
        ({"name": "index.docker.io/library/app:1"}, None),
        ({"name": "app:1"}, None),
        ({"ref": f"{APP}:1"}, None),
        ({"ref": "1"}, "app"),
        ({}, "docker.io/library/app:1"),
    ],
)
async def test_an_image_is_called_what_the_clearest_annotation_says(program, annotations, given):
    made = Layout()
    digest = made.list(made.add_manifest(b"layer"), **annotations)
    report = await take(program, made.tar(), name=given)
    assert report["images"][0]["name"] == "app:1"
    assert (await program.manifest("library/app", "1")).digest == digest


async def test_docker_says_what_an_image_is_called_that_nobody_else_names(program):
    made = Layout()
    described = made.add_manifest(b"layer")
    digest = made.list(described, ref="1")
    config = json.loads(made.files[f"blobs/sha256/{digest[7:]}"])["config"]["digest"]
    docker = [{"Config": f"blobs/sha256/{config[7:]}", "RepoTags": ["app:7"], "Layers": []}]
    made.files["manifest.json"] = json.dumps(docker).encode()
    await take(program, made.tar())
    assert (await program.manifest("library/app", "7")).digest == digest


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "--name"),
        ("quay.io/some/thing:1", "quay.io"),
        ("docker.io/NOT/A NAME", "repository name"),
        (f"{APP}@sha256:{'0' * 64}", "under this name"),
        ("docker.io/library/forbidden:1", "does not allow"),
    ],
)
async def test_an_image_that_has_no_place_here_is_refused_with_the_reason(
    make_program, registry, name, says
):
    rules = {"docker.io": {"url": registry.url, "deny": ["library/forbidden"]}}
    program = await make_program(upstreams=rules)
    made, _ = layout(name=name)
    report = await take(program, made.tar())
    assert says in report["images"][0]["reason"]
    assert program.stored() == set()


async def test_an_image_by_digest_is_pulled_by_digest(program):
    made = Layout()
    described = made.add_manifest(b"layer")
    digest = made.list(described, name=f"{APP}@{described['digest']}")
    await take(program, made.tar())
    assert (await program.manifest("library/app", digest)).digest == digest


async def test_a_blob_that_is_being_downloaded_may_be_imported(registry, program):
    content = b"wanted by both" * 100_000
    image = registry.add_image(layers=(content,))
    made, digest = layout(content)
    release = asyncio.Event()
    registry.fail("/blobs/", Fault(stall_at=1000, until=release))
    async with asyncio.TaskGroup() as group:
        pulling = group.create_task(program.blob(image.layers[0]))
        while not await program.metric("pullcache_downloads_in_progress"):
            pass
        await take(program, made.tar())
        release.set()
    assert pulling.result().digest == image.layers[0]
    assert (await program.manifest("library/app", "1")).digest == digest
    assert program.stored() >= {digest, image.layers[0]}


async def test_two_bundles_may_come_at_once(program):
    shared = b"shared" * MIB
    bundles = []
    for number in (1, 2):
        made, _ = layout(shared, str(number).encode(), name=f"{APP}:{number}")
        bundles.append(made.tar())
    await asyncio.gather(*(take(program, bundle) for bundle in bundles))
    for tag in ("1", "2"):
        assert (await program.manifest("library/app", tag)).status == 200
    assert digest_of(shared) in program.stored()


async def test_a_bundle_evicts_what_is_old_and_nothing_of_its_own(registry, make_program):
    program = await make_program(store={"max_size": "20MB"})
    old = registry.add_image("library/old", layers=(b"o" * 8 * MIB,))
    await program.pull(old)
    await program.settled()
    made, _ = layout(*(bytes([n]) * 5 * MIB for n in range(3)))
    await take(program, made.tar())
    assert program.on_disk() <= 20_000_000
    assert old.layers[0] not in program.stored()
    for n in range(3):
        assert (await program.blob(digest_of(bytes([n]) * 5 * MIB))).status == 200


async def test_a_delta_evicts_nothing_that_it_rests_on(registry, make_program, tmp_path):
    source = await make_program(tmp_path / "source")
    large = [bytes([n]) * 5 * MIB for n in range(2)]
    base = registry.add_image(tag="1", layers=large[:1], index=True)
    await pull(source, base)
    earlier = await export(source, "app:1")
    newer = registry.add_image(tag="2", layers=large, index=True)
    await pull(source, newer)
    delta = await export(source, "app:2", exclude=blobs(earlier))
    program = await make_program(tmp_path / "small", store={"max_size": "20MB"})
    await take(program, earlier)
    # What is used after the base goes before it, since the delta needs that.
    other = registry.add_blob(b"o" * 12 * MIB)
    await program.blob(other)
    await program.settled()
    (image,) = (await take(program, delta))["images"]
    assert image["missing"] == []
    assert other not in program.stored()


async def test_what_is_imported_under_a_pinned_name_is_pinned(program):
    await asyncio.to_thread(
        AdminClient(program.root).post, "/api/v1/images/pin", {"images": ["app:1"]}
    )
    made = Layout()
    both = [made.add_manifest(b"one", architecture=arch) for arch in ("amd64", "arm64")]
    made.list(made.add_index(*both), name=f"{APP}:1")
    await take(program, made.tar())
    sizes = [(program.root / path(digest)).stat().st_size for digest in program.stored()]
    pinned = await program.metric("pullcache_store_pinned_bytes")
    assert (
        pinned == await program.metric("pullcache_store_bytes") == sum(map(allocated_size, sizes))
    )


async def test_a_store_that_pins_fill_says_that_it_is_the_pins(make_program):
    program = await make_program(store={"max_size": "20MB"})
    made, _ = layout(b"p" * 12 * MIB, name=f"{APP}:1")
    await take(program, made.tar())
    await asyncio.to_thread(
        AdminClient(program.root).post, "/api/v1/images/pin", {"images": ["app:1"]}
    )
    before = program.stored()
    made, _ = layout(b"n" * 8 * MIB, name=f"{APP}:2")
    with pytest.raises(NoSpaceError, match="pinned images hold"):
        await take(program, made.tar())
    assert program.stored() == before
    assert (await program.manifest("library/app", "1")).status == 200


async def test_an_image_that_is_being_exported_is_not_removed(registry, program):
    image = registry.add_image(layers=(b"x" * 3 * MIB,))
    await pull(program, image)
    api, bundle = AdminClient(program.root), io.BytesIO()
    refused: list[str] = []

    class Target(io.BytesIO):
        def write(self, data: Any) -> int:
            if not refused:
                with pytest.raises(BusyError, match="exported") as error:
                    api.post("/api/v1/images/remove", {"images": ["app"]})
                refused.append(str(error.value))
            return bundle.write(data)

    await asyncio.to_thread(api.post_to_file, "/api/v1/export", {"images": ["app"]}, Target())
    assert blobs(bundle.getvalue()) == program.stored()
    assert refused
    await asyncio.to_thread(api.post, "/api/v1/images/remove", {"images": ["app"]})
    assert program.stored() == set()


async def test_progress_is_told_while_a_bundle_comes(program, monkeypatch):
    monkeypatch.setattr("proxy.server.admin.bundles.PROGRESS_INTERVAL", 0.01)
    made, _ = layout(b"x" * 4 * MIB)
    bundle = made.tar()

    heard = threading.Event()

    def pieces() -> Iterator[bytes]:
        yield bundle[:MIB]
        assert heard.wait(10)
        yield bundle[MIB:]

    def work() -> list[dict[str, int]]:
        events = AdminClient(program.root).stream("POST", "/api/v1/import", upload=pieces())
        first = next(events)
        heard.set()
        return [first, *events]

    first, *_, last = await asyncio.to_thread(work)
    assert 0 < first["done"] <= MIB
    assert last["added"] == 3
