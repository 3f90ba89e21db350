"""Simulated eviction policies: the bytes that a store of some capacity misses in a day of pulls.

Each policy is a function of a day and a capacity. Only Belady's knows the future; it evicts the blob whose next use
is farthest, which is close to the optimum for blobs of different sizes.
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import count

from tests.bench.trace import Pull, SimulatedBlob


class PriorityStore:
    """Blobs with priorities that can change. The blob with the lowest priority is evicted first."""

    def __init__(self, capacity: int) -> None:
        self.priorities: dict[SimulatedBlob, float] = {}
        self.free = capacity
        self._heap: list[tuple[float, int, SimulatedBlob]] = []
        self._numbers = count()

    def set_priority(self, blob: SimulatedBlob, priority: float) -> None:
        """Set the priority of a blob, and add the blob if it is not stored."""
        if blob not in self.priorities:
            self.free -= blob.size
        self.priorities[blob] = priority
        heapq.heappush(self._heap, (priority, next(self._numbers), blob))

    def evict(self) -> float:
        """Evict blobs until the rest fits; return the priority of the last one."""
        priority = 0.0
        while self.free < 0:
            priority, _, blob = heapq.heappop(self._heap)
            if self.priorities.get(blob) == priority:
                del self.priorities[blob]
                self.free += blob.size
        return priority


def lru(day: Sequence[Pull], capacity: int) -> int:
    """Evict the blob whose last request is oldest (least recently used)."""
    return _least_recently_used(day, capacity, lambda pull: ())


def lru_of_images(day: Sequence[Pull], capacity: int) -> int:
    """Evict the least recently used blob, as pullcache does: a manifest's use counts for all its blobs."""
    return _least_recently_used(day, capacity, lambda pull: pull.image.blobs)


def _least_recently_used(
    day: Sequence[Pull], capacity: int, also_used: Callable[[Pull], Iterable[SimulatedBlob]]
) -> int:
    stored: OrderedDict[SimulatedBlob, None] = OrderedDict()
    missed, free = 0, capacity
    for pull in day:
        for blob in pull.requests():
            if blob not in stored:
                missed += blob.size
                free -= blob.size
                stored[blob] = None
            stored.move_to_end(blob)
            while free < 0:
                free += stored.popitem(last=False)[0].size
        for blob in also_used(pull):
            if blob in stored:
                stored.move_to_end(blob)
    return missed


def midpoint(day: Sequence[Pull], capacity: int) -> int:
    """As `lru_of_images`, but insert a new blob near the eviction end, at a tenth of the range of ages."""
    store, oldest, now, missed = PriorityStore(capacity), 0.0, 0.0, 0
    for pull in day:
        for blob in pull.requests():
            now += 1
            if blob in store.priorities:
                store.set_priority(blob, now)
            else:
                missed += blob.size
                store.set_priority(blob, oldest + (now - oldest) / 10)
            oldest = max(oldest, store.evict())
        for blob in set(pull.image.blobs).difference(pull.requested):
            if blob in store.priorities:
                now += 1
                store.set_priority(blob, now)
    return missed


def lfu_aging(day: Sequence[Pull], capacity: int) -> int:
    """Evict the least frequently used blob; new blobs start at the priority of the last eviction (LFU-DA)."""
    return _with_aging(day, capacity, lambda uses, _: uses)


def gdsf(day: Sequence[Pull], capacity: int) -> int:
    """As LFU-DA, but small blobs have a higher priority (Greedy-Dual-Size-Frequency)."""
    return _with_aging(day, capacity, lambda uses, size: uses / size)


def _with_aging(day: Sequence[Pull], capacity: int, priority: Callable[[int, int], float]) -> int:
    store, uses, age, missed = PriorityStore(capacity), Counter[SimulatedBlob](), 0.0, 0
    for blob in _requests(day):
        if blob not in store.priorities:
            missed += blob.size
            uses[blob] = 0
        uses[blob] += 1
        store.set_priority(blob, age + priority(uses[blob], blob.size))
        age = max(age, store.evict())
    return missed


def s3_fifo(day: Sequence[Pull], capacity: int) -> int:
    """Evict by S3-FIFO: a new blob enters a small queue, and leaves the store if it is not used again there."""
    store = _S3Fifo(capacity)
    return sum(blob.size for blob in _requests(day) if not store.request(blob))


class _S3Fifo:
    """A small and a main queue with counts of uses, and a ghost queue of blobs evicted from the small one."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._small: OrderedDict[SimulatedBlob, int] = OrderedDict()
        self._main: OrderedDict[SimulatedBlob, int] = OrderedDict()
        self._ghosts: OrderedDict[SimulatedBlob, None] = OrderedDict()
        self._small_bytes = self._bytes = 0  # of the small queue, and of both

    def request(self, blob: SimulatedBlob) -> bool:
        """Return whether the blob is stored, and store it."""
        for queue in (self._small, self._main):
            if blob in queue:
                queue[blob] = min(3, queue[blob] + 1)
                return True
        self._bytes += blob.size
        if blob in self._ghosts:
            del self._ghosts[blob]
            self._main[blob] = 0
        else:
            self._small[blob] = 0
            self._small_bytes += blob.size
        while self._bytes > self._capacity:
            if self._small_bytes > self._capacity // 10 or not self._main:
                self._evict_from_small()
            else:
                self._evict_from_main()
        return False

    def _evict_from_small(self) -> None:
        blob, uses = self._small.popitem(last=False)
        self._small_bytes -= blob.size
        if uses > 1:
            self._main[blob] = 0
            return
        self._bytes -= blob.size
        self._ghosts[blob] = None
        while len(self._ghosts) > len(self._main):
            self._ghosts.popitem(last=False)

    def _evict_from_main(self) -> None:
        blob, uses = self._main.popitem(last=False)
        if uses:
            self._main[blob] = uses - 1
        else:
            self._bytes -= blob.size


def belady(day: Sequence[Pull], capacity: int) -> int:
    """Evict the blob whose next request is farthest in the future, which may be the new one."""
    requests = _requests(day)
    store, missed = PriorityStore(capacity), 0
    next_position: dict[SimulatedBlob, float] = {}
    next_uses = [0.0] * len(requests)
    for position in reversed(range(len(requests))):
        next_uses[position] = next_position.get(requests[position], float("inf"))
        next_position[requests[position]] = position
    for blob, next_use in zip(requests, next_uses, strict=True):
        if blob not in store.priorities:
            missed += blob.size
        store.set_priority(blob, -next_use)
        store.evict()
    return missed


def _requests(day: Sequence[Pull]) -> list[SimulatedBlob]:
    return [blob for pull in day for blob in pull.requests()]
