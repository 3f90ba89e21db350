"""A day of a fleet: which node pulls which image when, and so what is asked of a cache.

Popularity follows Zipf's law, of base images, of repositories, and of versions from the newest back; new
versions come out all day. A node asks for a manifest each time, and for those layers that it does not have.
Sizes are a thousandth of what they are in life, so that a day fits into minutes and a small disk.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count

from tests.bench.content import KIB, MIB

CLIENTS = 500
REPOSITORIES = 120
VERSIONS = 12
BASES = 10
ZIPF = 0.9
BLOCK = 4 * KIB  # sizes are whole blocks, so that a store counts what is counted here
LARGEST = MIB


@dataclass(frozen=True, slots=True)
class Blob:
    """Something of a size. The first of an image's is its configuration."""

    number: int
    size: int


@dataclass(frozen=True, slots=True)
class Image:
    """A version of a repository: its manifest, and what that names."""

    repository: int
    version: int
    manifest: Blob
    blobs: tuple[Blob, ...]


@dataclass(frozen=True, slots=True)
class Pull:
    """An image that a node pulls, and those of its blobs that it asks for."""

    image: Image
    wanted: tuple[Blob, ...]

    def requests(self) -> Iterator[Blob]:
        """Yield what is asked for, in order."""
        yield self.image.manifest
        yield from self.wanted


class Fleet:
    """The images that there are, and a day of pulls of them. The same for the same seed."""

    def __init__(self, pulls: int, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self._numbers = count()
        bases = [self._layers(5) for _ in range(BASES)]
        self.images = [self._repository(number, bases) for number in range(REPOSITORIES)]
        self.day = list(self._pulls(pulls))

    @property
    def total(self) -> int:
        """Return the bytes of everything that is pulled at least once."""
        pulled = {blob for pull in self.day for blob in (pull.image.manifest, *pull.image.blobs)}
        return sum(blob.size for blob in pulled)

    def _repository(self, number: int, bases: Sequence[list[Blob]]) -> list[Image]:
        """Make the versions of one: some layers are a base image's, some its own, some of the version."""
        (base,) = self._random.choices(bases, zipf(BASES))
        own = [*base, *self._layers(3)]
        return [self._image(number, version, own) for version in range(VERSIONS)]

    def _image(self, repository: int, version: int, own: list[Blob]) -> Image:
        config = Blob(next(self._numbers), BLOCK)
        manifest = Blob(next(self._numbers), BLOCK)
        return Image(repository, version, manifest, (config, *own, *self._layers(3)))

    def _layers(self, many: int) -> list[Blob]:
        """Make layers; half of them are below 20 KiB, and some are very large."""
        sizes = (int(self._random.lognormvariate(10, 1.5)) for _ in range(many))
        return [
            Blob(next(self._numbers), min(LARGEST, size // BLOCK * BLOCK + BLOCK)) for size in sizes
        ]

    def _pulls(self, many: int) -> Iterator[Pull]:
        has: list[set[Blob]] = [set() for _ in range(CLIENTS)]
        repositories = list(accumulate(zipf(REPOSITORIES)))
        # A quarter of the versions are out in the morning.
        out = VERSIONS // 4
        for number in range(many):
            node = self._random.choice(has)
            (versions,) = self._random.choices(self.images, cum_weights=repositories)
            newest = out + (VERSIONS - out) * number // many
            (age,) = self._random.choices(range(newest), zipf(newest))
            image = versions[newest - 1 - age]
            yield Pull(image, tuple(blob for blob in image.blobs if blob not in node))
            node.update(image.blobs)


def zipf(many: int) -> list[float]:
    """Return how often each of so many is drawn, the first the most."""
    return [1 / rank**ZIPF for rank in range(1, many + 1)]
