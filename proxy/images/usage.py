"""What takes the space of a store, by upstream and repository, and what is evicted next and when."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from math import inf

import msgspec

from proxy.concurrency import run_in_thread
from proxy.errors import StorageError
from proxy.images.store import ImageStore
from proxy.names import display_name, policy_name
from proxy.oci.reference import Repository
from proxy.repository_rules import RepositoryRules
from proxy.storage import rule_queries
from proxy.storage.image_queries import ImageQueries
from proxy.storage.usage_queries import OldBlob, Usage

DAY = 86_400.0
# Blobs, the least recently used ones, that are looked at for what goes next.
MAX_OLDEST_BLOBS = 1000
# Repositories that are named as the next ones to lose content.
MAX_NEXT_EVICTIONS = 10


class UsageRow(msgspec.Struct, frozen=True):
    """Bytes of the content of an upstream or repository.

    `unique` are those that no other one has, `reclaimable` those of them that are not pinned.
    """

    name: str
    size: int
    unique: int
    pinned: int
    reclaimable: int


class NextEviction(msgspec.Struct, frozen=True):
    """The least recently used content of a repository, which goes next. Times are Unix time.

    `at` is when the first of it goes, if as much is stored as in the last day, None if nothing was.
    """

    repository: str
    blobs: int
    size: int
    last_used: int
    at: int | None


class ShareUsage(msgspec.Struct, frozen=True):
    """The bytes that content of a rule takes, of the `limit` that its `max_share` sets."""

    rule: int
    images: Sequence[str]
    used: int
    limit: int


class StoreUsage(msgspec.Struct, frozen=True):
    """The usage of a store at a Unix time: `free` bytes can be stored before something must go.

    `stored_last_day` are the bytes that were stored in the last 24 hours and are still there. `partial_bytes`
    are those of interrupted downloads, which are resumed.
    """

    at: int
    used: int
    limit: int
    free: int
    stored_last_day: int
    pinned: int
    partials: int
    partial_bytes: int
    upstreams: Sequence[UsageRow]
    repositories: Sequence[UsageRow]
    shares: Sequence[ShareUsage]
    next: Sequence[NextEviction]


class UsageReporter:
    """Reports the usage of one store. The rules say after which time unused content goes."""

    def __init__(
        self, image_store: ImageStore, rules: RepositoryRules, clock: Callable[[], float]
    ) -> None:
        self._image_store = image_store
        self._rules = rules
        self._clock = clock

    async def report(self, limit: int = 0) -> StoreUsage:
        """Return the usage of now, with at most `limit` repositories (0: all). Raises `StorageError`."""
        store = self._image_store
        with suppress(StorageError):  # then the times of use are older
            await store.index.flush()
        upstreams, repositories, oldest = await store.query(partial(_read, limit=limit or -1))
        shares, over = await self._read_quotas()
        # What is over its share goes first; the least recently used of its rule is the same content.
        names = {policy_name(one.repository) for one in over if one.repository}
        over_rules = {self._rules.quota_rule(name) for name in names}
        oldest = over + [one for one in oldest if self._quota_rule(one) not in over_rules]
        since = self._clock() - DAY
        stored = await run_in_thread(store.index.list_threads, store.blob_store.bytes_since, since)
        free = max(0, store.space.free_bytes)
        partials, partial_bytes = store.space.partial_downloads
        return StoreUsage(
            at=int(self._clock()),
            used=store.space.used_bytes,
            limit=store.space.max_size,
            free=free,
            stored_last_day=stored,
            pinned=store.space.pinned_bytes,
            partials=partials,
            partial_bytes=partial_bytes,
            upstreams=[_to_row(one, one.upstream) for one in upstreams],
            repositories=[_to_row(one, display_name(_repository(one))) for one in repositories],
            shares=shares,
            next=self._next_evictions(oldest, free, stored / DAY)[:MAX_NEXT_EVICTIONS],
        )

    async def _read_quotas(self) -> tuple[list[ShareUsage], list[OldBlob]]:
        """Return the usage of the rules with a share, and the blobs that are over."""
        limits = self._rules.quotas(self._image_store.space.max_size)
        if not limits:
            return [], []
        index, find_rule = self._image_store.index, self._rules.quota_rule
        used = await index.read(
            lambda connection: rule_queries.quota_usage(connection, find_rule, limits)
        )
        over = await index.read(
            lambda connection: rule_queries.over_quota_by_repository(connection, find_rule, limits)
        )
        shares = [
            ShareUsage(rule, self._rules.globs(rule), used[rule].used, limit)
            for rule, limit in limits.items()
        ]
        return shares, [OldBlob(one.size, one.used, repository) for one, repository in over]

    def _quota_rule(self, blob: OldBlob) -> int:
        return self._rules.quota_rule(policy_name(blob.repository)) if blob.repository else 0

    def _next_evictions(
        self, oldest: Iterable[OldBlob], free: float, rate: float
    ) -> list[NextEviction]:
        """Return the repositories in the order in which they begin to lose content."""
        now, sizes = self._clock(), Counter[str]()
        first: dict[str, tuple[float, float, float]] = {}
        blobs: Counter[str] = Counter()
        for one in oldest:
            name = display_name(one.repository) if one.repository else ""
            owner = policy_name(one.repository) if one.repository else ""
            first.setdefault(name, (one.used, free, self._rules.settings(owner).max_idle))
            sizes[name] += one.size
            blobs[name] += 1
            free += one.size
        found = []
        for name, (used, room, max_idle) in first.items():
            times = [now + room / rate] if rate else []
            if max_idle:
                times.append(max(now, used + max_idle))
            at = int(min(times)) if times else None
            found.append(NextEviction(name, blobs[name], sizes[name], int(used), at))
        return sorted(found, key=lambda one: inf if one.at is None else one.at)


def _read(queries: ImageQueries, limit: int) -> tuple[list[Usage], list[Usage], list[OldBlob]]:
    return (
        queries.usage_by_upstream(),
        queries.usage_by_repository(limit),
        queries.oldest_blobs(MAX_OLDEST_BLOBS),
    )


def _repository(usage: Usage) -> Repository:
    return Repository(usage.upstream, usage.name)


def _to_row(usage: Usage, name: str) -> UsageRow:
    return UsageRow(name, usage.size, usage.unique, usage.pinned, usage.reclaimable)
