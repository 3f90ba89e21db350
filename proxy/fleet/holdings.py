"""Announces to the directory which blobs this node has: soon after a change, and all of them now and then."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from proxy.fleet import scripts
from proxy.fleet.keys import FleetKeys
from proxy.fleet.server import DirectoryBlindError, FleetServer
from proxy.oci.digest import Digest

# Blobs that are announced in one round trip, and seconds between two of them: 1,000 blobs a second.
BATCH = 250
PAUSE = 0.25
# Seconds that a change waits for others.
DELAY = 0.1
# Changes that are kept while the directory is blind. Beyond it all blobs are announced anew afterwards.
MAX_PENDING = 100_000
# Seconds until all blobs are announced again, and until the holders of a blob are forgotten if none announces it. They
# bound how long the directory keeps what dead nodes had.
ANNOUNCE_INTERVAL = 6 * 3600.0
HOLDERS_TTL = 24 * 3600.0

# Returns the stored digests after one, in their order, at most a number of them. "" is before the first.
ListHoldings = Callable[[str, int], Sequence[Digest]]


class HoldingsAnnouncer:
    """Tells the directory what this node has. `run` does the work; all other methods return at once."""

    def __init__(
        self, server: FleetServer, keys: FleetKeys, own_id: str, list_holdings: ListHoldings
    ) -> None:
        self._server = server
        self._keys = keys
        self._id = own_id
        self._list_holdings = list_holdings
        # Whether the node has the blob.
        self._pending: dict[Digest, bool] = {}
        self._wake = asyncio.Event()
        # Where the announcement of all blobs is, None if it is not running.
        self._cursor: str | None = ""
        self._announced_at = 0.0

    def change(self, digests: Iterable[Digest], *, is_held: bool) -> None:
        """Announce that the node has these blobs, or no longer has them."""
        self._pending |= dict.fromkeys(digests, is_held)
        if len(self._pending) > MAX_PENDING:
            self._pending.clear()
            self.announce_all()
        self._wake.set()

    def announce_all(self) -> None:
        """Announce all blobs from the first one on."""
        self._cursor = ""
        self._wake.set()

    async def run(self) -> None:
        """Announce changes until cancelled."""
        now = asyncio.get_running_loop().time
        while True:
            try:
                async with asyncio.timeout(ANNOUNCE_INTERVAL):
                    await self._wake.wait()
            except TimeoutError:
                self.announce_all()
            self._wake.clear()
            await asyncio.sleep(DELAY)
            while self._pending or self._cursor is not None:
                if now() - self._announced_at < PAUSE:
                    await asyncio.sleep(PAUSE)
                self._announced_at = now()
                if not await self._announce_batch():
                    break

    def resume(self) -> None:
        """Continue after the directory was blind."""
        self._wake.set()

    async def _announce_batch(self) -> bool:
        """Announce some changes, or else some of all blobs; return whether the directory has them."""
        cursor = self._cursor
        batch = dict(list(self._pending.items())[:BATCH])
        if not batch and cursor is not None:
            found = self._list_holdings(cursor, BATCH)
            batch = dict.fromkeys(found, True)
            cursor = str(found[-1]) if len(found) == BATCH else None
        for digest in batch:
            self._pending.pop(digest, None)
        try:
            if batch:
                async with self._server.asking("holdings"):
                    await self._server.run_many([self._call(*change) for change in batch.items()])
        except DirectoryBlindError:
            # What has changed since is newer.
            self._pending = batch | self._pending
            return False
        if self._cursor is not None:
            self._cursor = cursor
        return True

    def _call(self, digest: Digest, is_held: bool) -> Any:
        keys = (self._keys.holders(digest),)
        if is_held:
            return scripts.ADD, keys, (self._id, int(HOLDERS_TTL * 1000))
        return scripts.REMOVE, keys, (self._id,)
