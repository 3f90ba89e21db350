"""The space of a store: within its limits, least recently used first, running work protected."""

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from proxy.errors import StorageError
from proxy.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.storage.blobs import BlobStore
from proxy.storage.commit import Committer
from proxy.storage.index import Index
from proxy.storage.ingest import STATE_FILE_SIZE, Ingest
from proxy.storage.space import Reservation, SpaceManager
from tests.fakes.clock import Clock
from tests.support.examples import scaled

APP = Repository("docker.io", "library/app")
CAP = 4 << 20
KIB = 1 << 10

_numbers = count()


@dataclass
class StoreRig:
    """A store with its account, and the steps of a download."""

    store: BlobStore
    index: Index
    space: SpaceManager
    metrics: Metrics
    committer: Committer
    executor: ThreadPoolExecutor
    clock: Clock

    async def fetch(self, size: int, repository: Repository | None = APP) -> Digest | None:
        """Store a new blob of `size` bytes as a download would; None if there is no space."""
        content = os.urandom(8) + bytes(size - 8)
        digest = Digest.from_content(content)
        reservation = await self.space.resume_partial(digest)
        if not await self.space.grow(reservation, size, limit=size):
            self.space.release(reservation)
            return None
        ingest = await asyncio.to_thread(self.write, digest, content)
        await self.committer.commit_ingest(ingest, reservation, repository)
        ingest.close()
        return digest

    def is_right(self) -> bool:
        """Whether the account, the index and the files agree."""
        counted = (self.space.blob_count, self.space.stored_bytes)
        names = list(self.store.root.glob("blobs/*/*"))
        return counted == self.index.totals[:2] == (len(names), self.on_disk("blobs/*/*"))

    def write(self, digest: Digest, content: bytes) -> Ingest:
        ingest = self.store.open_ingest(digest)
        ingest.append([content])
        return ingest

    async def break_off(self, size: int) -> Digest:
        """Leave an ingest of `size` bytes behind, as an interrupted download would."""
        digest = Digest.from_content(str(next(_numbers)).encode())
        reservation = await self.space.resume_partial(digest)
        assert await self.space.grow(reservation, size, limit=size)
        ingest = await asyncio.to_thread(self.write, digest, bytes(size))
        self.space.keep_partial(reservation, ingest)
        ingest.close()
        return digest

    async def partials(self) -> list[Digest]:
        return [left for left, _, _ in await asyncio.to_thread(self.store.list_ingests)]

    def holds(self, digest: Digest | None) -> bool:
        return digest is not None and Path(self.store.blob_path(digest)).exists()

    def on_disk(self, pattern: str = "**/*") -> int:
        """The disk use of the store, as `du` reports it."""
        files = [path for path in self.store.root.glob(pattern) if path.is_file()]
        return sum(path.stat().st_blocks * 512 for path in files)


@asynccontextmanager
async def open_rig(
    root: Path, *, cap: int = CAP, min_free: int = 0, group_access: bool = False
) -> AsyncIterator[StoreRig]:
    clock, metrics = Clock(), Metrics([], "0")
    store = await asyncio.to_thread(BlobStore, root, group_access=group_access)
    index = await asyncio.to_thread(Index, root / "index.sqlite", clock)
    try:
        space = SpaceManager(store, index, metrics, max_size=cap, min_free=min_free, clock=clock)
        await space.open()
        with ThreadPoolExecutor(2) as executor:
            committer = Committer(store, index, space, executor)
            yield StoreRig(store, index, space, metrics, committer, executor, clock)
    finally:
        await asyncio.to_thread(index.close)
        store.close()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[StoreRig]:
    async with open_rig(tmp_path / "store") as rig:
        yield rig


async def test_the_least_recently_used_blob_is_evicted_first(rig):
    first, second, third = [await rig.fetch(1000 * KIB) for _ in range(3)]
    assert all(map(rig.holds, (first, second, third)))
    assert first is not None
    rig.index.touch(first)
    fourth = await rig.fetch(1000 * KIB)
    assert [rig.holds(blob) for blob in (first, second, third, fourth)] == [
        True,
        False,
        True,
        True,
    ]
    assert second is not None
    assert rig.index.blob(APP, second) is None
    assert rig.space.blob_count == 3


async def test_content_that_cannot_fit_evicts_nothing(rig):
    held = await rig.fetch(1000 * KIB)
    assert not rig.space.fits(CAP)
    assert await rig.space.reserve(CAP) is None
    assert rig.holds(held)
    assert rig.space.reserved_bytes == 0


async def test_running_downloads_keep_their_reservations(rig):
    first = await rig.space.reserve(1500 * KIB)
    second = await rig.space.reserve(1500 * KIB)
    assert first is not None
    assert second is not None
    assert await rig.space.reserve(1500 * KIB) is None
    rig.space.release(first)
    third = await rig.space.reserve(1500 * KIB)
    assert third is not None
    for reservation in (second, third):
        rig.space.release(reservation)
    assert rig.space.reserved_bytes == 0


async def test_a_reservation_grows_by_eviction_and_stays_if_it_cannot_grow(rig):
    blob = await rig.fetch(2000 * KIB)
    reservation = await rig.space.reserve(KIB)
    assert reservation is not None
    assert await rig.space.grow(reservation, 3000 * KIB)
    assert not rig.holds(blob)
    assert not await rig.space.grow(reservation, CAP)
    assert reservation.size == 3000 * KIB
    rig.space.release(reservation)


async def test_interrupted_downloads_are_counted_and_evicted_before_blobs(rig):
    blob = await rig.fetch(1000 * KIB)
    await rig.break_off(1500 * KIB)
    assert rig.space.reserved_bytes == 1500 * KIB + STATE_FILE_SIZE
    assert rig.holds(await rig.fetch(1500 * KIB))
    assert rig.holds(blob)
    assert rig.space.reserved_bytes == 0
    assert await rig.partials() == []


async def test_an_interrupted_download_that_is_resumed_is_not_counted_twice(rig):
    digest = await rig.break_off(1500 * KIB)
    used = rig.space.used_bytes
    reservation = await rig.space.resume_partial(digest)
    assert reservation is not None
    assert rig.space.used_bytes == used
    assert await rig.space.grow(reservation, 3000 * KIB)
    assert await rig.partials() == [digest]
    rig.space.release(reservation)


async def test_a_smaller_limit_applies_from_the_start(tmp_path):
    async with open_rig(tmp_path / "store") as rig:
        blobs = [await rig.fetch(690 * KIB) for _ in range(4)]
    cap = 2200 * KIB
    async with open_rig(tmp_path / "store", cap=cap) as rig:
        assert [rig.holds(blob) for blob in blobs] == [False, False, True, True]
        assert rig.space.used_bytes <= cap


async def test_leftovers_of_a_killed_daemon_are_counted(tmp_path):
    async with open_rig(tmp_path / "store") as rig:
        await rig.break_off(1500 * KIB)
    async with open_rig(tmp_path / "store") as rig:
        assert rig.space.reserved_bytes >= 1500 * KIB


@pytest.mark.parametrize("state", [None, b""], ids=["missing", "empty"])
async def test_an_ingest_that_a_kill_left_without_a_state_is_removed(tmp_path, state):
    """Nothing of it can be resumed, and the account would count a state that takes no space."""
    async with open_rig(tmp_path / "store") as rig:
        digest = await rig.break_off(100 * KIB)
    path = tmp_path / "store" / "ingest" / f"sha256-{digest.hex}.state"
    path.unlink()
    if state is not None:
        path.write_bytes(state)
    async with open_rig(tmp_path / "store") as rig:
        assert rig.space.reserved_bytes == rig.on_disk("ingest/*") == 0


async def test_old_ingests_and_idle_blobs_are_removed_by_a_sweep(rig):
    old = await rig.fetch(KIB)
    rig.clock.advance(1000)
    new = await rig.fetch(KIB)
    left = await rig.break_off(KIB)
    path = rig.store.root / "ingest" / f"sha256-{left.hex}"
    os.utime(path, (rig.clock() - 500, rig.clock() - 500))
    await rig.space.sweep(max_idle=0, ingest_ttl=501)
    assert await rig.partials() == [left]
    assert rig.holds(old)
    await rig.space.sweep(max_idle=999, ingest_ttl=499)
    assert await rig.partials() == []
    assert (rig.holds(old), rig.holds(new)) == (False, True)
    assert rig.space.reserved_bytes == 0


async def test_a_damaged_blob_is_removed(rig):
    blob = await rig.fetch(1000 * KIB)
    before = rig.space.used_bytes
    await asyncio.to_thread(Path(rig.store.blob_path(blob)).write_bytes, bytes(1000 * KIB))
    await rig.space.remove_corrupt(blob)
    assert not rig.holds(blob)
    assert rig.index.blob(APP, blob) is None
    assert rig.space.used_bytes < before


async def test_min_free_is_left_on_the_disk(tiny_disk: Callable[[int], Path]):
    disk = tiny_disk(6 << 20)
    async with open_rig(disk / "store", cap=1 << 30, min_free=2 << 20) as rig:
        blobs = [await rig.fetch(1000 * KIB) for _ in range(5)]
        assert await asyncio.to_thread(rig.store.free_bytes) >= 2 << 20
        assert [rig.holds(blob) for blob in blobs] == [False, False, True, True, True]
        assert await rig.space.reserve(5 << 20) is None


async def test_evictions_work_on_a_full_disk(tiny_disk: Callable[[int], Path]):
    disk = tiny_disk(4 << 20)
    async with open_rig(disk / "store", cap=1 << 30) as rig:
        blobs = [await rig.fetch(700 * KIB) for _ in range(3)]
        filler = disk / "filler"
        filler.write_bytes(bytes(await asyncio.to_thread(rig.store.free_bytes)))
        reservation = await rig.space.reserve(600 * KIB)
        assert reservation is not None
        assert not rig.holds(blobs[0])
        assert rig.holds(blobs[2])
        rig.space.release(reservation)
        filler.unlink()
        in_store = sum(rig.holds(blob) for blob in blobs)
        assert rig.space.blob_count == in_store


steps = st.lists(
    st.tuples(
        st.sampled_from(["fetch", "fetch", "hold", "release", "break off", "touch"]),
        st.integers(8, 1600 * KIB),
    ),
    max_size=15,
)


@settings(max_examples=scaled(25), deadline=None)
@given(steps=steps)
async def test_whatever_happens_the_disk_use_stays_within_the_limit(tmp_path_factory, steps):
    async with open_rig(tmp_path_factory.mktemp("rig") / "store") as rig:
        held: list[Reservation] = []
        blobs: list[Digest] = []
        for what, size in steps:
            if what == "fetch" and (blob := await rig.fetch(size)):
                blobs.append(blob)
            elif what == "hold" and (reservation := await rig.space.reserve(size)):
                held.append(reservation)
            elif what == "release" and held:
                rig.space.release(held.pop())
            elif what == "break off" and rig.space.fits(size + sum(one.size for one in held)):
                await rig.break_off(size)
            elif what == "touch" and blobs:
                rig.index.touch(blobs[size % len(blobs)])
            promised = sum(one.size for one in held)
            assert rig.on_disk() + promised <= CAP
            assert rig.space.used_bytes <= CAP


async def test_the_account_survives_an_index_that_cannot_be_written_for_a_while(rig):
    for _ in range(3):
        await rig.fetch(1000 * KIB)
    blocker = sqlite3.connect(rig.index.path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    for _ in range(2):
        reservation = await rig.space.reserve(1500 * KIB)
        if reservation is not None:
            rig.space.release(reservation)
    blocker.execute("ROLLBACK")
    blocker.close()
    for _ in range(6):
        await rig.fetch(1000 * KIB)
        assert rig.on_disk() <= CAP
    assert rig.space.blob_count == len(list((rig.store.root / "blobs" / "sha256").iterdir()))


async def test_an_uncounted_commit_is_counted_at_the_next_start_or_the_one_after(
    tmp_path, monkeypatch
):
    root = tmp_path / "store"
    async with open_rig(root) as rig:
        assert await rig.fetch(KIB)
        digest = Digest.from_content(bytes(100 * KIB))

        def commit() -> None:
            ingest = rig.store.open_ingest(digest)
            ingest.append([bytes(100 * KIB)])
            ingest.commit()
            ingest.close()

        await asyncio.to_thread(commit)

    async def broken(*_: object) -> None:
        raise StorageError("the index cannot be written: the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Index, "add_unlinked_blobs", broken)
        with pytest.raises(StorageError, match="the disk is full"):
            async with open_rig(root):
                pass
    for _ in range(2):
        async with open_rig(root) as rig:
            assert rig.space.stored_bytes == rig.on_disk("blobs/*/*") > 100 * KIB
            assert not await asyncio.to_thread(rig.store.list_committed_ingests)
