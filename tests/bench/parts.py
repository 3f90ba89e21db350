"""The parts of the benchmark: each runs by itself, and says which measures it has."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench import bundles, crowds, fleet, growth, hits, links, misses
from tests.bench.content import GIB, KIB, MIB, Content
from tests.bench.figures import Row, Size
from tests.bench.stage import CACHE, MIRROR, NGINX, PULLCACHE, UPSTREAM, Stage

SHORT = Size(
    rounds=1,
    seconds=1,
    connections=(32,),
    hits=(4 * KIB, MIB),
    cold=64 * MIB,
    crowd=16 * MIB + 1,
    link=16 * MIB,
    few=1,
    blobs=(1_000,),
    followers=200,
    growing=2 * MIB,
    idle=500,
    slow=100,
    slow_seconds=3,
    pulls=100,
)
LONG = Size(
    rounds=3,
    seconds=1,
    connections=(1, 32, 256),
    hits=(4 * KIB, MIB, 64 * MIB, GIB),
    cold=GIB + 1,
    crowd=256 * MIB + 1,
    link=64 * MIB,
    few=3,
    blobs=(1_000, 100_000, 1_000_000),
    followers=1_000,
    growing=8 * MIB,
    idle=2_000,
    slow=500,
    slow_seconds=60,
    pulls=3_000,
)

Measure = Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class Setting:
    """What a part is given: how much, an empty directory, perhaps another checkout to compare with."""

    size: Size
    place: Path
    other: Path | None


@dataclass(frozen=True)
class Part:
    """`open` yields the measures by name; `columns` are those who are measured."""

    columns: Sequence[str]
    open: Callable[[Setting], AbstractContextManager[dict[str, Measure]]]


@contextmanager
def _hits(setting: Setting) -> Iterator[dict[str, Measure]]:
    size = setting.size
    with _stage(setting, hits=size.hits) as stage:
        yield {
            "plain": partial(hits.plain, stage, size),
            "disk": partial(hits.from_disk, stage, size),
            "TLS": partial(hits.secured, stage, size),
        }


@contextmanager
def _misses(setting: Setting) -> Iterator[dict[str, Measure]]:
    size, place = setting.size, setting.place
    with _stage(setting, hits=(MIB,), cold=size.cold, crowd=size.crowd) as stage:
        yield {
            "cold": partial(misses.cold, stage, size, place),
            "crowd": partial(misses.crowd, stage, size),
            "slow client": partial(misses.beside_slow, stage, size),
            "image": partial(misses.image, stage, size, place),
            "links": partial(links.measure, stage, size, place / "linked"),
        }


@contextmanager
def _growth(setting: Setting) -> Iterator[dict[str, Measure]]:
    size, place = setting.size, setting.place
    with _stage(setting, hits=(16 * MIB,)) as stage:
        yield {
            "followers": partial(crowds.followers, stage, size, place),
            "idle": partial(crowds.idle, stage, size),
            "slow readers": partial(crowds.slow, stage, size),
            **{
                f"{blobs} blobs": partial(growth.measure, size, place, blobs)
                for blobs in size.blobs
            },
        }


@contextmanager
def _fleet(setting: Setting) -> Iterator[dict[str, Measure]]:
    yield {"day": partial(fleet.measure, setting.size, setting.place)}


@contextmanager
def _bundles(setting: Setting) -> Iterator[dict[str, Measure]]:
    yield {"bundles": partial(bundles.measure, setting.size, setting.place / "bundles")}


@contextmanager
def _stage(
    setting: Setting, *, hits: Sequence[int], cold: int = 1, crowd: int = 2
) -> Iterator[Stage]:
    content = Content(setting.place / "files", hits=hits, cold=cold, crowd=crowd)
    with Stage(setting.place, content, setting.other) as stage:
        yield stage


PARTS = {
    "hits": Part((PULLCACHE, NGINX, CACHE, MIRROR), _hits),
    "misses": Part((PULLCACHE, MIRROR, CACHE, UPSTREAM), _misses),
    "growth": Part((PULLCACHE, NGINX, MIRROR), _growth),
    "fleet": Part((PULLCACHE, fleet.LRU, fleet.TRY, fleet.BEST, fleet.BELADY), _fleet),
    "bundles": Part((PULLCACHE, bundles.COPY, bundles.HASH), _bundles),
}
