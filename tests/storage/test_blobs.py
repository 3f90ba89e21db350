"""The store on disk: a file named by a digest is complete, regular and our own."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import NoSpaceError, StorageError
from proxy.oci.digest import Digest
from proxy.storage.blobs import BLOCK_SIZE, BlobStore, allocated_size
from proxy.storage.fsck import check_store

CONTENT = b"some layer"
DIGEST = Digest.from_content(CONTENT)


def read(store: BlobStore) -> bytes | None:
    return asyncio.run(store.read(DIGEST))


def content_of(store: BlobStore, digest: Digest, size: int) -> bytes | None:
    blob = store.open(digest, size)
    if blob is None:
        return None
    with blob:
        return os.pread(blob.fd, size + 1, 0)


def test_committed_content_is_found_by_its_digest(store):
    assert store.open(DIGEST, len(CONTENT)) is None
    assert read(store) is None
    store.commit_bytes(DIGEST, CONTENT)
    assert content_of(store, DIGEST, len(CONTENT)) == CONTENT
    assert read(store) == CONTENT
    assert list(store.iter_blobs()) == [(DIGEST, len(CONTENT))]


def test_the_blobs_have_the_paths_of_an_oci_image_layout(store):
    long = Digest.from_content(CONTENT, "sha512")
    store.commit_bytes(DIGEST, CONTENT)
    store.commit_bytes(long, CONTENT)
    assert (store.root / "blobs" / "sha256" / DIGEST.hex).read_bytes() == CONTENT
    assert (store.root / "blobs" / "sha512" / long.hex).read_bytes() == CONTENT
    check = subprocess.run(
        ["sha256sum", store.blob_path(DIGEST)], capture_output=True, check=True, text=True
    )
    assert check.stdout.startswith(DIGEST.hex)


def test_a_commit_of_bytes_has_a_marker_until_it_is_settled(store):
    store.commit_bytes(DIGEST, CONTENT)
    assert store.list_committed_ingests() == [DIGEST]
    store.settle_bytes(DIGEST)
    assert store.list_committed_ingests() == []


def test_a_commit_of_bytes_leaves_nothing_but_the_blob(store):
    store.commit_bytes(DIGEST, CONTENT)
    store.settle_bytes(DIGEST)
    assert list((store.root / "ingest").iterdir()) == []
    assert (store.root.stat().st_mode & 0o777) == 0o700


def test_an_open_blob_can_be_read_after_it_was_deleted(store):
    store.commit_bytes(DIGEST, CONTENT)
    blob = store.open(DIGEST, len(CONTENT))
    assert blob is not None
    store.delete(DIGEST)
    store.delete(DIGEST)
    with blob:
        assert os.pread(blob.fd, 100, 0) == CONTENT
    assert store.open(DIGEST, len(CONTENT)) is None


def damaged(store: BlobStore, how: str) -> None:
    path = Path(store.blob_path(DIGEST))
    match how:
        case "truncated":
            os.truncate(path, 3)
        case "longer":
            path.write_bytes(CONTENT + b"!")
        case "empty":
            path.write_bytes(b"")
        case "symlink":
            path.rename(path.with_name("elsewhere"))
            path.symlink_to("elsewhere")
        case "directory":
            path.unlink()
            path.mkdir()
        case _:
            path.unlink()


@pytest.mark.parametrize("how", ["truncated", "longer", "empty", "symlink", "directory", "gone"])
def test_only_a_regular_file_of_the_right_size_is_a_blob(store, how):
    store.commit_bytes(DIGEST, CONTENT)
    damaged(store, how)
    assert store.open(DIGEST, len(CONTENT)) is None
    assert read(store) is None


def test_a_pipe_in_a_blobs_place_does_not_stop_the_daemon(store):
    os.mkfifo(store.blob_path(DIGEST))

    def rescue():
        os.close(os.open(store.blob_path(DIGEST), os.O_RDWR | os.O_NONBLOCK))

    timer = threading.Timer(1.0, rescue)
    timer.start()
    start = time.monotonic()
    assert store.open(DIGEST, 0) is None
    assert read(store) is None
    assert time.monotonic() - start < 0.9
    timer.cancel()
    timer.join()


async def test_a_read_that_is_cancelled_leaves_no_file_open(store, monkeypatch):
    """The file would be closed when it is collected, with a warning that fails the tests."""
    await asyncio.to_thread(store.commit_bytes, DIGEST, CONTENT)
    is_opening, may_open = threading.Event(), threading.Event()

    def open_late(*args: Any, **options: Any) -> Any:
        is_opening.set()
        may_open.wait()
        return open(*args, **options)  # noqa: PTH123 (as aiofiles calls it)

    monkeypatch.setattr("aiofiles.threadpool.sync_open", open_late)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(store.read(DIGEST))
        await asyncio.to_thread(is_opening.wait)
        task.cancel()
        await asyncio.sleep(0)
        may_open.set()
    assert task.cancelled()
    gc.collect()


def test_a_flipped_bit_is_seen_when_a_manifest_is_read(store):
    store.commit_bytes(DIGEST, CONTENT)
    Path(store.blob_path(DIGEST)).write_bytes(b"some lAyer")
    assert read(store) is None


def test_files_that_are_not_blobs_are_not_touched(store):
    store.commit_bytes(DIGEST, CONTENT)
    folder = store.root / "blobs" / "sha256"
    (folder / "lost+found").mkdir()
    (folder / ("a" * 63)).write_bytes(b"")
    (folder / ("A" * 64)).write_bytes(b"")
    (folder / ("b" * 64)).symlink_to("nowhere")
    (folder / ("c" * 64)).mkdir()
    assert [digest for digest, _ in store.iter_blobs()] == [DIGEST]


def test_ingests_are_listed_with_their_allocated_bytes(store):
    ingest = store.open_ingest(DIGEST)
    ingest.append([b"x" * 10_000])
    ingest.close()
    (store.root / "ingest" / "put-left").write_bytes(b"")
    ((digest, size, written),) = store.list_ingests()
    assert digest == DIGEST
    assert size >= 10_000
    assert abs(written - time.time()) < 60
    store.delete_ingest(DIGEST)
    store.delete_ingest(DIGEST)
    assert list(store.list_ingests()) == []
    assert [path.name for path in (store.root / "ingest").iterdir()] == ["put-left"]


def test_a_store_has_one_daemon(store):
    with pytest.raises(StorageError, match=f"in use by process {os.getpid()}"):
        BlobStore(store.root)


def test_the_lock_ends_with_its_process(tmp_path):
    script = (
        "import os, pathlib\n"
        "from proxy.storage.blobs import BlobStore\n"
        f"store = BlobStore(pathlib.Path({str(tmp_path)!r}))\n"
        "os._exit(7)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == 7
    BlobStore(tmp_path).close()


def test_a_store_that_cannot_be_created_raises_the_reason(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be used: Not a directory"):
        BlobStore(tmp_path / "file" / "store")


def test_a_blob_that_cannot_be_deleted_raises_the_reason(store):
    Path(store.blob_path(DIGEST)).mkdir()
    with pytest.raises(StorageError, match="cannot remove"):
        store.delete(DIGEST)


def test_a_full_disk_is_distinguished_from_other_errors(tiny_disk):
    store = BlobStore(tiny_disk(256 * 1024))
    try:
        with pytest.raises(NoSpaceError):
            store.commit_bytes(DIGEST, b"x" * 1_000_000)
        assert list((store.root / "ingest").iterdir()) == []
        (store.root / "ingest").rename(store.root / "moved")
        with pytest.raises(StorageError) as caught:
            store.commit_bytes(DIGEST, CONTENT)
        assert not isinstance(caught.value, NoSpaceError)
    finally:
        store.close()


def test_the_size_and_free_space_of_the_disk_are_known(store):
    assert 0 < store.free_bytes() <= store.total_bytes()


@pytest.mark.parametrize(
    ("size", "taken"),
    [(0, 0), (1, BLOCK_SIZE), (BLOCK_SIZE, BLOCK_SIZE), (BLOCK_SIZE + 1, 2 * BLOCK_SIZE)],
)
def test_a_file_takes_whole_blocks(size, taken):
    assert allocated_size(size) == taken


def test_a_disk_error_of_an_ingest_is_a_storage_error(store):
    digest = Digest.from_content(b"x")
    (store.root / "ingest").rmdir()
    (store.root / "ingest").touch()
    with pytest.raises(StorageError, match="Not a directory"):
        store.list_ingests()
    with pytest.raises(StorageError, match="Not a directory"):
        store.delete_ingest(digest)


def test_fsck_does_not_remove_files_that_it_cannot_open(monkeypatch, tmp_path):
    store = BlobStore(tmp_path)
    store.commit_bytes(DIGEST, CONTENT)
    store.close()
    path = Path(store.blob_path(DIGEST))
    open_ = os.open

    def refuse(name: Any, *rest: Any, **kw: Any) -> int:
        if str(name) == str(path):
            raise PermissionError(13, "Permission denied")
        return open_(name, *rest, **kw)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        check_store(tmp_path, dry_run=False, on_progress=lambda *_: None)
    assert path.exists()
