"""Digests, `algorithm:encoded` (OCI image-spec, descriptor.md#digests)."""

import hashlib
import re
from collections.abc import Callable
from typing import Protocol, Self

import msgspec

from proxy.errors import InvalidDigestError


class Hasher(Protocol):
    """The type of a `hashlib` object, which has no public name."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Hash more data."""

    def hexdigest(self) -> str:
        """Return the digest of the data so far, in lower-case hex."""

    def copy(self) -> Self:
        """Return an independent copy of the state."""


# The two registered algorithms, in lower-case hex. Other digests could not be verified.
_HASHERS: dict[str, Callable[[bytes], Hasher]] = {
    "sha256": hashlib.sha256,
    "sha512": hashlib.sha512,
}
_SHORT_PATTERN = re.compile(r"sha(256|512):[a-f0-9]{4,63}")
_PATTERN = re.compile(r"(sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128})")


class Digest(msgspec.Struct, frozen=True, cache_hash=True):
    """A well-formed digest. Create one with `parse` or `from_content`; it is safe to use in a path."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a digest, or raise `InvalidDigestError`."""
        if _PATTERN.fullmatch(text) is None:
            is_short = _SHORT_PATTERN.fullmatch(text[:80]) is not None
            hint = "; pullcache shows whole digests with --no-trunc" if is_short else ""
            raise InvalidDigestError(
                f"{text[:80]!r} is not a digest: use sha256:<64 lower-case hex digits> "
                f"or sha512:<128 of them>{hint}"
            )
        algorithm, _, encoded = text.partition(":")
        return cls(algorithm, encoded)

    @classmethod
    def from_content(cls, content: bytes, algorithm: str = "sha256") -> Self:
        """Return the digest of `content`."""
        return cls(algorithm, _HASHERS[algorithm](content).hexdigest())

    def new_hasher(self) -> Hasher:
        """Return a new hash object of this digest's algorithm."""
        return _HASHERS[self.algorithm](b"")

    def matches(self, hasher: Hasher) -> bool:
        """Tell whether the data in `hasher` has this digest."""
        return hasher.hexdigest() == self.hex

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"
