"""A sweep finds where account, index and files differ, says so, and corrects it."""

import asyncio
import os
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.storage import audit
from tests.storage.test_space import APP, KIB, Shop, opened

pytestmark = pytest.mark.usefixtures("small_batches")


@pytest.fixture
def small_batches(monkeypatch):
    """Make a round through a store of a dozen blobs take several batches."""
    monkeypatch.setattr(audit, "BATCH_SIZE", 8)
    monkeypatch.setattr(audit, "_SLICE_SIZE", 4)


@pytest.fixture
async def shop(tmp_path):
    async with opened(tmp_path / "store") as shop:
        for number in range(10):
            assert await shop.fetch((number + 1) * KIB)
        yield shop


async def sweep(shop: Shop) -> float:
    """Sweep often enough to go round; return how many differences have been counted so far."""
    for _ in range(4):
        await shop.space.sweep(max_idle=0, ingest_ttl=1000)
    return float(shop.metrics._drift._value.get())


async def test_nothing_is_found_where_nothing_is_wrong(shop):
    await shop.break_off(KIB)
    assert await sweep(shop) == 0
    assert shop.is_right()


async def test_a_row_without_a_file_is_forgotten(shop, capsys):
    blob = await shop.fetch(5 * KIB)
    await asyncio.to_thread(shop.store.delete, blob)
    assert await sweep(shop) == 1
    assert shop.index.blob(APP, blob) is None
    assert shop.is_right()
    assert "account_drift_found" in capsys.readouterr().out


async def test_a_file_of_another_size_is_forgotten(shop):
    blob = await shop.fetch(5 * KIB)
    os.truncate(shop.store.blob_path(blob), 17)
    assert await sweep(shop) == 1
    assert not shop.holds(blob)
    assert shop.is_right()


async def test_a_file_without_a_row_is_indexed(shop):
    content = os.urandom(9 * KIB)
    digest = Digest.from_content(content)
    await asyncio.to_thread(Path(shop.store.blob_path(digest)).write_bytes, content)
    assert not shop.is_right()
    assert await sweep(shop) == 1
    assert shop.index.blob_size(digest) == 9 * KIB
    assert shop.is_right()


async def test_totals_that_are_wrong_are_counted_anew(shop):
    shop.index._writer.execute("UPDATE totals SET blobs = blobs + 3, bytes = bytes - 4096")
    shop.index._writer.commit()
    await shop.index.flush()
    await shop.fetch(KIB)
    assert not shop.is_right()
    assert await sweep(shop) == 1
    assert shop.is_right()


async def test_an_ingest_that_nobody_counted_is_counted(shop):
    digest = Digest.from_content(b"coming")
    ingest = await asyncio.to_thread(shop.write, digest, bytes(100 * KIB))
    size = ingest.allocated_bytes()
    ingest.close()
    assert shop.space.reserved_bytes == 0
    assert await sweep(shop) == 1
    assert shop.space.reserved_bytes == size


async def test_an_ingest_that_is_being_written_is_no_difference(shop):
    digest = Digest.from_content(b"coming")
    reservation = await shop.space.resume_partial(digest)
    assert await shop.space.grow(reservation, 100 * KIB)
    ingest = await asyncio.to_thread(shop.write, digest, bytes(100 * KIB))
    assert await sweep(shop) == 0
    shop.space.keep_partial(reservation, ingest)
    ingest.close()
    assert await sweep(shop) == 0


async def test_sweeps_beside_commits_and_evictions_find_nothing(shop):
    async def fetch() -> None:
        for number in range(30):
            await shop.fetch((number % 9 + 1) * 100 * KIB)

    async def look() -> None:
        for _ in range(20):
            assert await sweep(shop) == 0

    await asyncio.gather(fetch(), fetch(), fetch(), look())
    assert shop.is_right()
