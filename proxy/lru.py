"""What is kept in memory, each kind with its bound: hot manifests, and answers that expire."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import msgspec

from proxy.oci.digest import Digest

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Held(msgspec.Struct, frozen=True):
    """A manifest at hand, its digest verified."""

    digest: Digest
    media_type: str
    content: bytes


class ManifestMemory:
    """The manifests used last, up to `capacity` bytes of content."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._size = 0
        self._held: OrderedDict[Digest, Held] = OrderedDict()

    def get(self, digest: Digest) -> Held | None:
        """Return the manifest if it is here, and keep it longer."""
        held = self._held.get(digest)
        if held is not None:
            self._held.move_to_end(digest)
        return held

    def put(self, held: Held) -> None:
        """Keep the manifest, instead of those unused longest."""
        if held.digest in self._held:
            return
        self._held[held.digest] = held
        self._size += len(held.content)
        while self._size > self._capacity:
            _, gone = self._held.popitem(last=False)
            self._size -= len(gone.content)


class Expiring(Generic[K, V]):
    """Answers by question, each with the time it was given; the oldest go beyond `capacity`."""

    def __init__(self, capacity: int, clock: Callable[[], float]) -> None:
        self._capacity = capacity
        self._clock = clock
        self._answers: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def get(self, key: K) -> tuple[float, V] | None:
        """Return age in seconds and answer, however old."""
        found = self._answers.get(key)
        return found and (self._clock() - found[0], found[1])

    def put(self, key: K, answer: V) -> None:
        """Remember the answer as given now."""
        self._answers.pop(key, None)
        self._answers[key] = (self._clock(), answer)
        if len(self._answers) > self._capacity:
            self._answers.popitem(last=False)

    def drop(self, key: K) -> None:
        """Forget the answer."""
        self._answers.pop(key, None)
