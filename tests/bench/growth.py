"""Growth: what a daemon takes whose index holds a thousand, a hundred thousand, a million blobs."""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench import proc
from tests.bench.content import MIB
from tests.bench.figures import Goal, Row, Size
from tests.bench.filled import fill
from tests.bench.probe import probing
from tests.bench.stage import PULLCACHE
from tests.system.images import MANIFEST
from tests.system.processes import NOWHERE, run
from tests.system.servers import Daemon
from tests.system.wire import ask

ROOMY = "100TB"  # layers are sparse, so this is no promise of the disk's
BATCH = 64  # blobs that one eviction takes where it takes many


def measure(size: Size, place: Path, blobs: int) -> Iterator[Row]:
    """Fill a store, start on it as often as there are rounds, list its images, evict."""
    home = place / f"store{blobs}"
    path = fill(home / "store", blobs)
    try:
        yield from _start(size, home, path, blobs)
        yield from _list(home, path, blobs)
        yield from _evict(size, home, blobs)
    finally:
        shutil.rmtree(home)


def _start(size: Size, home: Path, path: str, blobs: int) -> Iterator[Row]:
    started, spent, held = [], [], []
    for _ in range(size.rounds):
        daemon = Daemon(home, NOWHERE, max_size=ROOMY)
        try:
            began = time.perf_counter()
            daemon.start()
            _hit(daemon, path)
            started.append(time.perf_counter() - began)
            spent.append(proc.cpu_seconds(daemon.process.pid))
            held.append(proc.memory(daemon.process.pid) / MIB)
        finally:
            daemon.finish()
    work = f"{blobs:,} blobs: start to first hit"
    yield Row(work, "s", {PULLCACHE: started}, Goal("<=", 2), digits=2)
    yield Row("  its CPU", "s", {PULLCACHE: spent}, digits=2)
    yield Row(f"{blobs:,} blobs: idle memory", "MiB", {PULLCACHE: held}, Goal("<=", 80))


def _list(home: Path, path: str, blobs: int) -> Iterator[Row]:
    daemon = Daemon(home, NOWHERE, max_size=ROOMY)
    try:
        daemon.start()
        with probing(daemon.url, path) as latencies:
            began = time.perf_counter()
            daemon.run("images", "--json", timeout=900)
            taken = time.perf_counter() - began
        peak = proc.peak(daemon.process.pid) / MIB
    finally:
        daemon.finish()
    yield Row(f"{blobs:,} blobs: images", "s", {PULLCACHE: [taken]}, digits=2)
    waited = latencies.percentile(0.99) * 1e3
    yield Row("  manifest's 99th percentile", "ms", {PULLCACHE: [waited]}, digits=1)
    yield Row("  peak memory", "MiB", {PULLCACHE: [peak]})


def _evict(size: Size, home: Path, blobs: int) -> Iterator[Row]:
    """Evict one blob, and many at a time, more often than the first that finds everything cold."""
    times = str(2 * size.rounds + 1)
    for many in (1, BATCH):
        argv = [sys.executable, "-m", "tests.bench.looptime", str(home / "store")]
        found = json.loads(run(*argv, times, str(many)))
        kept = {PULLCACHE: [one["loop"] for one in found]}
        what = "one eviction" if many == 1 else f"evicting {many}"
        yield Row(f"{blobs:,} blobs: {what}", "ms", kept, Goal("<=", 5), digits=1)
        passed = statistics.median(one["passed"] for one in found)
        yield Row("  until it is done", "ms", {PULLCACHE: [passed]}, digits=1)


def _hit(daemon: Daemon, path: str) -> None:
    answer = ask(daemon.url, path, headers={"Accept": MANIFEST})
    assert answer.status == 200, f"{answer.status} for {path}"
