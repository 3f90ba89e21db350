"""What a store of some bytes would have kept, by one policy or another: the bytes that were not there.

Each is a function of a day and a capacity. All but Belady's know the past alone; his farthest next use, with blobs of
many sizes, is not quite the best that there can be, but near to it.
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import count

from tests.bench.trace import Blob, Pull


class Heap:
    """Blobs by a worth that changes: the least worthy goes first."""

    def __init__(self, capacity: int) -> None:
        self.worth: dict[Blob, float] = {}
        self.free = capacity
        self._heap: list[tuple[float, int, Blob]] = []
        self._numbers = count()

    def put(self, blob: Blob, worth: float) -> None:
        """Give a blob a worth; it takes its room if it was not there."""
        if blob not in self.worth:
            self.free -= blob.size
        self.worth[blob] = worth
        heapq.heappush(self._heap, (worth, next(self._numbers), blob))

    def evict(self) -> float:
        """Let the least worthy go until there is no less than no room; return the worth of the last."""
        worth = 0.0
        while self.free < 0:
            worth, _, blob = heapq.heappop(self._heap)
            if self.worth.get(blob) == worth:
                del self.worth[blob]
                self.free += blob.size
        return worth


def lru(day: Sequence[Pull], capacity: int) -> int:
    """Evict what was asked for longest ago."""
    return _least_recent(day, capacity, lambda pull: ())


def lru_of_images(day: Sequence[Pull], capacity: int) -> int:
    """Evict what was used longest ago, as pullcache does: a manifest's use is one of all that it names."""
    return _least_recent(day, capacity, lambda pull: pull.image.blobs)


def _least_recent(
    day: Sequence[Pull], capacity: int, also: Callable[[Pull], Iterable[Blob]]
) -> int:
    stored: OrderedDict[Blob, None] = OrderedDict()
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
        for blob in also(pull):
            if blob in stored:
                stored.move_to_end(blob)
    return missed


def midpoint(day: Sequence[Pull], capacity: int) -> int:
    """The same, but what is new comes in near the end that goes, at a tenth of the ages that there are."""
    heap, oldest, now, missed = Heap(capacity), 0.0, 0.0, 0
    for pull in day:
        for blob in pull.requests():
            now += 1
            if blob in heap.worth:
                heap.put(blob, now)
            else:
                missed += blob.size
                heap.put(blob, oldest + (now - oldest) / 10)
            oldest = max(oldest, heap.evict())
        for blob in set(pull.image.blobs).difference(pull.wanted):
            if blob in heap.worth:
                now += 1
                heap.put(blob, now)
    return missed


def lfu_aging(day: Sequence[Pull], capacity: int) -> int:
    """Evict what was asked for least often, where what is new begins at the worth of what went last (LFU-DA)."""
    return _aging(day, capacity, lambda uses, _: uses)


def gdsf(day: Sequence[Pull], capacity: int) -> int:
    """The same, but what is small is worth more (Greedy-Dual-Size-Frequency)."""
    return _aging(day, capacity, lambda uses, size: uses / size)


def _aging(day: Sequence[Pull], capacity: int, worth: Callable[[int, int], float]) -> int:
    heap, uses, age, missed = Heap(capacity), Counter[Blob](), 0.0, 0
    for blob in _requests(day):
        if blob not in heap.worth:
            missed += blob.size
            uses[blob] = 0
        uses[blob] += 1
        heap.put(blob, age + worth(uses[blob], blob.size))
        age = max(age, heap.evict())
    return missed


def s3_fifo(day: Sequence[Pull], capacity: int) -> int:
    """A tenth of the store is on probation: what is asked for no more there does not reach the rest."""
    store = _Fifos(capacity)
    return sum(blob.size for blob in _requests(day) if not store.ask(blob))


class _Fifos:
    """Two queues with counts of uses, and the names of what left the first of them lately."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._new: OrderedDict[Blob, int] = OrderedDict()
        self._main: OrderedDict[Blob, int] = OrderedDict()
        self._ghosts: OrderedDict[Blob, None] = OrderedDict()
        self._new_bytes = self._bytes = 0  # of the first, and of both

    def ask(self, blob: Blob) -> bool:
        """Tell whether the blob is here; it is from now on."""
        for queue in (self._new, self._main):
            if blob in queue:
                queue[blob] = min(3, queue[blob] + 1)
                return True
        self._bytes += blob.size
        if blob in self._ghosts:
            del self._ghosts[blob]
            self._main[blob] = 0
        else:
            self._new[blob] = 0
            self._new_bytes += blob.size
        while self._bytes > self._capacity:
            if self._new_bytes > self._capacity // 10 or not self._main:
                self._judge_new()
            else:
                self._judge_old()
        return False

    def _judge_new(self) -> None:
        blob, uses = self._new.popitem(last=False)
        self._new_bytes -= blob.size
        if uses > 1:
            self._main[blob] = 0
            return
        self._bytes -= blob.size
        self._ghosts[blob] = None
        while len(self._ghosts) > len(self._main):
            self._ghosts.popitem(last=False)

    def _judge_old(self) -> None:
        blob, uses = self._main.popitem(last=False)
        if uses:
            self._main[blob] = uses - 1
        else:
            self._bytes -= blob.size


def belady(day: Sequence[Pull], capacity: int) -> int:
    """Evict what will be asked for last, be it what just came."""
    requests = _requests(day)
    heap, missed = Heap(capacity), 0
    upcoming: dict[Blob, float] = {}
    following = [0.0] * len(requests)
    for place in reversed(range(len(requests))):
        following[place] = upcoming.get(requests[place], float("inf"))
        upcoming[requests[place]] = place
    for blob, following_use in zip(requests, following, strict=True):
        if blob not in heap.worth:
            missed += blob.size
        heap.put(blob, -following_use)
        heap.evict()
    return missed


def _requests(day: Sequence[Pull]) -> list[Blob]:
    return [blob for pull in day for blob in pull.requests()]
