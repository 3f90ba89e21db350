"""Pages of a large index, and how long a manifest takes beside many of them.

The store is that of `large_index`: 100,000 images. A list in the order of sizes waits for the table of all
images, whose time is a row of its own.
"""

import http.client
import json
import shutil
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, urlsplit

from tests.bench import large_index, proc
from tests.bench.burner import burning
from tests.bench.figures import Goal, LoadSize, Row
from tests.bench.growth import MAX_SIZE
from tests.bench.probe import probing
from tests.bench.testbed import PULLCACHE
from tests.system.processes import UNREACHABLE
from tests.system.servers import Daemon

REPEATS = 5
GOAL = Goal("<=", 200)
RATE = 50  # pages in a second
READERS = 5
BURNER = "same CPU"
# What pages may cost a manifest beyond the CPU they take: some slices of rendering, some turns of the interpreter.
BESIDE_GOAL = Goal("<=", 1.0, BURNER, plus=3)
# How long the first table of a large index may take, in seconds.
TABLE_TIMEOUT = 170.0
# Every list of the probe is this many seconds of load.
MIN_SECONDS = 5.0


def measure(size: LoadSize, directory: Path) -> Iterator[Row]:
    """Make the store, measure each page, and a manifest beside 50 pages a second."""
    home = directory / "pages"
    large_index.fill(home / "store", size.repositories)
    env = {"PULLCACHE_OFFLINE": "true", "PULLCACHE_SERVER_ADMIN_LISTEN": "127.0.0.1:0"}
    daemon = Daemon(home, UNREACHABLE, max_size=MAX_SIZE, env=env)
    try:
        daemon.start()
        reader = PageReader(_find_address(daemon))
        middle = f"team{size.repositories // 400}/app0:v0"
        pages = {
            "overview": "/",
            "images": "/images",
            "images from the middle": f"/images?after={middle}",
            "images, searched": "/images?q=app77",
            "one image": f"/images/{middle}",
            "search": "/search?q=app77",
            "unplug": f"/unplug?list={quote(middle)}",
            "activity": "/activity",
            "upstreams": "/upstreams",
            "storage": "/storage",
            "policy": "/policy",
            "schedules": "/schedules",
            "connect": "/connect",
            "settings": "/settings",
        }
        for name, path in pages.items():
            yield _page_row(reader, f"{size.repositories:,} images: {name}", path)
        yield Row("  table of all images", "s", {PULLCACHE: [_wait_for_table(reader)]}, digits=1)
        ordered = {
            "by size": "/images?order=size",
            "by pulls": "/images?order=pulls",
            "partial ones": "/images?state=partial&order=unique",
            "by size, searched": "/images?order=size&q=app77",
        }
        for name, path in ordered.items():
            yield _page_row(reader, f"images, {name}", path)
        yield from _beside_pages(daemon, reader.address, middle, max(MIN_SECONDS, size.seconds * 2))
    finally:
        daemon.finish()
        shutil.rmtree(home)


class PageReader:
    """A browser's connection to the pages."""

    def __init__(self, address: str) -> None:
        self.address = address
        host, _, port = address.rpartition(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=60)

    def read(self, path: str) -> int:
        """Request a page; return its status."""
        self._connection.request("GET", path, headers={"Accept": "text/html"})
        response = self._connection.getresponse()
        body = response.read()
        assert b"</html>" in body, body[:300]
        return response.status


def _find_address(daemon: Daemon) -> str:
    connection = http.client.HTTPConnection("localhost", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    with closing(connection.sock):
        connection.sock.connect(str(daemon.store / "admin.sock"))
        connection.request("POST", "/api/v1/pages/link")
        url: str = json.loads(connection.getresponse().read())["url"]
    return urlsplit(url).netloc


def _page_row(reader: PageReader, name: str, path: str) -> Row:
    reader.read(path)
    seconds = []
    for number in range(REPEATS):
        # The third and later requests within a second would not be rendered anew.
        asked = f"{path}{'&' if '?' in path else '?'}number={number}"
        started = time.perf_counter()
        status = reader.read(asked)
        seconds.append(time.perf_counter() - started)
        assert status == 200, f"{path}: {status}"
    return Row(name, "ms", {PULLCACHE: [statistics.median(seconds) * 1e3]}, GOAL, digits=1)


def _wait_for_table(reader: PageReader) -> float:
    """Return the seconds until images are listed by size, with their platforms."""
    started = time.perf_counter()
    while reader.read("/images?order=size&platform=linux/amd64") != 200:
        assert time.perf_counter() - started < TABLE_TIMEOUT, "there is no table of images"
        time.sleep(0.2)
    return time.perf_counter() - started


def _beside_pages(daemon: Daemon, address: str, image: str, seconds: float) -> Iterator[Row]:
    """Measure a manifest alone, beside 50 pages a second, and beside the same CPU burnt elsewhere, in turn.

    That CPU is what the pages cost, here and in the daemon. So the last figure has what sharing the cores
    costs, and what the first exceeds it by is the work on pages within the daemon.
    """
    manifest = f"/v2/{image.partition(':')[0]}/manifests/v0"
    pid = daemon.process.pid
    alone: list[float] = []
    beside: list[float] = []
    burnt: list[float] = []
    rates: list[float] = []
    costs: list[float] = []
    for _ in range(3):
        with probing(daemon.url, manifest) as latencies:
            daemon_alone = proc.cpu_seconds(pid)
            time.sleep(seconds)
            daemon_alone = proc.cpu_seconds(pid) - daemon_alone
        alone.append(latencies.percentile(0.99) * 1e3)
        with probing(daemon.url, manifest) as latencies:
            before = proc.cpu_seconds(pid) + time.process_time()
            pages = _read_pages(address, image, seconds)
            spent = proc.cpu_seconds(pid) + time.process_time() - before - daemon_alone
        beside.append(latencies.percentile(0.99) * 1e3)
        rates.append(pages / seconds)
        costs.append(max(0.0, spent / pages))
        with burning(RATE, costs[-1]), probing(daemon.url, manifest) as latencies:
            time.sleep(seconds)
        burnt.append(latencies.percentile(0.99) * 1e3)
    yield Row("manifest, p99", "ms", {PULLCACHE: alone}, digits=2)
    rate = f"{statistics.median(rates):.0f} pages a second"
    yield Row(f"  beside {rate}", "ms", {PULLCACHE: beside, BURNER: burnt}, BESIDE_GOAL, digits=2)
    cost = [one * 1e3 for one in costs]
    yield Row("  CPU time of a page and its reader", "ms", {PULLCACHE: cost}, digits=2)


def _read_pages(address: str, image: str, seconds: float) -> int:
    """Read pages at `RATE` for so long, from `READERS` connections; return how many."""
    paths = ["/", "/images?q=app77", f"/images/{image}", "/connect", "/settings"]
    counts: list[int] = []

    def read(offset: int) -> None:
        reader = PageReader(address)
        ends_at = time.monotonic() + seconds
        next_at = time.monotonic() + offset / RATE
        count = 0
        while (now := time.monotonic()) < ends_at:
            if now < next_at:
                time.sleep(min(next_at, ends_at) - now)
                continue
            reader.read(paths[(offset + count) % len(paths)])
            count += 1
            next_at += READERS / RATE
        counts.append(count)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts)
