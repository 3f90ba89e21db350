"""Commits: all of it or nothing, one after another for a digest, and counted once."""

import asyncio
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from proxy.errors import StorageError
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from tests.fakes.content import OCI_CONFIG, OCI_MANIFEST, descriptor
from tests.storage.test_space import APP, CAP, KIB, Shop, opened

CONTENT = b"content" * 1000
DIGEST = Digest.from_content(CONTENT)
MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(b"{}", OCI_CONFIG),
        "layers": [],
    }
).encode()
MANIFEST_DIGEST = Digest.from_content(MANIFEST)


@pytest.fixture
async def shop(tmp_path):
    async with opened(tmp_path / "store") as shop:
        yield shop


@contextmanager
def index_locked(shop: Shop) -> Iterator[None]:
    """Let another process lock the index, so that nothing can be written to it."""
    shop.index._writer.execute("PRAGMA busy_timeout = 0")
    blocker = sqlite3.connect(shop.index.path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        blocker.execute("ROLLBACK")
        blocker.close()


@contextmanager
def commits_stopped(shop: Shop) -> Iterator[None]:
    """Let commits begin, but not get to the disk before the block ends."""
    go_on = threading.Event()
    for _ in range(2):
        shop.executor.submit(go_on.wait)
    try:
        yield
    finally:
        go_on.set()


async def until_locked(shop: Shop, digest: Digest) -> None:
    while digest not in shop.space.locks:  # noqa: ASYNC110 (a test looks from outside)
        await asyncio.sleep(0)


async def commit_blob(shop: Shop) -> bool:
    reservation = await shop.space.reserve(len(CONTENT))
    assert reservation is not None
    directory = await asyncio.to_thread(shop.store.make_import_directory)
    ingest = await asyncio.to_thread(shop.store.open_ingest, DIGEST, directory)
    await asyncio.to_thread(ingest.append, [CONTENT])
    try:
        return await shop.committer.commit_ingest(ingest, reservation, APP)
    finally:
        shop.space.release(reservation)
        ingest.close()
        await asyncio.to_thread(shop.store.remove_import_directory, directory)


async def commit_manifest(shop: Shop) -> bool:
    reservation = await shop.space.reserve(len(MANIFEST))
    assert reservation is not None
    manifest = oci.parse_manifest(MANIFEST, OCI_MANIFEST)
    try:
        return await shop.committer.commit_manifest(
            APP, MANIFEST_DIGEST, MANIFEST, manifest, reservation
        )
    finally:
        shop.space.release(reservation)


BOTH = pytest.mark.parametrize(
    ("commit", "digest"), [(commit_blob, DIGEST), (commit_manifest, MANIFEST_DIGEST)]
)


@BOTH
async def test_a_commit_that_the_index_refuses_leaves_nothing(shop, commit, digest):
    with index_locked(shop), pytest.raises(StorageError, match="database is locked"):
        await commit(shop)
    assert not shop.holds(digest)
    assert list((shop.store.root / "ingest").iterdir()) == []
    assert shop.is_right()
    assert shop.space.reserved_bytes == 0
    assert await commit(shop)
    assert shop.holds(digest)
    assert shop.is_right()


@BOTH
async def test_a_commit_that_fails_leaves_what_was_there_before(shop, commit, digest):
    assert await commit(shop)
    with index_locked(shop), pytest.raises(StorageError, match="database is locked"):
        await commit(shop)
    assert shop.holds(digest)
    assert shop.is_right()


@BOTH
async def test_a_blob_that_is_committed_several_times_is_counted_once(shop, commit, digest):
    results = await asyncio.gather(*(commit(shop) for _ in range(8)))
    assert sorted(results) == [False] * 7 + [True]
    assert shop.space.blob_count == 1
    assert shop.is_right()
    assert shop.space.reserved_bytes == 0


@BOTH
async def test_a_commit_that_cannot_be_undone_stays_in_the_account(
    shop, commit, digest, monkeypatch
):
    def fail(_: Digest) -> None:
        raise StorageError("the disk fails")

    with monkeypatch.context() as patch:
        patch.setattr(shop.store, "delete", fail)
        with index_locked(shop), pytest.raises(StorageError, match="database is locked"):
            await commit(shop)
    assert (shop.space.blob_count, shop.space.stored_bytes) == (1, shop.on_disk("blobs/*/*"))
    assert await commit(shop)
    assert shop.is_right()


@BOTH
async def test_what_is_being_committed_again_is_neither_evicted_nor_removed(shop, commit, digest):
    await commit(shop)
    async with asyncio.TaskGroup() as group:
        with commits_stopped(shop):
            again = group.create_task(commit(shop))
            await until_locked(shop, digest)
            assert await shop.space._remove([digest], "size") == []
    assert again.result() is False
    assert shop.holds(digest)
    assert shop.is_right()


@BOTH
async def test_an_eviction_and_the_discovery_that_its_file_is_gone_are_one_removal(
    shop, commit, digest
):
    await commit(shop)
    size = shop.index.blob_size(digest)
    evict = shop.space._remove([digest], "size")
    found = [shop.space.open_blob(digest, size) for _ in range(5)]
    damaged = shop.space.remove_corrupt(digest)
    await asyncio.gather(evict, *found, damaged)
    assert (shop.space.blob_count, shop.space.stored_bytes) == (0, 0)
    metrics = await asyncio.to_thread(shop.metrics.render)
    assert b'evictions_total{reason="size"} 1.0' in metrics
    assert b'evictions_total{reason="corrupt"}' not in metrics


async def test_a_blob_that_was_committed_again_is_not_taken_for_the_damaged_one(shop):
    await commit_manifest(shop)
    await shop.space.remove_corrupt(MANIFEST_DIGEST)
    assert shop.holds(MANIFEST_DIGEST)


async def test_a_caller_that_is_cancelled_leaves_a_whole_commit(shop):
    async with asyncio.TaskGroup() as group:
        with commits_stopped(shop):
            committing = group.create_task(commit_manifest(shop))
            await until_locked(shop, MANIFEST_DIGEST)
            committing.cancel()
            await asyncio.sleep(0)
    assert committing.cancelled()
    assert shop.holds(MANIFEST_DIGEST)
    assert shop.is_right()
    assert shop.space.reserved_bytes == 0


async def test_a_manifest_that_a_kill_kept_from_the_index_is_counted_at_the_next_start(tmp_path):
    async with opened(tmp_path / "store") as shop:
        assert await shop.fetch(KIB)
        await asyncio.to_thread(shop.store.commit_bytes, MANIFEST_DIGEST, MANIFEST)
    async with opened(tmp_path / "store") as shop:
        assert shop.space.blob_count == 2
        assert shop.is_right()
        assert shop.index.manifest(MANIFEST_DIGEST)
        assert list((shop.store.root / "ingest").iterdir()) == []


async def test_committing_never_takes_more_than_the_cap(tmp_path):
    async with opened(tmp_path / "store", cap=CAP) as shop:
        for _ in range(20):
            assert await shop.fetch(500 * KIB)
            assert shop.on_disk() <= CAP
            assert shop.space.used_bytes <= CAP
        assert shop.is_right()
