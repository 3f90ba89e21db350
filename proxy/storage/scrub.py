"""The scrub: reads every blob of the store once in a period, and removes those that are damaged.

A round reads the blobs in the order of their digests, each at a time that follows from its digest. So the
reads are spread over the period, the blob whose turn it is was not read for the longest time, and the last
digest is all that has to be remembered. Before that, a start reads what was written last, if the daemon did
not stop cleanly, and what was used last.

The reads have a thread of their own with idle I/O priority, a bounded rate, and bypass the page cache, which
keeps the content that clients request. Damaged blobs are removed and passed to a callback, which fetches
them anew.
"""

import asyncio
import errno
import fcntl
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from proxy.concurrency import run_in_thread, run_uncancelled, start_threads
from proxy.errors import StorageError
from proxy.log import get_logger
from proxy.metrics import Metrics, ScrubResult
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.storage.blobs import BlobStore, OpenBlob
from proxy.storage.index import Index
from proxy.storage.io_priority import set_idle_io_priority
from proxy.storage.space import SpaceManager

# Seconds between the start of the daemon and the first read: commands that start it for a moment read nothing.
START_DELAY = 10.0
# Seconds after which the clock, the configuration and the store are looked at again.
POLL_INTERVAL = 60.0
# Bytes read per second at most, and the bytes as which a blob counts in addition to its size.
MAX_READ_RATE = 32 << 20
BLOB_COST = 256 << 10
# The share of the period in which a round is done if nothing delays it.
ROUND_SHARE = 0.9
# A start first reads the blobs used last, and after an unclean stop the ones written in the last minutes
# before it. Both are bounded.
MAX_FIRST_BLOBS = 1024
MAX_FIRST_BYTES = 16 << 30
RECENT_SECONDS = 600.0
# Repositories that are asked for a damaged blob.
MAX_REPOSITORIES = 16

_CHUNK_SIZE = 1 << 20
_SAVE_INTERVAL = 10.0

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DamagedBlob:
    """A blob that was removed because it was damaged, and repositories that are linked to it."""

    digest: Digest
    is_manifest: bool
    repositories: Sequence[Repository]


@dataclass(frozen=True, slots=True)
class _ReadResult:
    """What reading a blob has shown. `inode` is that of its file, 0 if it has none."""

    result: ScrubResult
    inode: int
    reason: str = ""


class ScrubState(msgspec.Struct):
    """How far the scrub has come, as it is saved. Times are Unix time.

    The round began at `started_at` and has read the digests up to `cursor`; `damaged` counts what it has
    found. `finished_at` is the end of the last complete round, 0 if there was none. `is_unclean` is set
    after an unclean stop, until what was written before it has been read.
    """

    started_at: float
    cursor: str = ""
    damaged: int = 0
    finished_at: float = 0.0
    is_unclean: bool = False


class Scrubber:
    """Scrubs one store. `close` after `run` has ended."""

    def __init__(
        self,
        store: BlobStore,
        index: Index,
        space: SpaceManager,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.state = ScrubState(clock())
        self._path = store.root / "scrub.json"
        self._store = store
        self._index = index
        self._space = space
        self._metrics = metrics
        self._clock = clock
        self._due_at: float | None = None
        # The blobs that this start reads first, and how many of them were written before an unclean stop.
        self._first: deque[tuple[Digest, int]] | None = None
        self._written_left = 0
        self._saved_at = 0.0
        self._should_stop = threading.Event()
        self._executor = start_threads(1, "scrub")

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown()

    @property
    def progress(self) -> float:
        """The share of the blobs that this round has read."""
        return _position(self.state.cursor)

    @property
    def late_seconds(self) -> float:
        """How far the round is behind its schedule, in seconds."""
        return 0.0 if self._due_at is None else max(0.0, self._clock() - self._due_at)

    async def run(
        self, get_period: Callable[[], float], on_damaged: Callable[[DamagedBlob], None]
    ) -> None:
        """Scrub until cancelled. `get_period` returns the seconds of a round; 0 disables the scrub.

        Calls `on_damaged` for each blob that was removed.
        """
        await run_in_thread(self._executor, set_idle_io_priority)
        await run_in_thread(self._executor, self._load_state)
        try:
            await asyncio.sleep(START_DELAY)
            while True:
                try:
                    if not get_period():
                        self._due_at = None
                        await asyncio.sleep(POLL_INTERVAL)
                    elif self._first is None:
                        self._first = await self._choose_first()
                    elif self._first:
                        await self._check_first(self._first, on_damaged)
                    else:
                        await self._continue_round(get_period(), on_damaged)
                except StorageError as error:
                    log.warning("scrub_failed", reason=str(error))
                    await asyncio.sleep(POLL_INTERVAL)
                except Exception:
                    self._metrics.count_internal_error()
                    log.exception("scrub_crashed")
                    await asyncio.sleep(POLL_INTERVAL)
        finally:
            await run_uncancelled(run_in_thread(self._executor, self._save_state))

    async def _choose_first(self) -> deque[tuple[Digest, int]]:
        """Return what was written before an unclean stop, and after it what was used last."""
        used = await self._index.recently_used(MAX_FIRST_BLOBS)
        first: dict[tuple[Digest, int], None] = {}
        if self.state.is_unclean:
            written = await run_in_thread(self._executor, self._recently_written, used)
            first = dict.fromkeys(written)
        self._written_left = len(first)
        left = MAX_FIRST_BYTES
        for digest, size in used:
            left -= size
            if left >= 0:
                first[digest, size] = None
        return deque(first)

    async def _check_first(
        self, first: deque[tuple[Digest, int]], on_damaged: Callable[[DamagedBlob], None]
    ) -> None:
        """Read the next of the blobs that a start reads first."""
        await self._check(*first.popleft(), on_damaged)
        self._written_left -= 1
        self.state.is_unclean &= self._written_left > 0

    def _recently_written(self, blobs: Sequence[tuple[Digest, int]]) -> list[tuple[Digest, int]]:
        """Return the blobs of the last minutes before the newest one, the newest first. Blocks.

        A blob was used when it was written, so that `blobs`, the ones used last, contain them.
        """
        times = [(self._store.committed_at(digest) or 0.0, digest, size) for digest, size in blobs]
        newest = max((written_at for written_at, _, _ in times), default=0.0)
        recent = [one for one in times if one[0] >= newest - RECENT_SECONDS]
        recent.sort(key=lambda one: one[0], reverse=True)
        return [(digest, size) for _, digest, size in recent]

    async def _continue_round(
        self, period: float, on_damaged: Callable[[DamagedBlob], None]
    ) -> None:
        """Read the next blob of the round, or wait until it is due."""
        state, now = self.state, self._clock()
        # The clock was set back, or the daemon did not run for a long time: reading everything at once
        # would not be a scrub in the background.
        if not now - 2 * period < state.started_at <= now + period:
            state.started_at, state.cursor, state.damaged = now, "", 0
        following = self._index.blobs_after(state.cursor, 1)
        if not following:
            if state.cursor:
                next_start = max(now, state.started_at + period)
                self.state = ScrubState(next_start, finished_at=now, is_unclean=state.is_unclean)
            self._due_at = None
            await self._save_sometimes()
            await asyncio.sleep(POLL_INTERVAL)
            return
        ((digest, size),) = following
        self._due_at = state.started_at + ROUND_SHARE * period * _position(str(digest))
        if (wait := self._due_at - now) > 0:
            await asyncio.sleep(min(wait, POLL_INTERVAL))
            return
        await self._check(digest, size, on_damaged)
        state.cursor = str(digest)
        await self._save_sometimes()

    # One blob.

    async def _check(
        self, digest: Digest, size: int, on_damaged: Callable[[DamagedBlob], None]
    ) -> None:
        """Read a blob; remove it if it is damaged."""
        reading = asyncio.get_running_loop().run_in_executor(
            self._executor, self._read_and_pause, digest, size
        )
        found = await run_uncancelled(reading, on_cancel=self._should_stop.set)
        if self._index.blob_size(digest) != size:
            return  # evicted meanwhile
        if found.result in ("corrupt", "missing"):
            repositories = self._index.linked_repositories(digest, MAX_REPOSITORIES)
            is_manifest = self._index.manifest(digest) is not None
            is_pinned = self._index.is_pinned(digest)
            if not await self._space.remove_damaged(digest, found.inode):
                return  # a commit has replaced the file
            log.warning(
                "blob_corrupt",
                digest=str(digest),
                bytes=size,
                reason=found.reason,
                repositories=[f"{one.upstream}/{one.name}" for one in repositories],
                pinned=is_pinned,
            )
            self.state.damaged += 1
            on_damaged(DamagedBlob(digest, is_manifest, repositories))
        elif found.result == "unreadable":
            log.warning("blob_unreadable", digest=str(digest), reason=found.reason)
        self._metrics.count_scrubbed(found.result, size)

    def _read_and_pause(self, digest: Digest, size: int) -> _ReadResult:
        """Read a blob at the bounded rate, and wait until the next one may be read. Blocks."""
        began = time.monotonic()
        found = self._read(digest, size, began)
        self._pause_until(began + (size + BLOB_COST) / MAX_READ_RATE)
        return found

    def _read(self, digest: Digest, size: int, began: float) -> _ReadResult:
        try:
            opened = self._store.open(digest, size)
        except StorageError as error:
            return _ReadResult("unreadable", 0, str(error))
        self._store.keep_access(digest)
        if opened is None:
            # It may have another size, or be no file.
            return _ReadResult("missing", self._store.blob_inode(digest), "it has no whole file")
        with opened:
            inode = os.fstat(opened.fd).st_ino
            pause = partial(self._pause_for_bytes, began)
            try:
                if _matches(opened, digest, pause):
                    return _ReadResult("intact", inode)
            except OSError as error:
                is_damage = error.errno == errno.EIO and self._is_disk_working()
                result: ScrubResult = "corrupt" if is_damage else "unreadable"
                return _ReadResult(result, inode, error.strerror or "")
            return _ReadResult("corrupt", inode, "its content does not match its digest")

    def _is_disk_working(self) -> bool:
        """Tell whether the rest of the disk works: one that fails altogether must not empty the store."""
        try:
            self._store.check_writable()
        except StorageError:
            return False
        return True

    def _pause_for_bytes(self, began: float, count: int) -> bool:
        return self._pause_until(began + count / MAX_READ_RATE)

    def _pause_until(self, when: float) -> bool:
        """Wait until the time `when`; return whether to stop."""
        return self._should_stop.wait(max(0.0, when - time.monotonic()))

    # The state.

    async def _save_sometimes(self) -> None:
        now = time.monotonic()
        if now - self._saved_at > _SAVE_INTERVAL:
            self._saved_at = now
            await run_in_thread(self._executor, self._save_state)

    def _load_state(self) -> None:
        with suppress(OSError, msgspec.MsgspecError):
            self.state = msgspec.json.decode(self._path.read_bytes(), type=ScrubState)
        self.state.is_unclean |= self._store.was_unclean

    def _save_state(self) -> None:
        """Save the state. If that fails, the next start repeats a part of the round."""
        temporary = Path(f"{self._path}.new")
        with suppress(OSError):
            temporary.write_bytes(msgspec.json.encode(self.state))
            temporary.replace(self._path)


def _position(digest: str) -> float:
    """Return where a round comes to a digest, between 0 and 1."""
    if not digest.startswith("sha256:"):
        return 1.0 if digest else 0.0  # sha512 comes after all of sha256
    return int(digest[7:20], 16) / 16**13


def _matches(opened: OpenBlob, digest: Digest, pause: Callable[[int], bool]) -> bool:
    """Tell whether the content of a file matches its digest, reading past the page cache if possible.

    Calls `pause` with the number of bytes read; if that returns True, the rest is not read, and the
    content counts as matching. Raises `OSError`.
    """
    hasher, offset = digest.new_hasher(), 0
    is_direct = _set_direct(opened.fd, is_on=True)
    with mmap.mmap(-1, _CHUNK_SIZE) as buffer, memoryview(buffer) as view:
        while offset < opened.size:
            try:
                count = os.preadv(opened.fd, [view], offset)
            except OSError as error:
                if not (is_direct and error.errno == errno.EINVAL):
                    raise
                is_direct = not _set_direct(opened.fd, is_on=False)
                continue
            if not count:
                return False
            hasher.update(view[:count])
            if not is_direct:
                os.posix_fadvise(opened.fd, offset, count, os.POSIX_FADV_DONTNEED)
            offset += count
            if pause(offset):
                return True
    return digest.matches(hasher)


def _set_direct(fd: int, *, is_on: bool) -> bool:
    """Switch O_DIRECT; return whether the file system has accepted that."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if is_on else flags)
    except OSError:
        return False
    return True
