"""A simulated day of a fleet: the pulls of its nodes, in order, and the requests that they send to a cache.

The popularity of base images, of repositories, and of versions from the newest to the oldest follows Zipf's law. New
versions are released all day. A node requests the manifest in each pull, and the blobs that it does not have. Sizes
are a thousandth of real ones, so that a day takes minutes and fits on a small disk.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count

from tests.bench.content import KIB, MIB

NODES = 500
REPOSITORIES = 120
VERSIONS = 12
BASES = 10
ZIPF = 0.9
BLOCK = 4 * KIB  # sizes are multiples of it, because a store counts allocated blocks
LARGEST = MIB


@dataclass(frozen=True, slots=True)
class SimulatedBlob:
    """A blob. The first blob of an image is its config."""

    number: int
    size: int


@dataclass(frozen=True, slots=True)
class SimulatedImage:
    """A version in a repository: its manifest and the blobs that this names."""

    repository: int
    version: int
    manifest: SimulatedBlob
    blobs: tuple[SimulatedBlob, ...]


@dataclass(frozen=True, slots=True)
class Pull:
    """A node's pull of an image. `requested` are the blobs that the node does not have."""

    image: SimulatedImage
    requested: tuple[SimulatedBlob, ...]

    def requests(self) -> Iterator[SimulatedBlob]:
        """Yield the manifest and the requested blobs, in order."""
        yield self.image.manifest
        yield from self.requested


class Fleet:
    """The images of all repositories, and a day of pulls. Both depend only on the arguments."""

    def __init__(self, pulls: int, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self._numbers = count()
        bases = [self._layers(5) for _ in range(BASES)]
        self.images = [self._repository(number, bases) for number in range(REPOSITORIES)]
        self.day = list(self._pulls(pulls))

    @property
    def total(self) -> int:
        """Return the bytes of all images that are pulled at least once."""
        pulled = {blob for pull in self.day for blob in (pull.image.manifest, *pull.image.blobs)}
        return sum(blob.size for blob in pulled)

    def _repository(
        self, number: int, bases: Sequence[list[SimulatedBlob]]
    ) -> list[SimulatedImage]:
        """Make the versions of a repository: they share the layers of a base image and some more."""
        (base,) = self._random.choices(bases, zipf(BASES))
        own = [*base, *self._layers(3)]
        return [self._image(number, version, own) for version in range(VERSIONS)]

    def _image(self, repository: int, version: int, own: list[SimulatedBlob]) -> SimulatedImage:
        config = SimulatedBlob(next(self._numbers), BLOCK)
        manifest = SimulatedBlob(next(self._numbers), BLOCK)
        return SimulatedImage(repository, version, manifest, (config, *own, *self._layers(3)))

    def _layers(self, number: int) -> list[SimulatedBlob]:
        """Make layers; half of them are below 20 KiB, and some are very large."""
        sizes = (int(self._random.lognormvariate(10, 1.5)) for _ in range(number))
        return [
            SimulatedBlob(next(self._numbers), min(LARGEST, size // BLOCK * BLOCK + BLOCK))
            for size in sizes
        ]

    def _pulls(self, pulls: int) -> Iterator[Pull]:
        nodes: list[set[SimulatedBlob]] = [
            set() for _ in range(NODES)
        ]  # the blobs that each node has
        popularity = list(accumulate(zipf(REPOSITORIES)))
        # A quarter of the versions have been released before the day.
        released = VERSIONS // 4
        for number in range(pulls):
            node = self._random.choice(nodes)
            (versions,) = self._random.choices(self.images, cum_weights=popularity)
            newest = released + (VERSIONS - released) * number // pulls
            (age,) = self._random.choices(range(newest), zipf(newest))
            image = versions[newest - 1 - age]
            yield Pull(image, tuple(blob for blob in image.blobs if blob not in node))
            node.update(image.blobs)


def zipf(number: int) -> list[float]:
    """Return the relative frequencies of `number` items by Zipf's law, the most frequent first."""
    return [1 / rank**ZIPF for rank in range(1, number + 1)]
