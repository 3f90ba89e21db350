"""Bounded caches in memory: recently used manifests, limited by size, and values with an age."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import msgspec

from proxy.oci.digest import Digest

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class CachedManifest(msgspec.Struct, frozen=True):
    """A manifest in memory, verified by its digest."""

    digest: Digest
    media_type: str
    content: bytes


class ManifestLRUCache:
    """The most recently used manifests, up to `capacity` bytes of content."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._size = 0
        self._manifests: OrderedDict[Digest, CachedManifest] = OrderedDict()

    def get(self, digest: Digest) -> CachedManifest | None:
        """Return the manifest, and mark it as the most recently used."""
        manifest = self._manifests.get(digest)
        if manifest is not None:
            self._manifests.move_to_end(digest)
        return manifest

    def add(self, manifest: CachedManifest) -> None:
        """Add the manifest, evicting the least recently used ones beyond the capacity."""
        if manifest.digest in self._manifests:
            return
        self._manifests[manifest.digest] = manifest
        self._size += len(manifest.content)
        while self._size > self._capacity:
            _, evicted = self._manifests.popitem(last=False)
            self._size -= len(evicted.content)


class TTLCache(Generic[K, V]):
    """Values with the time they were set; beyond `capacity` entries the oldest are dropped.

    The same beyond `max_size` bytes, as `size_of` counts them, for values that may be large; one that
    is larger alone is not kept. The caller checks the age, because the allowed age may differ by value.
    """

    def __init__(
        self,
        capacity: int,
        clock: Callable[[], float],
        *,
        max_size: int = 0,
        size_of: Callable[[V], int] = lambda _value: 0,
    ) -> None:
        self._capacity = capacity
        self._clock = clock
        self._max_size = max_size
        self._size_of = size_of
        self._size = 0
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def get_with_age(self, key: K) -> tuple[float, V] | None:
        """Return the age in seconds and the value, whatever its age."""
        entry = self._entries.get(key)
        return entry and (self._clock() - entry[0], entry[1])

    def set(self, key: K, value: V) -> None:
        """Set the value; its age is counted from now."""
        self.discard(key)
        size = self._size_of(value)
        if size > self._max_size:
            return
        self._size += size
        self._entries[key] = (self._clock(), value)
        while len(self._entries) > self._capacity or self._size > self._max_size:
            self.discard(next(iter(self._entries)))

    def discard(self, key: K) -> None:
        """Remove the value, if there is one."""
        entry = self._entries.pop(key, None)
        if entry:
            self._size -= self._size_of(entry[1])

    def all_keys(self) -> list[K]:
        """Return the keys of all values, whatever their age."""
        return list(self._entries)

    def clear(self) -> None:
        """Remove all values."""
        self._entries.clear()
        self._size = 0
