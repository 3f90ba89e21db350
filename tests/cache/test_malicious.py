"""Malicious content (faults, table M) is bounded, refused, or passed on unchanged.

`tests/oci/test_manifest.py` tests the parser alone; these tests run the whole program.
"""

import gzip
import json
import threading
from collections.abc import Iterable
from typing import Any

import pytest

from proxy.oci import manifest as oci
from proxy.oci.manifest import MAX_MANIFEST_SIZE
from proxy.upstream import client
from tests.fakes.content import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    FakeManifest,
    descriptor,
    digest_of,
)
from tests.fakes.faults import Fault
from tests.fakes.raw_server import RawUpstream, RecvUntil
from tests.support.program import Program

APP = "library/app"
MIB = 1 << 20
EMPTY = descriptor(b"{}", OCI_CONFIG)


def image(**changes: Any) -> bytes:
    """Return an image manifest with these fields changed."""
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": EMPTY, "layers": []}
    return json.dumps(document | changes).encode()


def index(children: list[dict[str, Any]]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": children}).encode()


def padded(content: bytes, size: int) -> bytes:
    return content + b" " * (size - len(content))


def tag_of(digest: str) -> str:
    return digest[7:19]


def push(program: Program, content: bytes, media_type: str = OCI_MANIFEST) -> str:
    """Push `content` to upstream as a manifest, valid or not."""
    digest = digest_of(content)
    repository = program.registry.repository(APP)
    repository.manifests[digest] = FakeManifest(content, media_type)
    repository.tags[tag_of(digest)] = digest
    return digest


async def assert_refused(
    program: Program, content: bytes, reason: str = "", media_type: str = OCI_MANIFEST
) -> None:
    """Check that a manifest is refused by tag and by digest, and not stored."""
    digest = push(program, content, media_type)
    before = program.stored()
    for reference in (tag_of(digest), digest):
        answer = await program.manifest(APP, reference)
        assert (answer.status, answer.code) == (502, "UNKNOWN")
        assert reason in answer.json["errors"][0]["message"]
    assert program.stored() == before
    assert await program.metric("pullcache_requests_total", kind="manifest", status="502") >= 2


async def assert_unchanged(program: Program, content: bytes, media_type: str = OCI_MANIFEST) -> str:
    """Check that a manifest is served unchanged, also from the store; return its digest."""
    digest = push(program, content, media_type)
    await assert_served(program, digest, (tag_of(digest), digest, digest), media_type)
    return digest


async def assert_served(
    program: Program, digest: str, references: Iterable[str], media_type: str = OCI_MANIFEST
) -> None:
    """Check that upstream's bytes are served under each reference, and stored."""
    for reference in references:
        answer = await program.manifest(APP, reference, Accept=f"{OCI_MANIFEST}, {OCI_INDEX}")
        assert (answer.status, answer.digest) == (200, digest)
        assert answer.headers["Content-Type"] == media_type
    assert digest in program.stored()


@pytest.mark.parametrize("send_length", [True, False])
async def test_m01_a_manifest_is_read_up_to_4_mib_whatever_its_content_length(program, send_length):
    program.registry.front.send_length = send_length
    await assert_unchanged(program, padded(image(), MAX_MANIFEST_SIZE))
    await assert_refused(
        program, padded(image(), MAX_MANIFEST_SIZE + 1), "more than the allowed 4194304 bytes"
    )
    await assert_refused(program, bytes(100 * MIB), "more than the allowed 4194304 bytes")
    await program.registry.until(lambda: all(seen.done for seen in program.registry.requests))
    # What upstream sent beyond the bound is in the kernel's buffers, not in ours.
    sent = program.registry.seen(f"GET .*{digest_of(bytes(100 * MIB))}")[-1].bytes_sent
    assert sent < 40 * MIB


BOMBS = {
    "deep objects": b'{"a":' * 800_000,
    "deep arrays": b"[" * 4_000_000,
    "many keys": image()[:-1] + b"".join(b',"%x":0' % n for n in range(350_000)) + b"}",
    "many objects": image()[:-1] + b',"x":[' + b'{"a":0},' * 500_000 + b"0]}",
    "many layers": image(layers=[descriptor(b"x", OCI_LAYER)] * 24_000),
    "many children": index([descriptor(b"x", OCI_MANIFEST)] * 24_000),
}


@pytest.mark.parametrize("name", BOMBS)
async def test_m02_a_json_bomb_is_parsed_in_a_thread_and_causes_no_internal_error(
    program, monkeypatch, name
):
    parsed_in: set[str] = set()
    parse = oci.parse_manifest

    def parse_and_record(content: bytes, content_type: str) -> oci.Manifest:
        parsed_in.add(threading.current_thread().name)
        return parse(content, content_type)

    monkeypatch.setattr(oci, "parse_manifest", parse_and_record)
    if name.startswith("deep"):
        digest = push(program, BOMBS[name])
        answer = await program.manifest(APP, tag_of(digest))
        assert (answer.status, answer.code) == (502, "UNKNOWN")
        assert "not a manifest" in answer.json["errors"][0]["message"]
        await assert_served(program, digest, (digest, digest))
    else:
        kind = OCI_INDEX if name == "many children" else OCI_MANIFEST
        digest = await assert_unchanged(program, BOMBS[name], kind)
        # For a client that accepts no index it is parsed again, to select a platform.
        await program.manifest(APP, tag_of(digest), Accept="text/plain")
    assert parsed_in
    assert threading.main_thread().name not in parsed_in


UNREADABLE = {
    "byte order mark": b"\xef\xbb\xbf" + image(),
    "NaN": image()[:-1] + b',"x":NaN}',
    "HTML": b"<!doctype html>",
    "nothing": b"",
    "binary": gzip.compress(b"layer"),
}
ODD = {
    "duplicate": image()[:-1] + b',"layers":[]}',
    "another list": image()[:-1] + b',"layers":[%s]}' % json.dumps(EMPTY).encode(),
    "unknown in other case": image()[:-1] + b',"x":1,"X":2}',
    "lone surrogate": image()[:-1] + b',"x":"\\ud800"}',
    "trailing data": image() + b"{}",
    "not UTF-8": image()[:-1] + b',"x":"\xff"}',
}


@pytest.mark.parametrize("name", UNREADABLE)
async def test_m03_bytes_that_no_client_can_read_are_served_by_digest_only(program, name):
    content = UNREADABLE[name]
    digest = push(program, content)
    answer = await program.manifest(APP, tag_of(digest))
    assert (answer.status, answer.code) == (502, "UNKNOWN")
    assert "not a manifest" in answer.json["errors"][0]["message"]
    assert program.stored() == set()
    await assert_served(program, digest, (digest, digest))


@pytest.mark.parametrize("name", ODD)
async def test_m03_a_document_that_clients_read_is_served(program, name):
    await assert_unchanged(program, ODD[name])


async def test_m04_a_document_of_two_kinds_is_refused(program):
    layer = descriptor(b"x", OCI_LAYER)
    both = image(manifests=[descriptor(b"{}", OCI_MANIFEST)], layers=[layer])
    two_types = image()[:-1] + b',"MediaType":"%s"}' % OCI_INDEX.encode()
    for content, header in (
        (both, OCI_MANIFEST),
        (both.replace(OCI_MANIFEST.encode(), OCI_INDEX.encode(), 1), OCI_INDEX),
        (image(mediaType=OCI_INDEX), OCI_MANIFEST),
        (image(), OCI_INDEX),
        (two_types, OCI_MANIFEST),
    ):
        await assert_refused(program, content, "both an image index and a manifest", header)


@pytest.mark.parametrize("size", [-1, 2**70, 1.5, "1", None])
async def test_m05_an_invalid_size_counts_as_none(program, size):
    layer = b"layer" * 1000
    await assert_unchanged(program, image(layers=[{**descriptor(layer, OCI_LAYER), "size": size}]))
    digest = program.registry.add_blob(layer)
    for _ in range(2):
        assert (await program.blob(digest, method="HEAD")).headers["Content-Length"] == "5000"
        answer = await program.blob(digest)
        assert (answer.status, answer.is_whole, answer.body) == (200, True, layer)
        await program.wait_for_downloads()


@pytest.mark.parametrize("size", [0, 5, 10_000_000_000])
async def test_m05_a_wrong_size_in_the_manifest_does_not_change_the_blob(program, size):
    layer = b"layer" * 1000
    wrong = {**descriptor(layer, OCI_LAYER), "size": size}
    await assert_unchanged(program, image(layers=[wrong]))
    digest = program.registry.add_blob(layer)
    answer = await program.blob(digest)
    assert (answer.status, answer.is_whole, answer.body) == (200, True, layer)
    await program.wait_for_downloads()
    assert (await program.blob(digest, method="HEAD")).headers["Content-Length"] == "5000"


async def test_m06_an_index_of_any_width_and_depth_costs_only_the_requested_manifests(program):
    registry = program.registry
    registry.pull_limit = None
    wide = [descriptor(b"%d" % n, OCI_MANIFEST) for n in range(2000)]
    await assert_unchanged(program, index(wide), OCI_INDEX)
    chain = [image()]
    for _ in range(100):
        chain.append(index([descriptor(chain[-1], OCI_INDEX)] * 2))
    before = len(registry.requests)
    for content in reversed(chain):
        kind = OCI_MANIFEST if content is chain[0] else OCI_INDEX
        registry.add_manifest(APP, "deep", content, kind)
        answer = await program.manifest(APP, digest_of(content))
        assert (answer.status, answer.digest) == (200, digest_of(content))
    assert len(registry.requests) - before == len(chain)


async def test_m07_the_urls_of_a_foreign_layer_are_passed_on_but_never_followed(
    registry, make_program
):
    login = {"username": "bob", "password": "CANARY"}
    registry.tokens.users["bob"] = "CANARY"
    async with RawUpstream([RecvUntil()]) as elsewhere:
        program = await make_program(upstreams={"docker.io": {"url": registry.url, **login}})
        layer = {**descriptor(b"foreign", OCI_LAYER), "urls": [f"{elsewhere.url}/layer"]}
        registry.add_blob(b"{}")
        await assert_unchanged(program, image(layers=[layer]))
        for method in ("GET", "HEAD"):
            answer = await program.blob(digest_of(b"foreign"), method=method)
            assert answer.status == 404
        assert elsewhere.connections == 0


@pytest.mark.parametrize(
    "digest",
    [
        "sha256:../../../index.sqlite",
        "../../blobs/sha256/x",
        "sha256:" + "A" * 64,
        "sha256:" + "a" * 63,
        "sha512:" + "a" * 64,
        "sha256:" + "a" * 64 + "\x00",
        "",
    ],
)
async def test_m08_an_invalid_digest_never_becomes_a_path(program, digest):
    files = {path for path in program.root.rglob("*") if path.is_file()}
    bad = {**descriptor(b"x", OCI_LAYER), "digest": digest}
    stored = {
        program.root / "blobs/sha256" / (await assert_unchanged(program, content))[7:]
        for content in (image(layers=[bad]), image(subject=bad))
    }
    assert {path for path in program.root.rglob("*") if path.is_file()} == files | stored


async def test_m08_a_digest_of_an_unknown_algorithm_is_passed_on_but_never_cached(program):
    unknown = {**descriptor(b"x", OCI_LAYER), "digest": "blake3:" + "a" * 64}
    digest = await assert_unchanged(program, image(layers=[unknown]))
    answer = await program.blob("blake3:" + "a" * 64)
    assert (answer.status, answer.code) == (400, "DIGEST_INVALID")
    assert program.stored() == {digest}


async def test_m09_markup_in_annotations_and_data_is_not_interpreted(program):
    script = "<script>alert(1)</script>"
    annotations = {script: script * 50_000}
    with_data = {**EMPTY, "data": "e30=" * 400_000}
    subject = descriptor(b"{}", OCI_MANIFEST)
    await assert_unchanged(
        program, image(annotations=annotations, config=with_data, subject=subject)
    )
    async with program.registry.down():
        # The descriptor is made from the stored manifest.
        answer = await program.ask(f"/v2/{APP}/referrers/{subject['digest']}")
        (described,) = answer.json["manifests"]
        assert described["annotations"] == annotations
        assert answer.headers["Content-Type"].startswith(OCI_INDEX)


def serve_endless_list(program: Program, path: str, page: bytes, *, loop: int) -> None:
    """Let upstream answer each page of a list with a link to the next, in a loop of so many pages."""
    program.registry.repository(APP)
    for number in [*range(loop), -1]:
        link = f'</v2/{APP}/{path}?last={(number + 1) % loop}>; rel="next"'
        fault = Fault(status=200, body=page, headers={"Link": link, "Content-Type": OCI_INDEX})
        query = rf"\?last={number}$" if number >= 0 else ""
        program.registry.fail(f"{path}{query}", fault, times=None)


@pytest.fixture(autouse=True)
def _few_pages(monkeypatch):
    monkeypatch.setattr(client, "MAX_PAGES", 20)


ENDLESS = [
    (100, 30, 20, "a list of more than 20 pages"),
    (MIB, 30, 9, "a list of more than 8388608 bytes"),
    (100, 1, 2, "whose pages do not lead to an end"),
    (100, 5, 6, "whose pages do not lead to an end"),
]


@pytest.mark.parametrize(("size", "loop", "pages", "reason"), ENDLESS)
async def test_m11_an_endless_referrers_list_is_an_error_after_some_pages_or_bytes(
    program, size, loop, pages, reason
):
    path = f"referrers/{digest_of(b'x')}"
    serve_endless_list(program, path, padded(b'{"manifests":[]}', size), loop=loop)
    answer = await program.ask(f"/v2/{APP}/{path}")
    assert (answer.status, answer.code) == (502, "UNKNOWN")
    assert reason in answer.json["errors"][0]["message"]
    assert program.registry.count("/referrers/") <= pages


async def test_m11_thirty_thousand_referrers_are_listed_and_a_hundred_thousand_refused(program):
    one = descriptor(b"x", OCI_MANIFEST)
    for count, status in ((30_000, 200), (100_000, 502)):
        path = f"referrers/{digest_of(b'%d' % count)}"
        program.registry.fail(path, Fault(status=200, body=index([one] * count)), times=None)
        answer = await program.ask(f"/v2/{APP}/{path}")
        assert answer.status == status
        if status == 200:
            assert len(answer.json["manifests"]) == count


async def test_m11_a_link_to_another_host_is_followed_at_the_registry_instead(program):
    path = f"referrers/{digest_of(b'x')}"
    async with RawUpstream([RecvUntil()]) as elsewhere:
        link = {"Link": f'<{elsewhere.url}/v2/{APP}/{path}?page=2>; rel="next"'}
        program.registry.add_image()
        await program.manifest(APP)  # gets a token
        program.registry.fail(path, Fault(headers=link))
        assert (await program.ask(f"/v2/{APP}/{path}")).json["manifests"] == []
        assert elsewhere.connections == 0
        assert program.registry.count(f"{path}.page=2") == 1


@pytest.mark.parametrize(("size", "loop", "pages", "reason"), ENDLESS)
async def test_m12_an_endless_tags_list_is_an_error_after_some_pages_or_bytes(
    program, size, loop, pages, reason
):
    serve_endless_list(program, "tags/list", padded(b'{"tags":["x"]}', size), loop=loop)
    answer = await program.ask(f"/v2/{APP}/tags/list")
    assert (answer.status, answer.code) == (502, "UNKNOWN")
    assert reason in answer.json["errors"][0]["message"]
    assert program.registry.count("tags/list") <= pages


async def test_m13_a_huge_config_is_served_like_any_other_blob(registry, make_program):
    program = await make_program(store={"max_size": "20MB"})
    bomb = b'{"a":' * 6_000_000
    config = registry.add_blob(bomb)
    manifest = await assert_unchanged(program, image(config=descriptor(bomb, OCI_CONFIG)))
    answer = await program.blob(config)
    assert (answer.status, answer.digest, answer.is_whole) == (200, config, True)
    await program.wait_for_downloads()
    assert program.stored() == {manifest}


@pytest.mark.parametrize("encoding", [None, "gzip"])
async def test_m14_a_layer_is_never_decompressed(registry, make_program, encoding):
    program = await make_program(store={"max_size": "20MB"})
    bomb = gzip.compress(bytes(100 * MIB), 9)
    digest = registry.add_blob(bomb)
    registry.fail(registry.body_of(digest), Fault(headers={"Content-Encoding": encoding}))
    for _ in range(2):
        answer = await program.blob(digest, Accept_Encoding="gzip")
        assert (answer.status, answer.body) == (200, bomb)
        assert "Content-Encoding" not in answer.headers
        await program.wait_for_downloads()
    assert program.stored() == {digest}
    assert await program.metric("pullcache_upstream_bytes_total") < 2 * len(bomb)
