"""One fetch, many readers.

A download belongs to the cache, not to the request that caused it: it goes on when that client
leaves. It appends what arrives to an ingest, and readers follow the *frontier*, the length of what
is written and hashed, each at its own pace. The last byte is withheld until the digest is right,
so nobody ever holds a complete blob that was not verified.

Where there is no room, or the disk fails, the download *detaches*: its readers keep what they
have and fetch the rest from upstream, each for itself, under the same rule.
"""

import asyncio
import random
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager
from copy import copy
from dataclasses import dataclass

from proxy.cache.arrivals import Arrivals
from proxy.cache.eviction import Reservation, Space
from proxy.errors import (
    DigestMismatchError,
    NoSpaceError,
    OfflineError,
    ProxyError,
    RateLimitedError,
    StorageError,
    UnknownBlobError,
    UnsatisfiableRangeError,
    UpstreamDownError,
    UpstreamError,
    UpstreamUnavailableError,
)
from proxy.flight import in_thread, to_the_end
from proxy.log import get_logger
from proxy.metrics import DownloadResult, Metrics, UncachedReason
from proxy.oci.digest import Digest
from proxy.storage.index import Index
from proxy.storage.ingest import Ingest
from proxy.storage.local import LocalStore
from proxy.storage.tables import Repository
from proxy.upstream import retry
from proxy.upstream.client import Transfer, Upstream

# Room is taken in steps of this size where upstream does not say how long a blob is.
STEP = 16 << 20
# Less than this is no progress: a drip must not make a download last for ever.
PROGRESS = 16 << 10
# Upstream is waited for no longer than this at a time, whatever it asks for, in seconds.
MAX_WAIT = 60.0

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Tools:
    """What every download works with."""

    store: LocalStore
    index: Index
    space: Space
    metrics: Metrics
    threads: Executor
    slots: asyncio.Semaphore
    attempts: int


class Detached(Exception):  # noqa: N818 (it is no error: the reader goes on by itself)
    """The rest is not to be had from the file: go on with `Download.pass_through`."""


class Download:
    """The fetch of one blob under one repository. `run` is its task; everything else reads.

    `size` is None until upstream says it; `error` is what ended a download that failed; `is_detached`
    says that the blob is not being stored.
    """

    def __init__(
        self, tools: Tools, upstream: Upstream, repository: Repository, digest: Digest
    ) -> None:
        self.repository = repository
        self.digest = digest
        self.size: int | None = None
        self.error: ProxyError | None = None
        self._tools = tools
        self._upstream = upstream
        self._changed = asyncio.Event()
        self._ingest: Ingest | None = None
        self._reservation: Reservation | None = None
        self._frontier = 0
        self._is_verified = False
        self.is_detached = False
        self._is_running = True
        self._readers = 0

    # For readers.

    def acquire(self) -> None:
        """Count a reader: the file stays open until it calls `release`."""
        self._readers += 1

    def release(self) -> None:
        """Count a reader less."""
        self._readers -= 1
        self._close_if_unused()

    @property
    def fd(self) -> int:
        """The file that grows, once `available` has returned, for a reader that was counted."""
        assert self._ingest is not None
        return self._ingest.fd

    async def available(self, offset: int) -> int:
        """Return how far the file may be read, more than `offset`; `offset` itself at the end.

        Raises what ended the download, and `Detached`.
        """
        while True:
            if self._is_verified or self.is_detached:
                limit = self._frontier
            else:
                limit = min(
                    self._frontier, (self._frontier if self.size is None else self.size) - 1
                )
            if limit > offset or self._is_verified:
                return max(limit, offset)
            if self.error:
                # Each reader raises its own: tracebacks and contexts are not for sharing.
                raise copy(self.error)
            if self.is_detached:
                raise Detached
            await self._changed.wait()

    async def pass_through(self, start: int, stop: int | None) -> AsyncIterator[bytes]:
        """Yield the bytes from `start` up to `stop` (None: the end), fetched for this reader alone.

        The blob's last byte comes only when the digest is right. `size` is known after the first
        chunk, if ever. Raises `DigestMismatchError` and `UpstreamError`.
        """
        hasher = self._ingest.hasher() if self._ingest else self.digest.hasher()
        position, held = self._frontier, b""
        async with self._open_blob(position) as transfer:
            self.size = transfer.size if self.size is None else self.size
            is_tail = stop is None or stop == self.size
            end = sys.maxsize if stop is None else stop
            async for chunk in self._arriving(transfer, position):
                # One chunk is what one read of a socket gave: hashing it holds up nobody for long.
                hasher.update(chunk)
                piece = chunk[max(0, start - position) :]
                position += len(chunk)
                if not is_tail and position >= end:
                    yield piece[: len(piece) - (position - end)]
                    return
                if piece:
                    yield held + piece[: -1 if is_tail else None]
                    held = piece[-1:] if is_tail else b""
        if not self.digest.matches(hasher):
            raise self._mismatch()
        yield held

    # The fetch.

    async def run(self) -> None:
        """Fetch, verify and commit. What goes wrong is `error` afterwards; nothing is raised."""
        result: DownloadResult = "failed"
        ended: ProxyError | None = UpstreamUnavailableError("the cache is shutting down; try again")
        try:
            async with self._tools.slots:
                await self._fill()
                is_stored = self._is_verified and await to_the_end(self._commit())
            result, ended = "stored" if is_stored else "bypass", None
        except ProxyError as error:
            result = "mismatch" if isinstance(error, DigestMismatchError) else "failed"
            ended = error
        except Exception:
            ended = StorageError("the cache failed inside; its log says how")
            self._tools.metrics.bug()
            log.exception("download_crashed", digest=str(self.digest))
        finally:
            self._tools.metrics.download(result)
            try:
                await self._settle(is_worth_keeping=result == "failed" and self._frontier > 0)
            finally:
                # Told last: whoever hears of it may begin anew at once, with the same files.
                self.error = ended
                self._wake()

    async def _fill(self) -> None:
        """Get all bytes into the ingest, over as many transfers as it takes, or detach."""
        try:
            await self._open()
            while not self._is_verified:
                await self._transfer_patiently()
        except StorageError as error:
            self._detach(error)

    async def _open(self) -> None:
        """Open the ingest, and take over what an earlier one has left."""
        tools = self._tools
        self._reservation = await tools.space.adopt(self.digest)
        if self._reservation is None:
            raise NoSpaceError("no room can be made")
        self._ingest = tools.store.open_ingest(self.digest)
        await in_thread(tools.threads, self._ingest.resume)
        if self._ingest.resumed:
            await self._reserve_for(self._ingest.frontier)
            if self._ingest.is_right():
                # The whole blob: it was only the commit that was missing.
                self.size = self._ingest.frontier
            self._advance()
            log.info("resumed", digest=str(self.digest), offset=self._frontier)

    async def _transfer_patiently(self) -> None:
        """Make transfers until one succeeds; wait between them; give up when none brings progress."""
        pauses: Iterator[float] = iter(())
        reached = -PROGRESS
        while True:
            try:
                return await self._transfer()
            except UnsatisfiableRangeError as error:
                raise self._mismatch() from error
            except (UpstreamError, UnknownBlobError) as error:
                if self._frontier >= reached + PROGRESS:
                    # Progress makes a download worth as many attempts as a new one.
                    pauses = retry.delays(self._tools.attempts, iter(random.random, None))
                    reached = self._frontier
                # Before the first byte upstream's no is an answer. Later it is a broken transfer, for
                # instance a signed URL that has expired.
                is_no = not isinstance(error, UpstreamUnavailableError) or isinstance(
                    error, UpstreamDownError
                )
                is_final = isinstance(error, OfflineError) or (is_no and not self._frontier)
                pause = next(pauses, None)
                if pause is None or is_final:
                    raise
                if isinstance(error, (UpstreamDownError, RateLimitedError)):
                    pause = max(pause, min(error.retry_after, MAX_WAIT))
                self._tools.metrics.upstream_retry(self._upstream.name, "transfer")
                log.info("retrying", digest=str(self.digest), offset=reached, reason=str(error))
            await asyncio.sleep(pause)

    async def _transfer(self) -> None:
        """Make one transfer, from the frontier on. Returns when the blob is verified."""
        async with self._open_blob(self._frontier) as transfer:
            await self._learn_size(transfer.size)
            arrivals = Arrivals()
            writing = asyncio.gather(self._write(arrivals), return_exceptions=True)
            try:
                async for chunk in self._arriving(transfer, self._frontier):
                    if not await arrivals.put(chunk):
                        break
            finally:
                # What has arrived is written also if the transfer breaks: it need not come again.
                arrivals.close()
                (outcome,) = await writing
        if outcome is not None:
            raise outcome
        if self.size is None:
            # Only the digest can tell whether this is the end.
            self.size = self._frontier
            self._advance()
        if not self._is_verified:
            raise UpstreamUnavailableError(f"{self._upstream.name} broke off a transfer")

    async def _learn_size(self, size: int | None) -> None:
        """Take the room for the whole blob as soon as upstream says how large it is."""
        assert self._ingest is not None
        assert self._reservation is not None
        if size is None or self.size is not None:
            if size not in (None, self.size):
                raise self._mismatch()
            return
        self.size = size
        if not self._tools.space.fits(size):
            raise NoSpaceError("larger than the store")
        if self._frontier > size:
            raise self._mismatch()
        await self._reserve_for(size)
        await in_thread(self._tools.threads, self._ingest.preallocate, size)
        self._reservation.written = max(size, self._reservation.written)
        if self._frontier == size:
            # An empty blob, or one that a killed process had wholly written.
            self._advance()

    async def _write(self, arrivals: Arrivals) -> None:
        """Write what arrives, in batches, in a thread; move the frontier after each."""
        assert self._ingest is not None
        try:
            while chunks := await arrivals.take():
                end = self._frontier + sum(map(len, chunks))
                if self.size is not None and end > self.size:
                    raise self._mismatch()
                await self._reserve_for(end)
                await in_thread(self._tools.threads, self._ingest.append, chunks)
                self._advance()
        finally:
            arrivals.close()

    async def _reserve_for(self, end: int) -> None:
        """See that the reservation holds `end` bytes, or raise `NoSpaceError`."""
        assert self._reservation is not None
        if end <= self._reservation.size:
            return
        ahead = 0 if self.size is not None else min(STEP, max(end, 1 << 20))
        for size in (end + ahead, end):
            if await self._tools.space.grow(self._reservation, size):
                return
        raise NoSpaceError("no room can be made")

    def _advance(self) -> None:
        """Show readers what is in; of a complete blob only if its digest is right."""
        assert self._ingest is not None
        assert self._reservation is not None
        if self._ingest.frontier == self.size:
            if not self._ingest.is_right():
                raise self._mismatch()
            self._is_verified = True
        self._frontier = self._ingest.frontier
        self._reservation.written = max(self._reservation.written, self._frontier)
        self._wake()

    async def _commit(self) -> bool:
        """Make the blob a part of the store. False if the disk fails: that fails no reader."""
        assert self._ingest is not None
        assert self._reservation is not None
        tools = self._tools
        try:
            await in_thread(tools.threads, self._ingest.commit)
            try:
                is_new = await tools.index.add_blob(self.repository, self.digest, self._frontier)
            except StorageError:
                await in_thread(tools.threads, tools.store.delete, self.digest)
                raise
        except StorageError as error:
            tools.metrics.uncached("disk_error")
            log.warning("not_stored", digest=str(self.digest), reason=str(error))
            return False
        tools.space.commit(self._reservation, self.digest, self._frontier, is_new=is_new)
        self._reservation = None
        await in_thread(tools.threads, self._ingest.settle)
        return True

    def _detach(self, error: StorageError) -> None:
        reason: UncachedReason = "disk_error"
        if isinstance(error, NoSpaceError):
            is_large = self.size is not None and not self._tools.space.fits(self.size)
            reason = "too_large" if is_large else "no_space"
        self._tools.metrics.uncached(reason)
        log.warning("not_cached", digest=str(self.digest), reason=str(error))
        self.is_detached = True
        if self._ingest:
            # A write that failed may have got some way: what is hashed is in, and may be read.
            self._frontier = self._ingest.frontier

    async def _settle(self, *, is_worth_keeping: bool) -> None:
        """End: keep or remove the ingest, give back the room, close the file after the last reader."""
        if self._reservation:
            if is_worth_keeping and not self.is_detached:
                self._tools.space.leave(self._reservation, self.digest)
            else:
                if self._ingest:
                    await in_thread(self._tools.threads, self._ingest.discard)
                self._tools.space.release(self._reservation)
        self._is_running = False
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._ingest and not self._is_running and not self._readers:
            self._ingest.close()
            self._ingest = None

    def _wake(self) -> None:
        # Whoever waits now is woken, although the event is down again at once.
        self._changed.set()
        self._changed.clear()

    def _mismatch(self) -> DigestMismatchError:
        self._tools.metrics.digest_mismatch(self._upstream.name)
        return DigestMismatchError(f"{self._upstream.name} sent other content for {self.digest}")

    def _open_blob(self, offset: int) -> AbstractAsyncContextManager[Transfer]:
        return self._upstream.open_blob(self.repository.name, self.digest, offset)

    async def _arriving(self, transfer: Transfer, offset: int) -> AsyncIterator[bytes]:
        """Yield what arrives from `offset` on, also if upstream starts over at 0."""
        surplus = offset - transfer.offset
        async for chunk in transfer.chunks():
            self._tools.metrics.upstream_bytes(self._upstream.name, len(chunk))
            if surplus < len(chunk):
                yield chunk[surplus:] if surplus else chunk
            surplus = max(0, surplus - len(chunk))
