"""The parts of the benchmark: each can run alone, and lists its measurements."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench import (
    behind_nginx,
    bundles,
    fleet,
    growth,
    hits,
    large_index,
    many_clients,
    misses,
    neighbours,
    pages,
    policy_hits,
    slow_links,
)
from tests.bench.content import DISK_BLOBS, GIB, KIB, MIB, BenchContent
from tests.bench.figures import LoadSize, Row
from tests.bench.testbed import CACHE, MIRROR, NGINX, PULLCACHE, UPSTREAM, Testbed

SHORT = LoadSize(
    rounds=1,
    seconds=1,
    connections=(32,),
    hits=(4 * KIB, MIB),
    cold=64 * MIB,
    shared=16 * MIB + 1,
    throttled=16 * MIB,
    slow_rounds=1,
    blobs=(1_000,),
    followers=200,
    growing=2 * MIB,
    idle_connections=500,
    flooding=200,
    slow_readers=100,
    slow_seconds=3,
    repositories=4_000,
    pulls=100,
)
LONG = LoadSize(
    rounds=3,
    seconds=1,
    connections=(1, 32, 256),
    hits=(4 * KIB, MIB, 64 * MIB, GIB),
    cold=GIB + 1,
    shared=256 * MIB + 1,
    throttled=64 * MIB,
    slow_rounds=3,
    blobs=(1_000, 100_000, 1_000_000),
    followers=1_000,
    growing=8 * MIB,
    idle_connections=2_000,
    flooding=1_000,
    slow_readers=500,
    slow_seconds=60,
    repositories=100_000,
    pulls=3_000,
)

Measurement = Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class Setup:
    """The input of a part: sizes, an empty directory, and optionally another checkout to compare with."""

    size: LoadSize
    directory: Path
    other: Path | None


@dataclass(frozen=True)
class BenchmarkPart:
    """`columns` names the programs to measure; `open` yields the measurements by name."""

    columns: Sequence[str]
    open: Callable[[Setup], AbstractContextManager[dict[str, Measurement]]]


@contextmanager
def _hits(setup: Setup) -> Iterator[dict[str, Measurement]]:
    size = setup.size
    with _testbed(setup, hits=(*size.hits, *DISK_BLOBS)) as testbed:
        yield {
            "plain": partial(hits.plain, testbed, size),
            "disk": partial(hits.from_disk, testbed, size),
            "TLS": partial(hits.secured, testbed, size),
        }


@contextmanager
def _misses(setup: Setup) -> Iterator[dict[str, Measurement]]:
    size, directory = setup.size, setup.directory
    with _testbed(setup, hits=(MIB,), cold=size.cold, shared=size.shared) as testbed:
        yield {
            "cold": partial(misses.cold, testbed, size, directory),
            "many clients": partial(misses.many_clients, testbed, size),
            "slow client": partial(misses.beside_slow, testbed, size),
            "neighbours": partial(neighbours.measure, testbed, size, directory),
            "image": partial(misses.image, testbed, size, directory),
            "slow links": partial(slow_links.measure, testbed, size, directory / "throttled"),
        }


@contextmanager
def _growth(setup: Setup) -> Iterator[dict[str, Measurement]]:
    size, directory = setup.size, setup.directory
    with _testbed(setup, hits=(16 * MIB,)) as testbed:
        yield {
            "followers": partial(many_clients.followers, testbed, size, directory),
            "idle": partial(many_clients.idle, testbed, size),
            "slow readers": partial(many_clients.slow_readers, testbed, size),
            **{
                f"{blobs} blobs": partial(growth.measure, size, directory, blobs)
                for blobs in size.blobs
            },
        }


@contextmanager
def _policies(setup: Setup) -> Iterator[dict[str, Measurement]]:
    with _testbed(setup, hits=(4 * KIB,)) as testbed:
        yield {"policies": partial(policy_hits.measure, testbed, setup.size, setup.directory)}


@contextmanager
def _behind_nginx(setup: Setup) -> Iterator[dict[str, Measurement]]:
    with _testbed(setup, hits=behind_nginx.SIZES) as testbed:
        yield {"blobs": partial(behind_nginx.measure, testbed, setup.size, setup.directory)}


@contextmanager
def _large_index(setup: Setup) -> Iterator[dict[str, Measurement]]:
    yield {"lists": partial(large_index.measure, setup.size, setup.directory)}


@contextmanager
def _pages(setup: Setup) -> Iterator[dict[str, Measurement]]:
    yield {"pages": partial(pages.measure, setup.size, setup.directory)}


@contextmanager
def _fleet(setup: Setup) -> Iterator[dict[str, Measurement]]:
    yield {"day": partial(fleet.measure, setup.size, setup.directory)}


@contextmanager
def _bundles(setup: Setup) -> Iterator[dict[str, Measurement]]:
    yield {"bundles": partial(bundles.measure, setup.size, setup.directory / "bundles")}


@contextmanager
def _testbed(
    setup: Setup, *, hits: Sequence[int], cold: int = 1, shared: int = 2
) -> Iterator[Testbed]:
    content = BenchContent(setup.directory / "files", hits=hits, cold=cold, shared=shared)
    with Testbed(setup.directory, content, setup.other) as testbed:
        yield testbed


PARTS = {
    "hits": BenchmarkPart((PULLCACHE, NGINX, CACHE, MIRROR), _hits),
    "misses": BenchmarkPart((PULLCACHE, MIRROR, CACHE, UPSTREAM), _misses),
    "growth": BenchmarkPart((PULLCACHE, NGINX, MIRROR), _growth),
    "policies": BenchmarkPart((PULLCACHE, policy_hits.WITHOUT), _policies),
    "behind_nginx": BenchmarkPart((PULLCACHE, behind_nginx.DIRECT), _behind_nginx),
    "large_index": BenchmarkPart((PULLCACHE,), _large_index),
    "pages": BenchmarkPart((PULLCACHE, pages.BURNER), _pages),
    "fleet": BenchmarkPart(
        (PULLCACHE, fleet.LRU, fleet.COMPARED, fleet.BEST, fleet.BELADY), _fleet
    ),
    "bundles": BenchmarkPart((PULLCACHE, bundles.COPY, bundles.HASH), _bundles),
}
