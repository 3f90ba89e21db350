"""Locks on digests: one commit or removal of a blob at a time, because they change the same file."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from proxy.oci.digest import Digest


class DigestLocks:
    """Locks that exist while they are held. Used in one event loop."""

    def __init__(self) -> None:
        self._held: dict[Digest, asyncio.Event] = {}

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._held

    @asynccontextmanager
    async def hold(self, digest: Digest) -> AsyncIterator[None]:
        """Hold the lock for the block; wait for it first."""
        while held := self._held.get(digest):
            await held.wait()
        self._held[digest] = asyncio.Event()
        try:
            yield
        finally:
            self.release([digest])

    def acquire_free(self, digests: Iterable[Digest]) -> list[Digest]:
        """Take the locks that are free, without waiting, and return their digests."""
        free = [digest for digest in dict.fromkeys(digests) if digest not in self._held]
        for digest in free:
            self._held[digest] = asyncio.Event()
        return free

    def release(self, digests: Iterable[Digest]) -> None:
        """Give back locks that are held."""
        for digest in digests:
            self._held.pop(digest).set()
