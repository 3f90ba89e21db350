"""fsck keeps totals of traffic and the audit trail of an index that is damaged elsewhere."""

import asyncio
import sqlite3
from contextlib import closing

from proxy.storage.blobs import BlobStore
from proxy.storage.fsck import check_store
from proxy.storage.index import Index
from proxy.storage.records.traffic import TrafficRecords
from proxy.storage.records.trail import AuditTrail, EvictionTally
from proxy.traffic import TrafficTally
from tests.fakes.clock import Clock


async def test_totals_and_the_audit_trail_outlive_a_damaged_index(tmp_path):
    clock = Clock()
    store = await asyncio.to_thread(BlobStore, tmp_path / "store")
    path = store.root / "index.sqlite"
    index = await asyncio.to_thread(Index, path, clock)
    tally = TrafficTally(clock)
    tally.counts(tally.today(), "upstream", "docker.io").requests += 3
    await TrafficRecords(index, tally).write(max_size=10**12, keeps_clients=True)
    trail = AuditTrail(index, EvictionTally(), clock, lambda: 10**12)
    async with trail.recording("pin", "token ci", ["docker.io/library/app:1"]):
        pass
    await asyncio.to_thread(index.close)
    store.close()
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'edges'"
        (page,) = connection.execute(query).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    content = bytearray(path.read_bytes())
    content[(page - 1) * size : page * size] = bytes([0xA5]) * size
    path.write_bytes(content)
    await asyncio.to_thread(check_store, store.root, dry_run=False, on_progress=lambda *_: None)
    assert path.with_name("index.sqlite.broken").exists()
    index = await asyncio.to_thread(Index, path, clock)
    assert TrafficRecords(index, tally).sum_days(1).requests == 3
    (entry,) = await AuditTrail(index, EvictionTally(), clock, lambda: 10**12).entries()
    assert (entry.actor, entry.images) == ("token ci", {"docker.io/library/app:1": 0})
    await asyncio.to_thread(index.close)
