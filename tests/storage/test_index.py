"""The index: single rows, durable changes, and the order of uses."""

import asyncio
import sqlite3
from itertools import count

import pytest

from proxy.errors import StorageError
from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest, parse_manifest
from proxy.oci.reference import Repository, Tag
from proxy.storage.index import BlobRow, Index, TagRow
from proxy.storage.list_queries import list_tags
from tests.fakes.content import FakeContent, FakeImage

APP = Repository("docker.io", "library/app")
OTHER = Repository("docker.io", "library/other")
ELSEWHERE = Repository("ghcr.io", "library/app")
BLOB = Digest.from_content(b"blob")
LATEST = Tag("latest")

_numbers = count()


def digest() -> Digest:
    return Digest.from_content(str(next(_numbers)).encode())


async def add_image(index: Index, repository: Repository = APP) -> tuple[FakeImage, Manifest]:
    """Add an image with two layers, all of them committed."""
    content = FakeContent()
    layers = [str(next(_numbers)).encode() for _ in range(2)]
    image = content.add_image(layers=layers)
    raw = content.repository("library/app").manifests[image.digest]
    manifest = parse_manifest(raw.content, raw.media_type)
    await index.add_manifest(repository, Digest.parse(image.digest), len(raw.content), manifest)
    for child in manifest.children:
        assert child.size
        await index.add_blob(repository, child.digest, child.size)
    return image, manifest


def is_linked(index: Index, repository: Repository, digest: Digest) -> bool:
    row = index.blob(repository, digest)
    return row is not None and row.is_linked


async def order(index: Index) -> list[Digest]:
    return [digest for digest, _, _ in await index.least_recently_used(1000)]


async def test_a_blob_is_indexed_once_and_linked_to_each_repository_that_has_it(index):
    assert index.blob(APP, BLOB) is None
    await index.add_blob(APP, BLOB, 5)
    assert index.blob(APP, BLOB) == BlobRow(5, None, is_linked=True)
    assert index.blob(OTHER, BLOB) == BlobRow(5, None, is_linked=False)
    assert index.blob(ELSEWHERE, BLOB) == BlobRow(5, None, is_linked=False)
    await index.link(OTHER, BLOB)
    assert index.blob(OTHER, BLOB) == BlobRow(5, None, is_linked=True)
    assert index.blob(ELSEWHERE, BLOB) == BlobRow(5, None, is_linked=False)


async def test_what_is_not_stored_is_not_linked(index):
    await index.link(APP, BLOB)
    await index.add_blob(OTHER, BLOB, 5)
    assert not is_linked(index, APP, BLOB)


async def test_the_upstreams_that_have_sent_a_blob_are_known_while_it_is_stored(index):
    assert not index.has_sent(APP.upstream, BLOB)
    await index.add_blob(APP, BLOB, 5)
    assert index.has_sent(APP.upstream, BLOB)
    assert not index.has_sent(ELSEWHERE.upstream, BLOB)
    await index.add_blob(ELSEWHERE, BLOB, 5)
    assert index.has_sent(ELSEWHERE.upstream, BLOB)
    await index.remove_blobs([BLOB], lambda _: None)
    await index.add_blob(None, BLOB, 5)
    assert not index.has_sent(APP.upstream, BLOB)
    assert not index.has_sent(ELSEWHERE.upstream, BLOB)


async def test_a_blob_may_be_added_without_a_repository(index):
    await index.add_blob(None, BLOB, 5)
    assert index.blob(APP, BLOB) == BlobRow(5, None, is_linked=False)


async def test_a_manifest_links_nothing_that_it_names_and_states_sizes(index):
    image, manifest = await add_image(index)
    assert index.blob(APP, Digest.parse(image.digest)).media_type == image.media_type
    assert index.blob(APP, Digest.parse(image.digest)).is_linked
    await index.add_manifest(OTHER, Digest.parse(image.digest), 5, manifest)
    for child in manifest.children:
        assert is_linked(index, APP, child.digest)
        assert not is_linked(index, OTHER, child.digest)
        assert index.declared_size(APP, child.digest) == child.size
        assert index.declared_size(ELSEWHERE, child.digest) is None
    assert index.declared_size(APP, BLOB) is None


async def test_a_foreign_layer_is_no_blob_of_the_registry(index):
    foreign = {"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"}
    content = FakeContent()
    image = content.add_image(layers=[b"foreign"])
    document = content.repository("library/app").manifests[image.digest].document
    document["layers"][0] |= foreign
    manifest = Manifest(
        media_type=image.media_type,
        children=parse_manifest(
            str(document).replace("'", '"').encode(), image.media_type
        ).children,
        subject=None,
        artifact_type="",
        annotations={},
    )
    await index.add_manifest(APP, BLOB, 1, manifest)
    config, layer = manifest.children
    assert index.children(BLOB, 10) == [config.digest]
    assert index.declared_size(APP, config.digest) == config.size
    assert index.declared_size(APP, layer.digest) is None


async def test_a_tag_has_the_digest_that_upstream_stated_last(index, clock):
    assert index.tag(APP, LATEST) is None
    await index.set_tag(APP, LATEST, BLOB)
    assert index.tag(APP, LATEST) == TagRow(BLOB, clock())
    clock.advance(100)
    newer = digest()
    await index.set_tag(APP, LATEST, newer)
    assert index.tag(APP, LATEST) == TagRow(newer, clock())
    assert index.tag(OTHER, LATEST) is None
    assert list_tags(index._reader, APP, 10) == ["latest"]
    await index.delete_tag(APP, LATEST)
    assert index.tag(APP, LATEST) is None
    assert list_tags(index._reader, APP, 10) == []


async def test_referrers_are_found_by_subject_within_the_repository(index):
    subject, referrer = digest(), digest()
    manifest = Manifest("a/b", (), subject, "c/d", {})
    await index.add_manifest(APP, referrer, 7, manifest)
    assert index.referrers(APP, subject, 10) == [(referrer, BlobRow(7, "a/b", is_linked=True))]
    assert index.referrers(OTHER, subject, 10) == []
    assert index.referrers(APP, referrer, 10) == []


async def test_the_least_recently_used_blob_comes_first(index, clock):
    first, second, third = digest(), digest(), digest()
    for blob in (first, second, third):
        await index.add_blob(APP, blob, 10)
        clock.advance(1)
    assert await order(index) == [first, second, third]
    index.touch(first)
    assert await order(index) == [second, third, first]
    assert index.oldest_use() == clock() - 2
    assert [size for _, size, _ in await index.least_recently_used(2)] == [10, 10]


async def test_a_use_of_a_manifest_counts_for_its_layers_also_through_an_index(index):
    image, manifest = await add_image(index)
    index_digest = digest()
    of_index = Manifest("index", (), None, "", {})
    child = parse_manifest(
        b'{"manifests":[{"mediaType":"m","digest":"%s","size":1}]}' % image.digest.encode(),
        "application/vnd.oci.image.index.v1+json",
    ).children
    await index.add_manifest(
        APP, index_digest, 1, Manifest(of_index.media_type, child, None, "", {})
    )
    later = digest()
    await index.add_blob(APP, later, 1)
    index.touch(index_digest)
    assert (await order(index))[0] == later
    assert set(await order(index)) == {
        later,
        index_digest,
        Digest.parse(image.digest),
        *(child.digest for child in manifest.children),
    }


async def test_uses_survive_a_restart(tmp_path, clock):
    path = tmp_path / "index.sqlite"
    index = await asyncio.to_thread(Index, path, clock)
    blobs = [digest() for _ in range(4)]
    for blob in blobs:
        await index.add_blob(APP, blob, 1)
    index.touch(blobs[0])
    await index.flush()
    index.touch(blobs[1])
    await asyncio.to_thread(index.close)
    again = await asyncio.to_thread(Index, path, clock)
    assert await order(again) == [blobs[2], blobs[3], blobs[0], blobs[1]]
    await asyncio.to_thread(again.close)


async def test_a_clock_that_goes_back_does_not_change_the_order_of_uses(tmp_path, clock):
    path = tmp_path / "index.sqlite"
    index = await asyncio.to_thread(Index, path, clock)
    first, second, third = digest(), digest(), digest()
    await index.add_blob(APP, first, 1)
    clock.advance(-1_000_000)
    await index.add_blob(APP, second, 1)
    await asyncio.to_thread(index.close)
    again = await asyncio.to_thread(Index, path, clock)
    await again.add_blob(APP, third, 1)
    assert await order(again) == [first, second, third]
    await asyncio.to_thread(again.close)


async def test_a_removal_deletes_the_file_first_and_then_all_rows(index):
    image, manifest = await add_image(index)
    own = Digest.parse(image.digest)
    await index.set_tag(APP, LATEST, own)
    known: list[bool] = []
    await index.remove_blobs([own], lambda gone: known.append(index.blob(APP, gone) is not None))
    assert known == [True]
    assert index.blob(APP, own) is None
    assert index.tag(APP, LATEST) is None
    assert index.declared_size(APP, manifest.children[0].digest) is None


async def test_a_shared_layer_stays_linked_to_its_repositories(index):
    await add_image(index)
    await index.add_blob(APP, BLOB, 1)
    await index.link(OTHER, BLOB)
    _, manifest = await add_image(index, OTHER)
    await index.remove_blobs([manifest.children[1].digest], lambda _: None)
    assert is_linked(index, APP, BLOB)
    assert is_linked(index, OTHER, BLOB)


async def test_a_blob_whose_file_cannot_be_deleted_stays_in_the_index(index):
    await index.add_blob(APP, BLOB, 1)

    def refuse(_: Digest) -> None:
        raise StorageError("no")

    with pytest.raises(StorageError):
        await index.remove_blobs([BLOB], refuse)
    assert index.blob(APP, BLOB) is not None


async def test_totals_are_over_all_blobs(index):
    assert index.totals == (0, 0, 0)
    await index.add_blob(APP, digest(), 5)
    await index.add_blob(OTHER, BLOB, 4097)
    await index.pin([(OTHER, BLOB)])
    assert index.is_pinned(BLOB)
    assert index.totals == (2, 3 * 4096, 2 * 4096)
    assert index.used_bytes() > 0


async def test_a_hit_writes_nothing(index):
    await index.add_blob(APP, BLOB, 1)
    probe = sqlite3.connect(index.path)
    (before,) = probe.execute("PRAGMA data_version").fetchone()
    for _ in range(100):
        index.touch(BLOB)
        index.blob(APP, BLOB)
    assert probe.execute("PRAGMA data_version").fetchone() == (before,)
    await index.flush()
    assert probe.execute("PRAGMA data_version").fetchone() != (before,)
    probe.close()


async def test_an_index_that_cannot_be_written_is_a_storage_error_and_loses_no_use(index):
    await index.add_blob(APP, BLOB, 1)
    newer = digest()
    await index.add_blob(APP, newer, 1)
    blocker = sqlite3.connect(index.path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    index.touch(BLOB)
    with pytest.raises(StorageError, match="cannot be written"):
        await index.flush()
    blocker.execute("ROLLBACK")
    blocker.close()
    assert await order(index) == [newer, BLOB]


async def test_concurrent_writes_are_all_stored(index):
    blobs = [digest() for _ in range(100)]
    await asyncio.gather(*(index.add_blob(APP, blob, 1) for blob in blobs))
    assert set(await order(index)) == set(blobs)


def test_a_file_that_is_not_an_index_is_an_error_with_advice(tmp_path, clock):
    path = tmp_path / "index.sqlite"
    path.write_bytes(b"this is no database, but long enough to be taken for one" * 100)
    with pytest.raises(StorageError, match="rebuild it with pullcache fsck"):
        Index(path, clock)


def test_p14_an_index_of_a_newer_version_is_refused(tmp_path, clock):
    path = tmp_path / "index.sqlite"
    Index(path, clock).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StorageError, match="has version 99"):
        Index(path, clock)


async def test_a_use_recorded_before_the_commit_does_not_make_a_blob_older(index):
    first, second = digest(), digest()
    index.touch(second)
    await index.add_blob(APP, first, 1)
    await index.add_blob(APP, second, 1)
    assert await order(index) == [first, second]
