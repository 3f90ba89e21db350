"""The scrub reads all blobs in its period, the right ones first, and removes what is damaged."""

import asyncio
import ctypes
import errno
import mmap
import os
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.concurrency import background
from proxy.errors import StorageError
from proxy.oci.digest import Digest
from proxy.storage import scrub
from proxy.storage.blobs import BlobStore
from proxy.storage.io_priority import set_idle_io_priority
from proxy.storage.scrub import DamagedBlob, Scrubber
from tests.storage.test_space import APP, KIB, StoreRig, open_rig

DAY = 86400.0
PERIOD = 30 * DAY


class ScrubRig:
    """A store with a scrub whose reads are recorded."""

    def __init__(self, rig: StoreRig) -> None:
        self.store = rig
        self.period = PERIOD
        self.damaged: list[DamagedBlob] = []
        self.read: list[Digest] = []
        self.scrubber = Scrubber(rig.store, rig.index, rig.space, rig.metrics, rig.clock)

    async def count(self, result: str) -> int:
        """Return how many blobs were counted with a result."""
        text = (await asyncio.to_thread(self.store.metrics.render)).decode()
        (number,) = re.findall(rf'scrubbed_blobs_total{{result="{result}"}} (\d+)', text)
        return int(number)

    async def wait_for_reads(self, number: int) -> None:
        await wait_until(lambda: len(self.read) >= number)


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "START_DELAY", 0.0)
    monkeypatch.setattr(scrub, "POLL_INTERVAL", 0.01)
    monkeypatch.setattr(scrub, "MAX_READ_RATE", 1 << 40)


@asynccontextmanager
async def scrubbing(rig: StoreRig, period: float = PERIOD) -> AsyncIterator[ScrubRig]:
    """Run a scrub of the store for the block."""
    running = ScrubRig(rig)
    running.period = period
    read = running.scrubber._read

    def record(digest: Digest, size: int, began: float) -> object:
        running.read.append(digest)
        return read(digest, size, began)

    running.scrubber._read = record  # type: ignore[method-assign,assignment]
    work = running.scrubber.run(lambda: running.period, running.damaged.append)
    async with background(work) as task:
        yield running
    assert task.cancelled(), task.exception()
    await asyncio.to_thread(running.scrubber.close)


async def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 (a test looks from outside)
        await asyncio.sleep(0.005)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[StoreRig]:
    async with open_rig(tmp_path / "store", cap=64 << 20) as rig:
        yield rig


async def fill(rig: StoreRig, count: int, size: int = 3 * KIB) -> list[Digest]:
    blobs = [await rig.fetch(size + number) for number in range(count)]
    return [blob for blob in blobs if blob is not None]


def flip(rig: StoreRig, digest: Digest, offset: int = 100) -> None:
    with Path(rig.store.blob_path(digest)).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


async def first_check_done(running: ScrubRig, number: int) -> None:
    """Wait until what is read first after a start has been read, and forget it."""
    await running.wait_for_reads(number)
    running.read.clear()


async def test_in_a_period_each_blob_is_read_once_and_the_reads_are_spread_over_it(rig):
    blobs = await fill(rig, 40)
    async with scrubbing(rig) as running:
        await first_check_done(running, 40)
        counts = []
        for _ in range(30):
            rig.clock.advance(DAY)
            await asyncio.sleep(0.05)
            counts.append(len(running.read))
        assert sorted(running.read, key=str) == sorted(blobs, key=str)
        # Digests are random: about 44 of 40 blobs a month, not all at once.
        assert 5 <= counts[9] <= 25
        assert counts[26] == 40
        assert running.scrubber.late_seconds == 0
        for _ in range(30):
            rig.clock.advance(DAY)
            await asyncio.sleep(0.02)
        await running.wait_for_reads(80)
        assert running.read[:40] == running.read[40:]


async def test_the_scrub_restores_the_access_of_the_group(tmp_path):
    async with open_rig(tmp_path / "store", cap=64 << 20, group_access=True) as rig:
        (digest,) = await fill(rig, 1)
        fd = os.open(rig.store.blob_path(digest), os.O_RDONLY)
        os.fchmod(fd, 0o600)
        async with scrubbing(rig) as running:
            await first_check_done(running, 1)
        assert os.fstat(fd).st_mode & 0o777 == 0o640
        os.close(fd)


async def test_a_restart_continues_where_the_scrub_was(tmp_path):
    async with open_rig(tmp_path / "store", cap=64 << 20) as rig:
        blobs = await fill(rig, 20)
        async with scrubbing(rig) as running:
            await first_check_done(running, 20)
            rig.clock.advance(15 * DAY)
            await running.wait_for_reads(5)
            await asyncio.sleep(0.1)
            before = list(running.read)
        now = rig.clock()
    assert 5 <= len(before) < 20
    async with open_rig(tmp_path / "store", cap=64 << 20) as rig:
        rig.clock.advance(now - rig.clock())
        async with scrubbing(rig) as running:
            await first_check_done(running, 20)
            assert 0.2 < running.scrubber.progress < 0.9
            rig.clock.advance(15 * DAY)
            await running.wait_for_reads(20 - len(before))
            await asyncio.sleep(0.1)
            assert {*before, *running.read} == {*blobs}
            # The blob that was being read at the stop is read once more.
            assert len(before) + len(running.read) <= 21


async def test_after_a_standstill_the_scrub_is_late_and_catches_up(rig, monkeypatch):
    blobs = await fill(rig, 20)
    async with scrubbing(rig) as running:
        while await running.count("intact") < 20:
            pass
        monkeypatch.setattr(scrub, "MAX_READ_RATE", 1)
        rig.clock.advance(29 * DAY)
        await wait_until(lambda: running.scrubber.late_seconds > 20 * DAY)
    monkeypatch.setattr(scrub, "MAX_READ_RATE", 1 << 40)
    async with scrubbing(rig) as running:
        await wait_until(lambda: running.scrubber.state.finished_at > 0)
        assert running.scrubber.late_seconds == 0
        assert {*running.read[20:]} <= {*blobs}
        assert len(running.read) >= 20 + 18


async def test_after_a_start_what_was_used_last_is_read_first(rig, monkeypatch):
    blobs = await fill(rig, 20)
    monkeypatch.setattr(scrub, "MAX_FIRST_BLOBS", 5)
    order = [blobs[n] for n in (3, 11, 7, 0, 19)]
    for digest in reversed(order):
        rig.index.touch(digest)
    await rig.index.flush()
    async with scrubbing(rig) as running:
        await running.wait_for_reads(5)
        await asyncio.sleep(0.05)
        assert running.read == order


async def test_a_start_reads_a_bounded_number_of_bytes_first(rig, monkeypatch):
    await fill(rig, 10, size=100 * KIB)
    monkeypatch.setattr(scrub, "MAX_FIRST_BYTES", 350 * KIB)
    async with scrubbing(rig) as running:
        await running.wait_for_reads(3)
        await asyncio.sleep(0.05)
        assert len(running.read) == 3


async def test_after_a_kill_what_was_written_last_is_read_first(tmp_path):
    root = tmp_path / "store"
    async with open_rig(root, cap=64 << 20) as rig:
        old = await fill(rig, 5)
        for digest in old:
            os.utime(rig.store.blob_path(digest), (1e9, 1e9))
        new = await fill(rig, 5)
        for age, digest in enumerate(new):
            os.utime(rig.store.blob_path(digest), (2e9 - age, 2e9 - age))
        for digest in old:
            rig.index.touch(digest)
        await rig.index.flush()
    # The lock of a killed daemon still holds its process ID.
    (root / "lock").write_text("12345\n")
    async with open_rig(root, cap=64 << 20) as rig, scrubbing(rig) as running:
        assert rig.store.was_unclean
        await running.wait_for_reads(10)
        assert running.read[:5] == new
        assert running.read[5:10] == list(reversed(old))


async def test_what_a_kill_makes_due_stays_due_until_it_has_been_read(tmp_path, monkeypatch):
    root = tmp_path / "store"
    async with open_rig(root, cap=64 << 20) as rig:
        await fill(rig, 3)
    (root / "lock").write_text("12345\n")
    monkeypatch.setattr(scrub, "START_DELAY", 1000.0)
    async with open_rig(root, cap=64 << 20) as rig, scrubbing(rig):
        await asyncio.sleep(0.05)
    monkeypatch.setattr(scrub, "START_DELAY", 0.0)
    async with open_rig(root, cap=64 << 20) as rig, scrubbing(rig) as running:
        assert not rig.store.was_unclean
        await running.wait_for_reads(3)
        await asyncio.sleep(0.05)
        assert not running.scrubber.state.is_unclean


def test_a_process_that_was_killed_is_noticed_and_one_that_ended_is_not(tmp_path):
    code = (
        "import sys; from pathlib import Path; from proxy.storage.blobs import BlobStore\n"
        "store = BlobStore(Path(sys.argv[1])); print(store.was_unclean, flush=True); sys.stdin.read()"
        "; store.close()"
    )
    said = []
    for is_killed in (False, True, False, False):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "store")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            said.append(process.stdout.readline().strip())
            if is_killed:
                process.kill()
            process.stdin.close()
    assert said == ["False", "False", "True", "False"]


async def test_a_damaged_blob_is_removed_reported_and_counted(rig):
    blobs = await fill(rig, 4, size=3 << 20)
    flip(rig, blobs[1], offset=(3 << 20) - 1)
    flip(rig, blobs[2], offset=0)
    async with scrubbing(rig) as running:
        while await running.count("intact") + await running.count("corrupt") < 4:
            pass
        assert {one.digest for one in running.damaged} == {blobs[1], blobs[2]}
        assert {one.repositories[0] for one in running.damaged} == {APP}
        assert not any(one.is_manifest for one in running.damaged)
        assert [rig.holds(blob) for blob in blobs] == [True, False, False, True]
        assert rig.is_right()
        assert running.scrubber.state.damaged == 2
        assert await running.count("corrupt") == 2
        metrics = (await asyncio.to_thread(rig.metrics.render)).decode()
        assert 'pullcache_evictions_total{reason="corrupt"} 2.0' in metrics


@pytest.mark.parametrize("how", ["truncated", "gone", "symlink", "longer"])
async def test_a_file_that_is_not_the_blob_counts_as_damage(rig, how):
    (digest,) = await fill(rig, 1)
    spoil(Path(rig.store.blob_path(digest)), how)
    async with scrubbing(rig) as running:
        await wait_until(lambda: bool(running.damaged))
        assert running.damaged[0].digest == digest
        assert rig.index.blob_size(digest) is None


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(content[:-1])
    elif how == "longer":
        path.write_bytes(content + b"x")
    elif how == "symlink":
        elsewhere = path.with_name("elsewhere")
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)


async def test_a_file_without_permission_stays(rig, monkeypatch):
    (digest,) = await fill(rig, 1)

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)  # root may read everything
        async with scrubbing(rig) as running:
            while not await running.count("unreadable"):
                pass
    assert running.damaged == []
    assert rig.holds(digest)


@pytest.mark.parametrize("is_disk_working", [True, False])
async def test_a_bad_sector_is_damage_and_a_failing_disk_is_not(rig, monkeypatch, is_disk_working):
    blobs = await fill(rig, 3)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def fail_altogether(_: BlobStore) -> None:
        raise StorageError("the store cannot be written: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        if not is_disk_working:
            patch.setattr(BlobStore, "check_writable", fail_altogether)
        async with scrubbing(rig) as running:
            while await running.count("corrupt" if is_disk_working else "unreadable") < 3:
                pass
    assert len(running.damaged) == (3 if is_disk_working else 0)
    assert [rig.holds(blob) for blob in blobs] == [not is_disk_working] * 3


async def test_a_blob_that_a_commit_replaces_meanwhile_stays(rig):
    (digest,) = await fill(rig, 1)
    content = await asyncio.to_thread(rig.store.read_sync, digest, 3 * KIB)
    assert content is not None
    flip(rig, digest)
    inode = rig.store.blob_inode(digest)
    await asyncio.to_thread(rig.store.commit_bytes, digest, content)
    assert not await rig.space.remove_damaged(digest, inode)
    assert rig.holds(digest)


async def test_an_eviction_during_a_read_is_no_damage(rig):
    (digest,) = await fill(rig, 1)
    async with scrubbing(rig, period=0) as running:
        read = running.scrubber._read
        evicted = asyncio.Event()
        loop = asyncio.get_running_loop()
        go_on = threading.Event()

        def slow(*args: object) -> object:
            result = read(*args)  # type: ignore[arg-type]
            loop.call_soon_threadsafe(evicted.set)
            go_on.wait()
            return result

        running.scrubber._read = slow  # type: ignore[method-assign,assignment]
        running.period = PERIOD
        await evicted.wait()
        assert await rig.space._remove([digest], "size")
        go_on.set()
        await asyncio.sleep(0.05)
        assert running.damaged == []


async def test_no_blob_is_read_while_the_scrub_is_off(rig):
    await fill(rig, 5)
    async with scrubbing(rig, period=0) as running:
        await asyncio.sleep(0.1)
        assert running.read == []
        assert running.scrubber.late_seconds == 0
        running.period = PERIOD
        await running.wait_for_reads(5)


async def test_switching_the_scrub_off_stops_it_after_the_blob_it_reads(rig):
    await fill(rig, 20)
    async with scrubbing(rig, period=0) as running:
        read = running.scrubber._read

        def read_and_switch_off(*arguments: Any) -> Any:
            running.period = 0
            return read(*arguments)

        running.scrubber._read = read_and_switch_off  # type: ignore[method-assign,assignment]
        for number in range(1, 4):
            running.period = PERIOD
            await running.wait_for_reads(number)
            await asyncio.sleep(0.05)
            assert len(running.read) == number


async def test_the_scrub_survives_an_index_that_fails(rig, monkeypatch):
    blobs = await fill(rig, 3)
    flip(rig, blobs[0])
    connections = (rig.index._reader, rig.index._writer)
    for connection in connections:
        connection.set_authorizer(lambda *_: sqlite3.SQLITE_DENY)
    async with scrubbing(rig) as running:
        await asyncio.sleep(0.1)
        assert running.read == []
        for connection in connections:
            connection.set_authorizer(None)
        await wait_until(lambda: bool(running.damaged))
    assert [one.digest for one in running.damaged] == [blobs[0]]


async def test_a_stop_does_not_wait_for_a_large_blob(rig, monkeypatch):
    await fill(rig, 1, size=8 << 20)
    monkeypatch.setattr(scrub, "MAX_READ_RATE", 1)  # 97 days for this blob
    async with scrubbing(rig) as running:
        await running.wait_for_reads(1)


async def test_the_reads_leave_the_page_cache_as_it_was(rig):
    cold, warm = await fill(rig, 2, size=8 << 20)
    if not is_direct_possible(rig.store.blob_path(cold)):
        pytest.skip(
            "this file system (tmpfs, for example) lacks O_DIRECT, without which the scrub uses the page cache"
        )
    before = [
        await asyncio.to_thread(cached_pages, rig.store.blob_path(digest), is_dropped=is_dropped)
        for digest, is_dropped in ((cold, True), (warm, False))
    ]
    assert before[0] < 100
    assert before[1] > 2000
    async with scrubbing(rig) as running:
        while await running.count("intact") < 2:
            pass
    after = [
        await asyncio.to_thread(cached_pages, rig.store.blob_path(digest))
        for digest in (cold, warm)
    ]
    assert after == before


def is_direct_possible(path: str) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return scrub._set_direct(fd, is_on=True)
    finally:
        os.close(fd)


def cached_pages(path: str, *, is_dropped: bool = False) -> int:
    """Return how many pages of a file are in the page cache, after dropping them if requested."""
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if is_dropped:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
            start = ctypes.c_char.from_buffer(mapped)
            pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
            address = ctypes.c_void_p(ctypes.addressof(start))
            assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(size), pages) == 0
            del start
    return sum(page & 1 for page in pages)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
async def test_blobs_of_any_size_are_read_rightly(rig, size):
    content = os.urandom(size)
    digest = Digest.from_content(content)
    await asyncio.to_thread(rig.store.commit_bytes, digest, content)
    await rig.index.add_blob(APP, digest, size)
    async with scrubbing(rig) as running:
        while not await running.count("intact"):
            pass
        assert running.damaged == []
        assert rig.holds(digest)


def test_the_thread_gets_idle_io_priority_where_the_system_allows_it():
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(set_idle_io_priority()))
    thread.start()
    thread.join()
    assert found[0] in (True, False)


def test_a_filter_of_system_calls_does_not_stop_the_scrub(tmp_path):
    """As systemd's SystemCallFilter= does, a filter lets ioprio_set fail with EPERM."""
    code = """
import ctypes, struct, sys
from proxy.storage.io_priority import set_idle_io_priority, _SYSCALL_NUMBERS
import platform
number = _SYSCALL_NUMBERS[platform.machine()]
# BPF: load the number of the system call; if it is ioprio_set return EPERM, else allow.
program = b"".join(struct.pack("HBBI", *one) for one in (
    (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)))
buffer = ctypes.create_string_buffer(program)
class SocketFilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
argument = SocketFilterProgram(4, ctypes.addressof(buffer))
assert libc.prctl(22, 2, ctypes.byref(argument), 0, 0) == 0, ctypes.get_errno()
print(set_idle_io_priority())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr
