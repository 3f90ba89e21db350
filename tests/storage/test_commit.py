"""Commits: completely or not at all, one at a time for a digest, and counted once."""

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
from proxy.storage import index
from tests.fakes.content import OCI_CONFIG, OCI_MANIFEST, descriptor
from tests.storage.test_space import APP, CAP, KIB, StoreRig, open_rig

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
async def rig(tmp_path):
    async with open_rig(tmp_path / "store") as rig:
        yield rig


@contextmanager
def index_locked(rig: StoreRig) -> Iterator[None]:
    """Let another process lock the index, so that nothing can be written to it."""
    blocker = sqlite3.connect(rig.index.path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    before, index.LOCK_TIMEOUT = index.LOCK_TIMEOUT, 0.0
    try:
        yield
    finally:
        index.LOCK_TIMEOUT = before
        blocker.execute("ROLLBACK")
        blocker.close()


@contextmanager
def commits_stopped(rig: StoreRig) -> Iterator[None]:
    """Let commits begin, but not reach the disk before the end of the block."""
    go_on = threading.Event()
    for _ in range(2):
        rig.executor.submit(go_on.wait)
    try:
        yield
    finally:
        go_on.set()


async def until_locked(rig: StoreRig, digest: Digest) -> None:
    while digest not in rig.space.locks:  # noqa: ASYNC110 (a test looks from outside)
        await asyncio.sleep(0)


async def commit_blob(rig: StoreRig) -> bool:
    reservation = await rig.space.reserve(len(CONTENT))
    assert reservation is not None
    directory = await asyncio.to_thread(rig.store.make_import_directory)
    ingest = await asyncio.to_thread(rig.store.open_ingest, DIGEST, directory)
    await asyncio.to_thread(ingest.append, [CONTENT])
    try:
        return await rig.committer.commit_ingest(ingest, reservation, APP)
    finally:
        rig.space.release(reservation)
        ingest.close()
        await asyncio.to_thread(rig.store.remove_import_directory, directory)


async def commit_manifest(rig: StoreRig) -> bool:
    reservation = await rig.space.reserve(len(MANIFEST))
    assert reservation is not None
    manifest = oci.parse_manifest(MANIFEST, OCI_MANIFEST)
    try:
        return await rig.committer.commit_manifest(
            APP, MANIFEST_DIGEST, MANIFEST, manifest, reservation
        )
    finally:
        rig.space.release(reservation)


BOTH = pytest.mark.parametrize(
    ("commit", "digest"), [(commit_blob, DIGEST), (commit_manifest, MANIFEST_DIGEST)]
)


@BOTH
async def test_a_commit_that_the_index_refuses_leaves_nothing(rig, commit, digest):
    with index_locked(rig), pytest.raises(StorageError, match="another process has locked it"):
        await commit(rig)
    assert not rig.holds(digest)
    assert list((rig.store.root / "ingest").iterdir()) == []
    assert rig.is_right()
    assert rig.space.reserved_bytes == 0
    assert await commit(rig)
    assert rig.holds(digest)
    assert rig.is_right()


@BOTH
async def test_a_failed_commit_leaves_an_existing_blob(rig, commit, digest):
    assert await commit(rig)
    with index_locked(rig), pytest.raises(StorageError, match="another process has locked it"):
        await commit(rig)
    assert rig.holds(digest)
    assert rig.is_right()


@BOTH
async def test_a_blob_that_is_committed_several_times_is_counted_once(rig, commit, digest):
    results = await asyncio.gather(*(commit(rig) for _ in range(8)))
    assert sorted(results) == [False] * 7 + [True]
    assert rig.space.blob_count == 1
    assert rig.is_right()
    assert rig.space.reserved_bytes == 0


@BOTH
async def test_a_commit_that_cannot_be_undone_stays_in_the_account(
    rig, commit, digest, monkeypatch
):
    def fail(_: Digest) -> None:
        raise StorageError("the disk fails")

    with monkeypatch.context() as patch:
        patch.setattr(rig.store, "delete", fail)
        with index_locked(rig), pytest.raises(StorageError, match="another process has locked it"):
            await commit(rig)
    assert (rig.space.blob_count, rig.space.stored_bytes) == (1, rig.on_disk("blobs/*/*"))
    assert await commit(rig)
    assert rig.is_right()


@BOTH
async def test_a_blob_that_is_being_committed_again_is_neither_evicted_nor_removed(
    rig, commit, digest
):
    await commit(rig)
    async with asyncio.TaskGroup() as group:
        with commits_stopped(rig):
            again = group.create_task(commit(rig))
            await until_locked(rig, digest)
            assert await rig.space._remove([digest], "size") == []
    assert again.result() is False
    assert rig.holds(digest)
    assert rig.is_right()


@BOTH
async def test_an_eviction_and_the_discovery_of_a_missing_file_are_one_removal(rig, commit, digest):
    await commit(rig)
    size = rig.index.blob_size(digest)
    evict = rig.space._remove([digest], "size")
    found = [rig.space.open_blob(digest, size) for _ in range(5)]
    damaged = rig.space.remove_corrupt(digest)
    await asyncio.gather(evict, *found, damaged)
    assert (rig.space.blob_count, rig.space.stored_bytes) == (0, 0)
    metrics = await asyncio.to_thread(rig.metrics.render)
    assert b'evictions_total{reason="size"} 1.0' in metrics
    assert b'evictions_total{reason="corrupt"} 0.0' in metrics


async def test_a_blob_that_was_committed_again_is_not_removed_as_damaged(rig):
    await commit_manifest(rig)
    await rig.space.remove_corrupt(MANIFEST_DIGEST)
    assert rig.holds(MANIFEST_DIGEST)


async def test_a_cancelled_caller_leaves_a_complete_commit(rig):
    async with asyncio.TaskGroup() as group:
        with commits_stopped(rig):
            committing = group.create_task(commit_manifest(rig))
            await until_locked(rig, MANIFEST_DIGEST)
            committing.cancel()
            await asyncio.sleep(0)
    assert committing.cancelled()
    assert rig.holds(MANIFEST_DIGEST)
    assert rig.is_right()
    assert rig.space.reserved_bytes == 0


async def test_a_manifest_that_a_kill_kept_from_the_index_is_counted_at_the_next_start(tmp_path):
    async with open_rig(tmp_path / "store") as rig:
        assert await rig.fetch(KIB)
        await asyncio.to_thread(rig.store.commit_bytes, MANIFEST_DIGEST, MANIFEST)
    async with open_rig(tmp_path / "store") as rig:
        assert rig.space.blob_count == 2
        assert rig.is_right()
        assert rig.index.manifest(MANIFEST_DIGEST)
        assert list((rig.store.root / "ingest").iterdir()) == []


async def test_commits_never_exceed_the_limit(tmp_path):
    async with open_rig(tmp_path / "store", cap=CAP) as rig:
        for _ in range(20):
            assert await rig.fetch(500 * KIB)
            assert rig.on_disk() <= CAP
            assert rig.space.used_bytes <= CAP
        assert rig.is_right()
