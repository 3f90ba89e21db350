"""What is kept in memory, each kind with its bound: hot manifests, and answers that expire."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import msgspec

from proxy.oci.digest import Digest

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class CachedManifest(msgspec.Struct, frozen=True):
    """A manifest at hand, its digest verified."""

    digest: Digest
    media_type: str
    content: bytes


class ManifestLRUCache:
    """The manifests used last, up to `capacity` bytes of content."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._size = 0
        self._manifests: OrderedDict[Digest, CachedManifest] = OrderedDict()

    def get(self, digest: Digest) -> CachedManifest | None:
        """Return the manifest if it is here, and keep it longer."""
        held = self._manifests.get(digest)
        if held is not None:
            self._manifests.move_to_end(digest)
        return held

    def add(self, manifest: CachedManifest) -> None:
        """Keep the manifest, instead of those unused longest."""
        if manifest.digest in self._manifests:
            return
        self._manifests[manifest.digest] = manifest
        self._size += len(manifest.content)
        while self._size > self._capacity:
            _, gone = self._manifests.popitem(last=False)
            self._size -= len(gone.content)


class TTLCache(Generic[K, V]):
    """Answers by question, each with the time it was given; the oldest go beyond `capacity`."""

    def __init__(self, capacity: int, clock: Callable[[], float]) -> None:
        self._capacity = capacity
        self._clock = clock
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def get_with_age(self, key: K) -> tuple[float, V] | None:
        """Return age in seconds and answer, however old."""
        found = self._entries.get(key)
        return found and (self._clock() - found[0], found[1])

    def set(self, key: K, value: V) -> None:
        """Remember the answer as given now."""
        self._entries.pop(key, None)
        self._entries[key] = (self._clock(), value)
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)

    def discard(self, key: K) -> None:
        """Forget the answer."""
        self._entries.pop(key, None)
