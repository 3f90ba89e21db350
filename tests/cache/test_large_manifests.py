"""Manifests that name very many blobs are served like others, and take no room in the index."""

import json
import random
import sqlite3
from contextlib import closing

import pytest

from proxy.storage.index_writes import MAX_CHILDREN
from tests.fakes.content import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    FakeContent,
    descriptor,
    digest_of,
)
from tests.support.bundles import blob_path, build_layout, import_bundle
from tests.support.preload_api import run_preload

BYPASS = "pullcache; fwd=miss"
CONFIG = b'{"os":"linux","architecture":"amd64"}'


def push_large(content: FakeContent, layers: int, *, tag: str = "latest") -> str:
    """Push a manifest of that many layers, the first of which the registry has; return its digest."""
    blobs = [str(number).encode() for number in range(layers)]
    content.add_blob(CONFIG)
    content.add_blob(blobs[0])
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(CONFIG, OCI_CONFIG),
        "layers": [descriptor(blob, OCI_LAYER) for blob in blobs],
    }
    return content.add_manifest("library/app", tag, json.dumps(document).encode(), OCI_MANIFEST)


def edges(program) -> int:
    with closing(sqlite3.connect(program.root / "index.sqlite")) as connection:
        return int(connection.execute("SELECT count(*) FROM edges").fetchone()[0])


@pytest.mark.parametrize("reference", ["latest", "digest"])
async def test_a_manifest_of_too_many_layers_is_served_and_not_stored(registry, program, reference):
    digest = push_large(registry, MAX_CHILDREN)  # and a config
    for _ in range(2):
        answer = await program.manifest(
            "library/app", digest if reference == "digest" else reference
        )
        assert (answer.status, answer.digest) == (200, digest)
    first = await program.manifest("library/app", digest)
    assert first.headers["Cache-Status"] == BYPASS
    assert program.stored() == set()
    assert edges(program) == 0
    assert await program.metric("pullcache_uncached_total", reason="too_large") > 0


async def test_the_blobs_of_such_a_manifest_are_cached(registry, program):
    push_large(registry, MAX_CHILDREN)
    await program.manifest("library/app")
    layer = digest_of(b"0")
    for _ in range(2):
        assert (await program.blob(layer)).digest == layer
    await program.wait_for_downloads()
    assert registry.count(registry.body_of(layer)) == 1
    assert program.stored() == {layer}


async def test_a_manifest_at_the_bound_is_stored(registry, program):
    digest = push_large(registry, MAX_CHILDREN - 1)
    answer = await program.manifest("library/app")
    assert answer.headers["Cache-Status"] == "pullcache; fwd=miss; stored"
    assert program.stored() == {digest}
    assert edges(program) == MAX_CHILDREN


async def test_an_index_of_too_many_manifests_is_served_and_not_stored(registry, program):
    entries = [descriptor(str(number).encode(), OCI_MANIFEST) for number in range(MAX_CHILDREN + 1)]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    content = json.dumps(document).encode()
    digest = registry.add_manifest("library/app", "latest", content, OCI_INDEX)
    answer = await program.manifest("library/app")
    assert (answer.digest, answer.headers["Cache-Status"]) == (digest, BYPASS)
    assert program.stored() == set()


async def test_a_preload_says_that_such_an_image_cannot_be_stored(registry, program):
    push_large(registry, MAX_CHILDREN)
    run = await run_preload(program, "app")
    (failed,) = run.events_of("failed")
    assert f"names {MAX_CHILDREN + 1} blobs" in failed["reason"]


async def test_an_import_rejects_such_an_image(program):
    layout, digest = build_layout(*(b"%d" % number for number in range(MAX_CHILDREN)))
    # It is rejected by its manifest, with its blobs or without.
    for layer in json.loads(layout.files[blob_path(digest)])["layers"]:
        del layout.files[blob_path(layer["digest"])]
    report = await import_bundle(program, layout.to_tar())
    assert f"names {MAX_CHILDREN + 1} blobs" in report["images"][0]["reason"]
    assert program.stored() == set()


async def test_a_manifest_that_the_full_store_cannot_take_is_not_called_stored(
    registry, make_program
):
    program = await make_program(store={"max_size": "800KB"})
    digest = registry.add_image(layers=[b"x"] * 1500).digest
    assert len(registry.repository("library/app").manifests[digest].content) > 290_000
    answer = await program.manifest("library/app")
    assert (answer.digest, answer.headers["Cache-Status"]) == (digest, BYPASS)
    assert program.stored() == set()


async def test_manifests_at_the_bound_leave_room_for_layers_after_all(registry, make_program):
    program = await make_program(store={"max_size": "24MB"})
    registry.pull_limit = None
    kept = registry.add_blob(bytes(8 << 20))
    await program.blob(kept)
    for number in range(12):
        layers = [b"%d %d" % (number, layer) for layer in range(MAX_CHILDREN - 1)]
        entries = [descriptor(layer, OCI_LAYER) for layer in layers]
        config = descriptor(CONFIG, OCI_CONFIG)
        document = {"mediaType": OCI_MANIFEST, "config": config, "layers": entries}
        name = f"team/app{number}"
        registry.add_manifest(name, "latest", json.dumps(document).encode(), OCI_MANIFEST)
        assert (await program.manifest(name)).status == 200
    assert kept in program.stored()
    assert program.disk_usage() < 24_000_000
    for _ in range(2):
        layer = registry.add_blob(random.randbytes(10 << 20))
        answer = await program.blob(layer)
        assert answer.headers["Cache-Status"] == "pullcache; fwd=miss; stored"
        await program.wait_for_downloads()
        assert layer in program.stored()
        await program.restart()
