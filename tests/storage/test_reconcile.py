"""A sweep finds, reports and corrects differences between account, index and files."""

import asyncio
import os
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.storage import reconcile
from tests.storage.test_space import APP, KIB, StoreRig, open_rig

pytestmark = pytest.mark.usefixtures("small_batches")


@pytest.fixture
def small_batches(monkeypatch):
    """Let a round through a store of a dozen blobs take several batches."""
    monkeypatch.setattr(reconcile, "BATCH_SIZE", 8)
    monkeypatch.setattr(reconcile, "_SLICE_SIZE", 4)


@pytest.fixture
async def rig(tmp_path):
    async with open_rig(tmp_path / "store") as rig:
        for number in range(10):
            assert await rig.fetch((number + 1) * KIB)
        await sweep(rig)  # the first round repairs differences left by a kill, and counts none
        yield rig


async def sweep(rig: StoreRig) -> float:
    """Sweep until a round is complete; return the number of differences counted so far."""
    for _ in range(4):
        await rig.space.sweep(max_idle=0, ingest_ttl=1000)
    return float(rig.metrics._drift._value.get())


async def test_an_intact_store_has_no_differences(rig):
    await rig.break_off(KIB)
    assert await sweep(rig) == 0
    assert rig.is_right()


async def test_a_row_without_a_file_is_removed(rig, capsys):
    blob = await rig.fetch(5 * KIB)
    await asyncio.to_thread(rig.store.delete, blob)
    assert await sweep(rig) == 1
    assert rig.index.blob(APP, blob) is None
    assert rig.is_right()
    assert "account_drift_found" in capsys.readouterr().out


async def test_a_blob_whose_file_has_another_size_is_removed(rig):
    blob = await rig.fetch(5 * KIB)
    os.truncate(rig.store.blob_path(blob), 17)
    assert await sweep(rig) == 1
    assert not rig.holds(blob)
    assert rig.is_right()


async def test_a_file_without_a_row_is_indexed(rig):
    content = os.urandom(9 * KIB)
    digest = Digest.from_content(content)
    await asyncio.to_thread(Path(rig.store.blob_path(digest)).write_bytes, content)
    assert not rig.is_right()
    assert await sweep(rig) == 1
    assert rig.index.blob_size(digest) == 9 * KIB
    assert rig.is_right()


async def test_wrong_totals_are_recounted(rig):
    rig.index._writer.execute("UPDATE totals SET blobs = blobs + 3, bytes = bytes - 4096")
    rig.index._writer.commit()
    await rig.index.flush()
    await rig.fetch(KIB)
    assert not rig.is_right()
    assert await sweep(rig) == 1
    assert rig.is_right()


async def test_an_uncounted_ingest_is_counted(rig):
    digest = Digest.from_content(b"coming")
    ingest = await asyncio.to_thread(rig.write, digest, bytes(100 * KIB))
    size = ingest.allocated_bytes()
    ingest.close()
    assert rig.space.reserved_bytes == 0
    assert await sweep(rig) == 1
    assert rig.space.reserved_bytes == size


async def test_a_running_ingest_is_not_a_difference(rig):
    digest = Digest.from_content(b"coming")
    reservation = await rig.space.resume_partial(digest)
    assert await rig.space.grow(reservation, 100 * KIB)
    ingest = await asyncio.to_thread(rig.write, digest, bytes(100 * KIB))
    assert await sweep(rig) == 0
    rig.space.keep_partial(reservation, ingest)
    ingest.close()
    assert await sweep(rig) == 0


async def test_sweeps_during_commits_and_evictions_find_no_difference(rig):
    async def fetch() -> None:
        for number in range(30):
            await rig.fetch((number % 9 + 1) * 100 * KIB)

    async def look() -> None:
        for _ in range(20):
            assert await sweep(rig) == 0

    await asyncio.gather(fetch(), fetch(), fetch(), look())
    assert rig.is_right()


async def test_after_a_kill_during_an_eviction_the_row_is_removed(tmp_path):
    async with open_rig(tmp_path / "store") as rig:
        blob = await rig.fetch(5 * KIB)
        assert blob
        assert await rig.fetch(5 * KIB)
        await asyncio.to_thread(rig.store.delete, blob)
    async with open_rig(tmp_path / "store") as rig:
        assert await sweep(rig) == 0
        assert rig.index.blob(APP, blob) is None
        assert rig.is_right()
        metrics = await asyncio.to_thread(rig.metrics.render)
        assert b'evictions_total{reason="corrupt"} 0.0' in metrics
