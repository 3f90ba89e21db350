"""What the cache answers, and how it came by it."""

import msgspec

from proxy.cache.download import Download
from proxy.cache.memory import Held
from proxy.metrics import CacheState
from proxy.storage.local import OpenBlob


class ManifestAnswer(msgspec.Struct, frozen=True):
    """A manifest and how it was come by. `age` and `ttl` are seconds; `ttl` is None by digest."""

    held: Held
    state: CacheState
    age: float = 0.0
    ttl: float | None = None
    warning: str = ""


class BlobAnswer(msgspec.Struct, frozen=True):
    """Where the bytes of a blob come from."""

    source: OpenBlob | Download
    state: CacheState
