"""Growth: start, memory, listing and eviction with a thousand, a hundred thousand and a million blobs."""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench import proc
from tests.bench.content import MIB
from tests.bench.figures import Goal, LoadSize, Row
from tests.bench.filled_store import fill
from tests.bench.probe import probing
from tests.bench.testbed import PULLCACHE
from tests.system.http_client import send_request
from tests.system.images import MANIFEST
from tests.system.processes import UNREACHABLE, run
from tests.system.servers import Daemon

MAX_SIZE = "100TB"  # more than the disk has; the files of layers are sparse
BATCH = 64  # blobs that a larger eviction removes


def measure(size: LoadSize, directory: Path, blobs: int) -> Iterator[Row]:
    """Fill a store, start a daemon on it in each round, list its images, evict."""
    home = directory / f"store{blobs}"
    path = fill(home / "store", blobs)
    try:
        yield from _start(size, home, path, blobs)
        yield from _list(home, path, blobs)
        yield from _evict(size, home, blobs)
    finally:
        shutil.rmtree(home)


def _start(size: LoadSize, home: Path, path: str, blobs: int) -> Iterator[Row]:
    seconds, cpu, memory = [], [], []
    for _ in range(size.rounds):
        daemon = Daemon(home, UNREACHABLE, max_size=MAX_SIZE)
        try:
            started = time.perf_counter()
            daemon.start()
            _hit(daemon, path)
            seconds.append(time.perf_counter() - started)
            cpu.append(proc.cpu_seconds(daemon.process.pid))
            memory.append(proc.resident_bytes(daemon.process.pid) / MIB)
        finally:
            daemon.finish()
    work = f"{blobs:,} blobs: start to first hit"
    yield Row(work, "s", {PULLCACHE: seconds}, Goal("<=", 2), digits=2)
    yield Row("  CPU", "s", {PULLCACHE: cpu}, digits=2)
    yield Row(f"{blobs:,} blobs: idle memory", "MiB", {PULLCACHE: memory}, Goal("<=", 80))


def _list(home: Path, path: str, blobs: int) -> Iterator[Row]:
    daemon = Daemon(home, UNREACHABLE, max_size=MAX_SIZE)
    try:
        daemon.start()
        with probing(daemon.url, path) as latencies:
            started = time.perf_counter()
            daemon.run("images", "--json", timeout=900)
            seconds = time.perf_counter() - started
        peak = proc.peak_bytes(daemon.process.pid) / MIB
    finally:
        daemon.finish()
    yield Row(f"{blobs:,} blobs: images", "s", {PULLCACHE: [seconds]}, digits=2)
    latency = latencies.percentile(0.99) * 1e3
    yield Row("  manifest's 99th percentile", "ms", {PULLCACHE: [latency]}, digits=1)
    yield Row("  peak memory", "MiB", {PULLCACHE: [peak]})


def _evict(size: LoadSize, home: Path, blobs: int) -> Iterator[Row]:
    """Evict one blob, and many at once, several times: the first eviction finds cold caches."""
    times = str(2 * size.rounds + 1)
    for count in (1, BATCH):
        argv = [sys.executable, "-m", "tests.bench.loop_time", str(home / "store")]
        evictions = json.loads(run(*argv, times, str(count)))
        blocked = {PULLCACHE: [one["loop"] for one in evictions]}
        what = "one eviction" if count == 1 else f"evicting {count}"
        yield Row(f"{blobs:,} blobs: {what}", "ms", blocked, Goal("<=", 5), digits=1)
        elapsed = statistics.median(one["elapsed"] for one in evictions)
        yield Row("  until it is done", "ms", {PULLCACHE: [elapsed]}, digits=1)


def _hit(daemon: Daemon, path: str) -> None:
    response = send_request(daemon.url, path, headers={"Accept": MANIFEST})
    assert response.status == 200, f"{response.status} for {path}"
