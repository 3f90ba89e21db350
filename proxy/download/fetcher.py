"""Getting the bytes of a blob from upstream, over one connection or several.

Each *fetcher* takes the next bytes that nobody has taken, until all are in. The first learns how large
the blob is and whether upstream does ranges; if it is large, and the link not fast, others join. What a
fetcher cannot get, those that are left take over; the last one's error ends the fetch.
"""

import asyncio
import random
from collections.abc import Callable, Iterator

from proxy.config import FetchSettings
from proxy.download.pieces import END, MAX_PIECE, Span
from proxy.download.source import Source
from proxy.download.writer import Filling
from proxy.errors import (
    DigestMismatchError,
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
from proxy.log import get_logger
from proxy.upstream import retry
from proxy.upstream.body import SHARED_BUFFER, Transfer

# Less than this is no progress: a drip must not make a download last for ever.
PROGRESS = 16 << 10
# Upstream is waited for no longer than this at a time, whatever it asks for, in seconds.
MAX_WAIT = 60.0
# A range that somebody waits for is fetched with what follows it, if it is smaller than this.
MIN_WANTED = 256 << 10
# How often it is looked how fast a single connection is, in seconds.
LOOK = 0.1

log = get_logger(__name__)


class _UnrangedError(UpstreamError):
    """Upstream sends all of the blob where it was asked for a part, and another fetches the rest."""


class Fetch:
    """Fills `filling` from `source`. `expected` is the size that a manifest states, if one does.

    `is_shared` says that several connections may be at it.
    """

    def __init__(
        self, source: Source, filling: Filling, settings: FetchSettings, expected: int | None
    ) -> None:
        self._source = source
        self._filling = filling
        self._pieces = filling.pieces
        self._settings = settings
        is_small = expected is not None and expected <= settings.parallel_above
        # Until upstream has answered one asks, for all or for a piece, which shows what it can do.
        self._connections = 1 if is_small else settings.connections_per_blob
        self.is_shared = False
        self._have_joined = False
        self._running = 0
        self._hurrying = 0
        self._start: Callable[[Span | None], None] | None = None
        self._received = 0
        self._looking: asyncio.TimerHandle | None = None
        self._over = asyncio.Event()
        self._given_back = asyncio.Event()
        self._failure: ProxyError | None = None

    async def run(self) -> None:
        """Return when the blob is verified. Raises what `Filling` raises, and `UpstreamError`."""
        tasks = []
        async with asyncio.TaskGroup() as group:

            def start(wanted: Span | None) -> None:
                self._running += 1
                tasks.append(group.create_task(self._fetcher(wanted)))

            self._start = start
            start(None)
            try:
                await self._over.wait()
            finally:
                self._start = None
                if self._looking:
                    self._looking.cancel()
            for task in tasks:
                task.cancel()
        if self._failure:
            raise self._failure

    def hurry(self, offset: int, stop: int) -> None:
        """Fetch the bytes from `offset` on before their turn, if there are others to go on."""
        if not self.is_shared or not self._start:
            return
        if self._hurrying < self._settings.connections_per_blob:
            span = self._pieces.take_at(offset, max(stop, offset + MIN_WANTED))
            if span:
                self._hurrying += 1
                self._start(span)

    async def _fetcher(self, wanted: Span | None) -> None:
        """Fetch what nobody has taken, or only what is `wanted`, until all is in."""
        try:
            if wanted:
                await self._fetch(wanted)
                self._hurrying -= 1
            # Who has hurried goes on only if nobody else is left to.
            while not self._filling.is_verified and (not wanted or self._running == 1):
                if span := self._take():
                    await self._fetch(span)
                else:
                    await self._given_back.wait()
        except (StorageError, DigestMismatchError) as error:
            self._fail(error)
        except (UpstreamError, UnknownBlobError) as error:
            if self._running == 1:
                self._fail(error)
        finally:
            self._running -= 1
            if self._filling.is_verified:
                self._over.set()

    def _take(self) -> Span | None:
        """Take what is to be fetched next."""
        if self.is_shared and not self._have_joined:
            # As much again as it has brought: few requests, and if it becomes slow, others have the rest.
            return self._pieces.take_up_to(max(MAX_PIECE, self._received))
        return self._pieces.take(self._connections)

    def _fail(self, error: ProxyError) -> None:
        self._failure = self._failure or error
        self._over.set()

    async def _fetch(self, span: Span) -> None:
        """Fetch a span; what of it does not come is given back."""
        try:
            await self._fetch_patiently(span)
        finally:
            self._pieces.drop(span)
            self._given_back.set()
            self._given_back.clear()

    async def _fetch_patiently(self, span: Span) -> None:
        """Make transfers until all of a span is in; wait between them; give up without progress."""
        pauses: Iterator[float] = iter(())
        reached = -PROGRESS
        while span.start < span.stop and not self._filling.is_verified:
            try:
                await self._transfer(span)
            except UnsatisfiableRangeError as error:
                await self._end_beyond(span, error)
            except (UpstreamError, UnknownBlobError) as error:
                if span.start >= reached + PROGRESS:
                    # Progress makes a fetch worth as many attempts as a new one.
                    pauses = retry.delays(self._settings.attempts, iter(random.random, None))
                    reached = span.start
                pause = next(pauses, None)
                if pause is None or self._is_final(error):
                    raise
                if isinstance(error, (UpstreamDownError, RateLimitedError)):
                    pause = max(pause, min(error.retry_after, MAX_WAIT))
                self._source.retried(span.start, error)
                await asyncio.sleep(pause)

    def _is_final(self, error: ProxyError) -> bool:
        """Tell whether asking again is of no use.

        Before the first byte upstream's no is an answer. Later it is a broken transfer, for instance a
        signed URL that has expired; or a limit on connections, where others go on.
        """
        is_no = not isinstance(error, UpstreamUnavailableError) or isinstance(
            error, UpstreamDownError
        )
        is_first = not self._pieces.has_any
        return isinstance(error, OfflineError) or (is_no and (is_first or self._running > 1))

    async def _transfer(self, span: Span) -> None:
        """Make one transfer of what is missing of a span."""
        filling = self._filling
        stop = None if span.stop >= self._pieces.size else span.stop
        async with self._source.open(span.start, stop) as transfer:
            if self._have_joined:
                transfer.buffer = SHARED_BUFFER
            if transfer.size is not None:
                await filling.learn_size(transfer.size)
            if transfer.is_ranged and transfer.size is not None:
                self._join(transfer.size)
            elif self._running > 1:
                raise _UnrangedError(f"{self._source.name} does not do ranges")
            else:
                self._connections = 1
                if not transfer.is_ranged:
                    self._pieces.widen(span)
            await self._receive(transfer, span)
        if span.stop == END and not filling.is_verified:
            await filling.end_here()
        elif span.start < span.stop and not filling.is_verified:
            raise UpstreamUnavailableError(f"{self._source.name} broke off a transfer")

    async def _receive(self, transfer: Transfer, span: Span) -> None:
        """Write what arrives, while more arrives."""
        async for chunk in self._source.arriving(transfer, span.start):
            await self._filling.write(span, chunk)
            self._received += len(chunk)
            if span.start >= span.stop:
                return

    def _join(self, size: int) -> None:
        """Let others join once upstream has shown that it does ranges, if the blob is worth it."""
        if size <= self._settings.parallel_above:
            self._connections = 1
        elif self._connections > 1 and not self.is_shared:
            self.is_shared = True
            if size < self._settings.parallel_below * LOOK:
                self._start_others()
            else:
                self._look_later()

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._looking = loop.call_later(LOOK, self._look, loop.time(), self._received)

    def _look(self, since: float, before: int) -> None:
        """Start others, unless one is so fast that more would cost work and bring nothing."""
        seconds = asyncio.get_running_loop().time() - since
        if self._received - before < self._settings.parallel_below * seconds:
            self._start_others()
        else:
            self._look_later()

    def _start_others(self) -> None:
        self._have_joined = True
        for _ in range(self._connections - self._running):
            if self._start:
                self._start(None)

    async def _end_beyond(self, span: Span, error: ProxyError) -> None:
        """Upstream has nothing at this offset: the blob is empty, at its end, or another one."""
        if self._filling.size is not None:
            raise self._source.mismatch() from error
        if span.start == 0 and self._connections > 1:
            # No range of an empty blob can be had.
            self._connections = 1
            self._pieces.widen(span)
        else:
            await self._filling.end_here()
