"""Values that are remembered for a time, by the clock of the loop."""

import asyncio
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from proxy.lru import TTLCache

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class RecentValues(Generic[K, V]):
    """At most `capacity` values, each for `ttl` seconds."""

    def __init__(self, capacity: int, ttl: float) -> None:
        self._ttl = ttl
        self._values: TTLCache[K, V] = TTLCache(capacity, asyncio.get_running_loop().time)

    def get(self, key: K) -> V | None:
        """Return a value that is not too old."""
        found = self._values.get_with_age(key)
        return found[1] if found and found[0] < self._ttl else None

    def set(self, key: K, value: V) -> None:
        """Remember a value from now on."""
        self._values.set(key, value)

    def keys(self) -> Iterator[K]:
        """Return the keys of the values that are not too old."""
        return (key for key in self._values.all_keys() if self.get(key) is not None)
