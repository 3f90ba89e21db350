"""One fetch, many readers.

A download belongs to the cache, not to the request that caused it: it goes on when that client
leaves. Readers follow the *frontier*, the length of what is written and hashed, each at its own
pace. The last byte is withheld until the digest is right, so nobody ever holds a complete blob that
was not verified. Who reads a range far ahead gets it as soon as it is in.

Where there is no room, or the disk fails, the download *detaches*: its readers keep what they
have and fetch the rest from upstream, each for itself, under the same rule.
"""

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator
from copy import copy
from dataclasses import dataclass

from proxy.concurrency import to_the_end
from proxy.config import FetchSettings
from proxy.download.fetcher import Fetch
from proxy.download.queue import Slots, Turn
from proxy.download.source import Source
from proxy.download.writer import Disk, Filling
from proxy.errors import (
    DigestMismatchError,
    NoSpaceError,
    ProxyError,
    StorageError,
    UpstreamUnavailableError,
)
from proxy.log import get_logger
from proxy.metrics import DownloadResult, UncachedReason
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.tracing import span
from proxy.upstream.body import SMALL_BUFFER
from proxy.upstream.client import Upstream

# A range of at most so many bytes that lies ahead may end with the blob's last byte before the digest
# is known: the footers and tables of contents that lazy pullers read.
PEEK = 1 << 20

log = get_logger(__name__)


# So many at a time: each then sends some hundred KiB, and a thousand of them would take a tenth of a second.
TURN = 32


class Bell:
    """Who waits is woken when it rings, in the order they came, some in each turn of the loop.

    Between two turns the loop looks after its other connections.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], None] = {}
        self._called: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Return when it has rung once more."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting[waiter] = None
        try:
            await waiter
        finally:
            self._waiting.pop(waiter, None)

    def ring(self) -> None:
        """Call all who wait just now; who comes later waits for the next time."""
        is_idle = not self._called
        self._called += self._waiting
        self._waiting.clear()
        if is_idle:
            self._wake()

    def _wake(self) -> None:
        for _ in range(min(TURN, len(self._called))):
            waiter = self._called.popleft()
            if not waiter.done():
                waiter.set_result(None)
        if self._called:
            asyncio.get_running_loop().call_soon(self._wake)


@dataclass(frozen=True, slots=True)
class Tools:
    """What every download works with."""

    disk: Disk
    slots: Slots
    settings: FetchSettings


class Detached(Exception):  # noqa: N818 (it is no error: the reader goes on by itself)
    """The rest is not to be had from the file: go on with `Download.pass_through`."""


class Download:
    """The fetch of one blob under one repository. `run` is its task; everything else reads.

    `error` is what ended a download that failed; `is_detached` says that the blob is not being stored.
    """

    def __init__(
        self,
        tools: Tools,
        upstream: Upstream,
        repository: Repository,
        digest: Digest,
        *,
        is_urgent: bool,
    ) -> None:
        self.repository = repository
        self.digest = digest
        self.error: ProxyError | None = None
        self.is_detached = False
        metrics = tools.disk.metrics
        self._tools = tools
        self._source = Source(upstream, repository.name, digest, metrics)
        self._changed = Bell()
        self._filling = Filling(tools.disk, self._source, self._changed.ring)
        expected = tools.disk.index.child_size(repository, digest)
        self._fetch = Fetch(self._source, self._filling, tools.settings, expected)
        self._turn = Turn(is_urgent=is_urgent)
        self._is_running = True
        self._readers = 0

    # For readers.

    @property
    def size(self) -> int | None:
        """The size of the blob; None until upstream says it."""
        return self._filling.size

    @property
    def received(self) -> int:
        """How many bytes are in, in whatever order; `resumed` of them since an earlier download."""
        return self._filling.pieces.count

    @property
    def resumed(self) -> int:
        """How many bytes an interrupted download had left."""
        return self._filling.resumed

    @property
    def is_wanted(self) -> bool:
        """Whether a client has asked for it."""
        return self._turn.is_urgent

    @property
    def fd(self) -> int:
        """The file that grows, once `available` has returned, for a reader that was counted."""
        return self._filling.fd

    def acquire(self) -> None:
        """Count a reader: the file stays open until it calls `release`. It is now urgent."""
        self._readers += 1
        if not self._turn.is_urgent:
            self._turn.is_urgent = True
            self._tools.slots.call()

    def release(self) -> None:
        """Count a reader less."""
        self._readers -= 1
        self._close_if_unused()

    async def finished(self) -> None:
        """Wait until it is over, and in the store unless `is_detached`. Raises what ended it."""
        while self._is_running:
            await self._changed.wait()
        if self.error:
            raise copy(self.error)

    def is_peek(self, start: int, stop: int) -> bool:
        """Tell whether reading this range now is reading ahead, not completing what was read."""
        is_ahead = self._fetch.is_shared and start > self._filling.frontier
        return is_ahead and stop - start <= PEEK

    async def available(
        self, offset: int, stop: int = sys.maxsize, *, is_peek: bool = False
    ) -> int:
        """Return how far the file may be read, more than `offset`; `offset` itself at the end.

        Who wants no more than up to `stop` is served before its turn. Raises what ended the
        download, and `Detached`.
        """
        while True:
            limit = self._limit(offset, is_peek=is_peek)
            if limit > offset or self._filling.is_verified:
                return max(limit, offset)
            if self.error:
                # Each reader raises its own: tracebacks and contexts are not for sharing.
                raise copy(self.error)
            if self.is_detached:
                raise Detached
            if stop != sys.maxsize and self.size is not None:
                self._fetch.hurry(offset, min(stop, self.size))
            await self._changed.wait()

    def _limit(self, offset: int, *, is_peek: bool) -> int:
        filling = self._filling
        if filling.is_verified or self.is_detached:
            return filling.frontier
        limit = max(filling.frontier, filling.pieces.filled(offset))
        if is_peek:
            return limit
        return min(limit, (limit if self.size is None else self.size) - 1)

    async def pass_through(self, start: int, stop: int | None) -> AsyncIterator[bytes]:
        """Yield the bytes from `start` up to `stop` (None: the end), fetched for this reader alone.

        The blob's last byte comes only when the digest is right. `size` is known after the first
        chunk, if ever. Raises `DigestMismatchError` and `UpstreamError`.
        """
        filling = self._filling
        hasher, position, held = filling.hasher(), filling.frontier, b""
        async with self._source.open(position) as transfer:
            transfer.buffer = SMALL_BUFFER
            filling.size = transfer.size if self.size is None else self.size
            is_tail = stop is None or stop == self.size
            end = sys.maxsize if stop is None else stop
            async for chunk in self._source.arriving(transfer, position):
                # At most half a MiB: hashing it holds up nobody for long.
                hasher.update(chunk)
                piece = chunk[max(0, start - position) :]
                position += len(chunk)
                if not is_tail and position >= end:
                    yield bytes(piece[: len(piece) - (position - end)])
                    return
                if piece:
                    yield held + bytes(piece[: -1 if is_tail else None])
                    held = bytes(piece[-1:]) if is_tail else b""
        if not self.digest.matches(hasher):
            raise self._source.mismatch()
        yield held

    # The fetch.

    async def run(self, before: "asyncio.Task[None] | None" = None) -> None:
        """Fetch, verify and commit. What goes wrong is `error` afterwards; nothing is raised.

        `before` is waited for first: an abandoned download of the same blob that closes its files.
        """
        result: DownloadResult = "failed"
        ended: ProxyError | None = UpstreamUnavailableError("the cache is shutting down; try again")
        metrics = self._tools.disk.metrics
        try:
            if before:
                await asyncio.wait((before,))
            async with self._tools.slots.held(self._turn):
                await self._fill()
                is_stored = not self.is_detached and await self._commit()
            result, ended = "stored" if is_stored else "bypass", None
        except ProxyError as error:
            result = "mismatch" if isinstance(error, DigestMismatchError) else "failed"
            ended = error
        except Exception:
            ended = StorageError("the cache failed inside; its log says how")
            metrics.bug()
            log.exception("download_crashed", digest=str(self.digest))
        finally:
            metrics.download(result)
            try:
                is_worth_keeping = result == "failed" and not self.is_detached
                await self._filling.settle(is_worth_keeping=is_worth_keeping)
                self._is_running = False
                self._close_if_unused()
            finally:
                # Told last: whoever hears of it may begin anew at once, with the same files.
                self.error = ended
                self._changed.ring()

    async def _fill(self) -> None:
        """Get all bytes into the file, or detach."""
        try:
            async with self._filling.opened():
                if not self._filling.is_verified:
                    await self._fetch.run()
        except StorageError as error:
            self._detach(error)

    async def _commit(self) -> bool:
        with span("commit"):
            return await to_the_end(self._filling.commit(self.repository))

    def _detach(self, error: StorageError) -> None:
        reason: UncachedReason = "disk_error"
        if isinstance(error, NoSpaceError):
            reason = self._tools.disk.space.refusal(self.size or 0)
        self._tools.disk.metrics.uncached(reason)
        log.warning("not_cached", digest=str(self.digest), reason=str(error))
        # A write that failed may have got some way: what is hashed is in, and may be read.
        self._filling.stop()
        self.is_detached = True

    def _close_if_unused(self) -> None:
        if not self._is_running and not self._readers:
            self._filling.close()
