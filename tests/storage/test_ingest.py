"""Ingests: hashed as they are written, resumable after a kill, visible only if right."""

import hashlib
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from proxy.errors import NoSpaceError, StorageError
from proxy.oci.digest import Digest
from proxy.storage.blobs import BlobStore
from proxy.storage.ingest import Ingest

CONTENT = bytes(range(256)) * 1024
DIGEST = Digest.from_content(CONTENT)


def visible(store: BlobStore) -> bool:
    return Path(store.blob_path(DIGEST)).exists()


def test_a_blob_is_invisible_until_it_is_committed(store):
    ingest = store.open_ingest(DIGEST)
    for start in range(0, len(CONTENT), 10_000):
        ingest.append([CONTENT[start : start + 5_000], CONTENT[start + 5_000 : start + 10_000]])
        assert ingest.frontier == min(start + 10_000, len(CONTENT))
    assert ingest.matches_digest()
    assert not visible(store)
    ingest.commit()
    ingest.delete_state()
    ingest.close()
    assert visible(store)
    assert Path(store.blob_path(DIGEST)).read_bytes() == CONTENT
    assert list((store.root / "ingest").iterdir()) == []


@given(cuts=st.lists(st.integers(0, len(CONTENT)), max_size=6))
def test_the_digest_does_not_depend_on_how_the_bytes_are_split(tmp_path_factory, cuts):
    store = BlobStore(tmp_path_factory.mktemp("store"))
    ingest = store.open_ingest(DIGEST)
    marks = sorted({0, *cuts, len(CONTENT)})
    for start, stop in pairwise(marks):
        assert not ingest.matches_digest()
        ingest.append([CONTENT[start:stop]])
        assert ingest.frontier == stop
    assert ingest.matches_digest()
    ingest.close()
    store.close()


def test_one_wrong_bit_is_noticed(store):
    ingest = store.open_ingest(DIGEST)
    ingest.append([b"\x01" + CONTENT[1:]])
    assert ingest.frontier == len(CONTENT)
    assert not ingest.matches_digest()
    ingest.discard()
    ingest.discard()
    ingest.close()
    assert list((store.root / "ingest").iterdir()) == []


def test_a_reader_keeps_the_bytes_of_a_discarded_ingest(store):
    ingest = store.open_ingest(DIGEST)
    ingest.append([CONTENT])
    ingest.discard()
    assert os.pread(ingest.fd, len(CONTENT), 0) == CONTENT
    ingest.close()


def test_an_ingest_is_resumed_where_it_stopped(store):
    ingest = store.open_ingest(DIGEST)
    ingest.preallocate(len(CONTENT))
    ingest.append([CONTENT[:100_000]])
    ingest.close()
    again = store.open_ingest(DIGEST)
    assert again.frontier == 0
    again.resume()
    assert (again.frontier, again.bytes_resumed) == (100_000, 100_000)
    again.append([CONTENT[100_000:]])
    assert again.matches_digest()
    again.commit()
    again.close()
    assert Path(store.blob_path(DIGEST)).read_bytes() == CONTENT


def test_a_copy_of_the_hasher_does_not_affect_the_ingest(store):
    ingest = store.open_ingest(DIGEST)
    ingest.append([CONTENT[:5]])
    hasher = ingest.copy_hasher()
    hasher.update(CONTENT[5:])
    assert DIGEST.matches(hasher)
    ingest.append([CONTENT[5:]])
    assert ingest.matches_digest()
    ingest.close()


def test_a_reset_discards_the_bytes(store):
    ingest = store.open_ingest(DIGEST)
    ingest.append([b"wrong"])
    ingest.reset()
    assert ingest.frontier == 0
    ingest.append([CONTENT])
    assert ingest.matches_digest()
    ingest.close()


def test_a_commit_cuts_off_unused_preallocated_space(store):
    ingest = store.open_ingest(DIGEST)
    ingest.preallocate(len(CONTENT) * 2)
    ingest.append([CONTENT])
    ingest.commit()
    ingest.close()
    assert Path(store.blob_path(DIGEST)).stat().st_size == len(CONTENT)


def state_of(store: BlobStore) -> Path:
    return store.root / "ingest" / f"sha256-{DIGEST.hex}.state"


@pytest.mark.parametrize("state", [b"", b"{", b"\xff" * 64, b'{"have":-5}', b'{"have":"x"}'])
def test_an_invalid_state_discards_the_bytes(store, state):
    ingest = store.open_ingest(DIGEST)
    ingest.append([CONTENT[:1000]])
    ingest.close()
    state_of(store).write_bytes(state)
    again = store.open_ingest(DIGEST)
    again.resume()
    assert again.frontier == 0
    again.append([CONTENT])
    assert again.matches_digest()
    again.close()


def test_a_state_that_lists_missing_bytes_discards_the_bytes(store):
    ingest = store.open_ingest(DIGEST)
    ingest.append([CONTENT[:1000]])
    ingest.close()
    state_of(store).write_bytes(b'{"have":99999999}')
    again = store.open_ingest(DIGEST)
    again.resume()
    assert again.frontier == 1000
    again.close()


def test_symbolic_links_are_not_followed(store, tmp_path):
    target = tmp_path / "precious"
    target.write_bytes(b"keep me")
    (store.root / "ingest" / f"sha256-{DIGEST.hex}").symlink_to(target)
    with pytest.raises(StorageError):
        store.open_ingest(DIGEST)
    assert target.read_bytes() == b"keep me"


KILLED = """
import os, pathlib, signal
from proxy.oci.digest import Digest
from proxy.storage.blobs import BlobStore
content = bytes(range(256)) * 1024
store = BlobStore(pathlib.Path(os.environ["STORE"]))
ingest = store.open_ingest(Digest.from_content(content))
ingest.preallocate(len(content))
ingest.append([content[:150_000]])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_bytes_written_by_a_killed_process_are_resumed(tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED], check=False, env={**os.environ, "STORE": str(tmp_path)}
    )
    assert killed.returncode == -9
    store = BlobStore(tmp_path)
    ingest = store.open_ingest(DIGEST)
    ingest.resume()
    assert ingest.frontier == 150_000
    ingest.append([CONTENT[150_000:]])
    assert ingest.matches_digest()
    ingest.close()
    store.close()


def on_a_tiny_disk(tiny_disk) -> tuple[BlobStore, Ingest]:
    store = BlobStore(tiny_disk(512 * 1024))
    return store, store.open_ingest(DIGEST)


def test_a_full_disk_is_noticed_when_space_is_allocated(tiny_disk):
    store, ingest = on_a_tiny_disk(tiny_disk)
    with pytest.raises(NoSpaceError):
        ingest.preallocate(10_000_000)
    ingest.discard()
    ingest.close()
    store.close()


def test_a_disk_that_fills_up_loses_no_written_bytes(tiny_disk):
    store, ingest = on_a_tiny_disk(tiny_disk)
    ingest.append([CONTENT[:100_000]])
    with pytest.raises(NoSpaceError):
        ingest.append([b"x" * 10_000_000])
    assert ingest.frontier >= 100_000
    assert os.pread(ingest.fd, 100_000, 0) == CONTENT[:100_000]
    (store.root / "ingest" / f"sha256-{DIGEST.hex}").stat()
    ingest.discard()
    ingest.close()
    again = store.open_ingest(DIGEST)
    again.append([CONTENT])
    assert again.matches_digest()
    again.close()
    store.close()


@pytest.mark.parametrize("ahead", [[(1, 2)], [(5, 3)], [(9, 1 << 60)], [(-5, 7)]])
def test_impossible_ranges_in_a_state_are_fetched_again(store, ahead):
    ingest = store.open_ingest(DIGEST)
    ingest.append([CONTENT[:3]])
    ingest.record_written(3, ahead)
    ingest.close()
    again = store.open_ingest(DIGEST)
    again.resume()
    assert (again.frontier, list(again.ranges_ahead)) == (3, [])
    again.close()


def test_after_a_failed_write_the_frontier_goes_back_to_bytes_that_are_in_the_file(store):
    ingest = store.open_ingest(DIGEST)
    content = memoryview(CONTENT)
    ingest.write_at(0, content[:2500])
    ingest.hash_from_memory(content[:1000])
    ingest.record_written(2500, [])
    for start in range(1000, 5000, 1000):
        ingest.hash_from_memory(content[start : start + 1000])
    ingest.rewind_to_written()
    assert ingest.frontier == 2000
    assert ingest.copy_hasher().digest() == hashlib.sha256(CONTENT[:2000]).digest()
    ingest.write_at(2500, content[2500:])
    ingest.record_written(len(CONTENT), [])
    ingest.rewind_to_written()
    ingest.hash_up_to(len(CONTENT))
    assert ingest.matches_digest()
    ingest.discard()
    ingest.close()


def test_bytes_that_were_hashed_and_not_written_are_fetched_again_after_a_kill(store):
    ingest = store.open_ingest(DIGEST)
    ingest.write_at(0, memoryview(CONTENT)[:500])
    ingest.hash_from_memory(memoryview(CONTENT)[:1000])
    ingest.record_written(500, [])
    ingest.close()
    again = store.open_ingest(DIGEST)
    again.resume()
    assert again.frontier == 500
    again.discard()
    again.close()


def test_bytes_written_ahead_are_hashed_in_order_also_after_a_kill(store):
    ingest = store.open_ingest(DIGEST)
    ingest.write_at(1000, memoryview(CONTENT[1000:]))
    ingest.record_written(0, [(1000, len(CONTENT))])
    ingest.append([CONTENT[:500]])
    ingest.close()
    again = store.open_ingest(DIGEST)
    again.resume()
    assert (again.frontier, list(again.ranges_ahead)) == (500, [(1000, len(CONTENT))])
    again.append([CONTENT[500:1000]])
    again.hash_up_to(len(CONTENT))
    assert again.frontier == len(CONTENT)
    assert again.matches_digest()
    again.discard()
    again.close()
