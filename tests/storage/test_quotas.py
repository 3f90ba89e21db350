"""Quotas and idle times by rule: whose blobs go first, and for whom a shared blob counts."""

import asyncio
import os
from contextlib import closing
from typing import Any

import pytest

from proxy.config import load
from proxy.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.repository_rules import RepositoryRules
from proxy.storage import rule_queries, space as space_module
from proxy.storage.blobs import BlobStore
from proxy.storage.index import Index
from proxy.storage.space import SpaceManager
from tests.fakes.clock import Clock

MB = 1_000_000
A, B, C = (Repository("docker.io", name) for name in ("a/app", "b/app", "c/app"))
DAY = 86_400.0


class Store:
    """A store of ten megabytes, to which tests add blobs of one."""

    def __init__(self, store: BlobStore, index: Index, space: SpaceManager, clock: Clock) -> None:
        self.store, self.index, self.space, self.clock = store, index, space, clock

    async def add(self, *repositories: Repository, size: int = MB) -> Digest:
        content = os.urandom(size)
        digest = Digest.from_content(content)
        reservation = await self.space.reserve(size)
        assert reservation
        await asyncio.to_thread(self.store.commit_bytes, digest, content)
        for repository in repositories:
            await self.index.add_blob(repository, digest, size)
        self.space.convert_reservation(reservation, digest)
        self.clock.advance(1)
        return digest

    def stored(self, *digests: Digest) -> list[bool]:
        return [self.index.blob_size(digest) is not None for digest in digests]

    def set_rules(self, *rules: dict[str, Any], **store: Any) -> None:
        loaded = load(None, {}, {"rules": [*rules], "store": store})
        self.space.set_rules(RepositoryRules(loaded))


@pytest.fixture
async def store(tmp_path, monkeypatch):
    # However slow this machine is.
    monkeypatch.setattr(space_module, "QUOTA_COST", 60.0)
    clock, metrics = Clock(), Metrics([], "0")
    blobs = await asyncio.to_thread(BlobStore, tmp_path / "store")
    index = await asyncio.to_thread(Index, blobs.root / "index.sqlite", clock)
    space = SpaceManager(blobs, index, metrics, max_size=10 * MB, min_free=0, clock=clock)
    await space.open()
    with closing(blobs):
        yield Store(blobs, index, space, clock)
        await asyncio.to_thread(index.close)


async def test_what_is_over_its_share_goes_first_although_it_was_used_last(store):
    store.set_rules({"images": ["docker.io/a/*"], "max_share": "20%"})
    old = [await store.add(B) for _ in range(3)]
    over = [await store.add(A) for _ in range(5)]
    await store.add(C)
    await store.add(C)
    assert store.stored(*old) == [True] * 3
    left = store.stored(*over)
    assert left == sorted(left)
    assert not left[0]
    evicted = store.space.evictions.take()
    assert [*evicted] == [("quota", "docker.io/a/app")]
    assert evicted["quota", "docker.io/a/app"][0] == left.count(False)


async def test_within_all_shares_the_least_recently_used_goes(store):
    store.set_rules({"images": ["docker.io/a/*"], "max_share": "90%"})
    old = [await store.add(B) for _ in range(3)]
    kept = [await store.add(A) for _ in range(6)]
    await store.add(C)
    left = store.stored(*old)
    assert left == sorted(left)
    assert not left[0]
    assert store.stored(*kept) == [True] * 6


async def test_a_share_takes_nothing_away_while_there_is_room(store):
    store.set_rules({"images": ["docker.io/a/*"], "max_share": "10%"})
    blobs = [await store.add(A) for _ in range(7)]
    await store.space.sweep(max_idle=0, ingest_ttl=DAY)
    assert store.stored(*blobs) == [True] * 7


async def test_a_blob_of_several_repositories_counts_once_for_the_first_rule(store):
    store.set_rules(
        {"images": ["docker.io/a/*"], "max_share": "50%"},
        {"images": ["docker.io/b/*"], "max_share": "10%"},
    )
    shared = [await store.add(B, A) for _ in range(3)]
    own = [await store.add(B) for _ in range(2)]
    usage = await store.index.read(
        lambda connection: rule_queries.quota_usage(
            connection,
            lambda name: {"docker.io/a/app": 1, "docker.io/b/app": 2}.get(name, 0),
            {1: 5 * MB, 2: MB},
        )
    )
    size = 1_003_520  # a megabyte in blocks of 4 KiB
    assert (usage[1].used, usage[1].excess) == (3 * size, 0)
    assert (usage[2].used, usage[2].excess) == (2 * size, 2 * size - MB)
    rest = [await store.add(C) for _ in range(5)]
    # Both of its own go, as one is not enough to come below a megabyte; what it shares stays.
    assert store.stored(*shared) == [True] * 3
    assert sum(store.stored(*own)) < 2
    assert store.stored(*rest) == [True] * 5


async def test_pinned_blobs_count_for_a_share_and_stay(store):
    store.set_rules({"images": ["docker.io/a/*"], "max_share": "10%"})
    await store.index.pin([(A, Digest.from_content(b"x"))])
    blobs = [await store.add(A) for _ in range(2)]
    await store.index.transact(
        lambda connection: connection.execute(
            "UPDATE blobs SET pinned = 1 WHERE digest = ?", (str(blobs[0]),)
        )
    )
    for _ in range(8):
        await store.add(C)
    assert store.stored(*blobs) == [True, False]


async def test_what_came_since_the_last_eviction_counts(store):
    store.set_rules({"images": ["docker.io/a/*"], "max_share": "20%"})
    others = [await store.add(C) for _ in range(9)]  # room was needed: A has nothing yet
    own = [await store.add(A), await store.add(A)]
    left = store.stored(*others).count(True)
    own.append(await store.add(A))
    assert store.stored(*own) == [False, True, True]
    await store.add(C)
    assert store.stored(*own) == [False, False, True]
    assert store.stored(*others).count(True) == left


async def test_a_sum_that_takes_long_is_not_repeated_at_once(store, monkeypatch):
    monkeypatch.setattr(space_module, "QUOTA_COST", 0.0)
    monkeypatch.setattr(space_module, "MAX_QUOTA_SHARE", 1e-9)
    store.set_rules({"images": ["docker.io/a/*"], "max_share": "10%"})
    others = [await store.add(C) for _ in range(9)]
    left = store.stored(*others).count(True)
    own = [await store.add(A), await store.add(A), await store.add(A)]
    assert store.stored(*own) == [True] * 3
    assert store.stored(*others).count(True) < left
    store.set_rules({"images": ["docker.io/a/*"], "max_share": "10%"})
    await store.add(C)
    assert store.stored(*own)[0] is False


async def test_idle_times_are_those_of_the_first_rule(store):
    store.set_rules(
        {"images": ["docker.io/a/*"], "max_idle": "1d"},
        {"images": ["docker.io/b/*"], "max_idle": "0s"},
        max_idle="3d",
    )
    short, never, default = await store.add(A), await store.add(B), await store.add(C)
    shared = await store.add(B, A)
    store.clock.advance(2 * DAY)
    await store.space.sweep(max_idle=3 * DAY, ingest_ttl=DAY)
    assert store.stored(short, never, default, shared) == [False, True, True, False]
    store.clock.advance(2 * DAY)
    await store.space.sweep(max_idle=3 * DAY, ingest_ttl=DAY)
    assert store.stored(never, default) == [True, False]


async def test_a_sweep_looks_at_some_blobs_and_the_next_one_goes_on(store, monkeypatch):
    monkeypatch.setattr(rule_queries, "MAX_IDLE_CANDIDATES", 2)
    store.set_rules({"images": ["docker.io/b/*"], "max_idle": "0s"}, max_idle="1d")
    kept = [await store.add(B, size=5000) for _ in range(3)]
    idle = await store.add(C, size=5000)
    store.clock.advance(2 * DAY)
    await store.space.sweep(max_idle=DAY, ingest_ttl=DAY)
    assert store.stored(idle) == [True]
    await store.space.sweep(max_idle=DAY, ingest_ttl=DAY)
    assert store.stored(idle, *kept) == [False, True, True, True]
