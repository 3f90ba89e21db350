"""Lists and searches of a large index, and how long `/healthz` takes meanwhile.

The index has a repository for each of 100,000 images, a million links, and manifests and tags at their
bounds. The files of layers are missing, because nothing here reads them.
"""

import hashlib
import http.client
import json
import shutil
import socket
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from proxy.storage import index_writes
from proxy.storage.blobs import BlobStore
from tests.bench import proc
from tests.bench.content import MIB
from tests.bench.figures import Goal, LoadSize, Row
from tests.bench.growth import MAX_SIZE
from tests.bench.probe import probing
from tests.bench.testbed import PULLCACHE
from tests.system.http_client import send_request
from tests.system.images import CONFIG, LAYER, MANIFEST
from tests.system.processes import UNREACHABLE
from tests.system.servers import Daemon

LINKS = 10  # of each repository
SHARED_LAYERS = 5_000
LARGE_MANIFESTS = 50  # with `index_writes.MAX_CHILDREN` blobs each
TAGS = 20_000  # of one repository
REPEATS = 3
CLIENTS = 10  # that ask at once
GOAL = Goal("<=", 200)
_BATCH = 5_000

_INSERT = {
    "repositories": "INSERT INTO repositories (id, upstream, name) VALUES (?, ?, ?)",
    "blobs": "INSERT INTO blobs (digest, size, media_type, used) VALUES (?, ?, ?, ?)",
    "edges": "INSERT INTO edges (parent, child, size) VALUES (?, ?, ?)",
    "links": "INSERT INTO links (repository, digest) VALUES (?, ?)",
    "tags": "INSERT INTO tags (repository, tag, digest, checked) VALUES (?, ?, ?, ?)",
}
_Rows = dict[str, list[tuple[object, ...]]]


def measure(size: LoadSize, directory: Path) -> Iterator[Row]:
    """Make the store, and measure each list by one client and by many at once."""
    home = directory / "large"
    fill(home / "store", size.repositories)
    daemon = Daemon(home, UNREACHABLE, max_size=MAX_SIZE, env={"PULLCACHE_OFFLINE": "true"})
    try:
        daemon.start()
        for name, ask in _requests(daemon, size.repositories).items():
            yield from _measure(daemon, f"{size.repositories:,} repositories: {name}", ask)
        # Each names thousands of blobs, and all of them are looked up.
        ask = partial(_ask_admin, daemon, "/api/v1/images?limit=2&after=zoo0/large:v0")
        yield from _measure(daemon, "two images at the bounds", ask, goal=None)
        peak = proc.peak_bytes(daemon.process.pid) / MIB
        yield Row("  peak memory", "MiB", {PULLCACHE: [peak]})
    finally:
        daemon.finish()
        shutil.rmtree(home)


def _requests(daemon: Daemon, repositories: int) -> dict[str, Callable[[], object]]:
    middle = f"team{repositories // 200}/app"
    paths = {
        "catalog, 100": "/v2/_catalog?n=100",
        "catalog, 100 from the middle": f"/v2/_catalog?n=100&last={middle}",
        "catalog, 10,000": "/v2/_catalog?n=10000",
        "search": "/v1/search?q=app9&n=100",
        "search, far page": f"/v1/search?q=app&n=100&page={min(100, repositories // 100)}",
        "search without terms": "/v1/search?q=&n=25",
        "tags": "/v2/zoo/tags/tags/list",
        "tags, 100": "/v2/zoo/tags/tags/list?n=100&last=v1",
    }
    admin = {
        "images, 100": "/api/v1/images?limit=100",
        "images, 100 from the middle": f"/api/v1/images?limit=100&after={middle}0:v0",
        "images, filtered": "/api/v1/images?limit=100&filter=app77",
        "images of many tags, 100": "/api/v1/images?limit=100&after=zoo/tags:v1",
    }
    return {
        **{name: partial(_ask, daemon, path) for name, path in paths.items()},
        **{name: partial(_ask_admin, daemon, path) for name, path in admin.items()},
    }


def _measure(
    daemon: Daemon, name: str, ask: Callable[[], object], goal: Goal | None = GOAL
) -> Iterator[Row]:
    ask()
    with probing(daemon.url, "/healthz") as latencies:
        seconds = [_timed(ask) for _ in range(REPEATS)]
        threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    median = statistics.median(seconds) * 1e3
    yield Row(name, "ms", {PULLCACHE: [median]}, goal, digits=1)
    longest = latencies.percentile(1.0) * 1e3
    yield Row(f"  longest /healthz, {CLIENTS} ask", "ms", {PULLCACHE: [longest]}, Goal("<=", 100))


def _timed(ask: Callable[[], object]) -> float:
    started = time.perf_counter()
    ask()
    return time.perf_counter() - started


def _ask(daemon: Daemon, path: str) -> None:
    response = send_request(daemon.url, path, timeout=60)
    assert response.status == 200, f"{response.status} for {path}: {response.body[:300]!r}"
    assert len(response.body) > 100, response.body


def _ask_admin(daemon: Daemon, path: str) -> None:
    connection = http.client.HTTPConnection("localhost", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    with closing(connection.sock):
        connection.sock.connect(str(daemon.store / "admin.sock"))
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    assert response.status == 200, f"{response.status} for {path}: {body[:300]!r}"
    assert len(body) > 100, body


def fill(root: Path, repositories: int) -> None:
    """Make a store with an image in each of so many repositories."""
    store = BlobStore(root)
    folder = root / "blobs" / "sha256"
    with closing(index_writes.open_connection(root / "index.sqlite")) as connection:
        connection.execute("PRAGMA cache_size = -1000000")
        connection.execute("PRAGMA synchronous = OFF")
        layers = [f"sha256:{_hash(f'layer {number}')}" for number in range(SHARED_LAYERS)]
        now = time.time()
        rows = [(layer, MIB, None, now - 1e6 + n) for n, layer in enumerate(layers)]
        _insert(connection, {"blobs": rows})  # type: ignore[dict-item]
        for start in range(0, repositories, _BATCH):
            batch: _Rows = {table: [] for table in _INSERT}
            for number in range(start, min(start + _BATCH, repositories)):
                _add_image(batch, folder, number, layers, now - repositories + number)
            _insert(connection, batch)
        large: _Rows = {table: [] for table in _INSERT}
        for number in range(LARGE_MANIFESTS):
            _add_large_manifest(large, folder, number, now + number)
        manifest = _add_manifest(large, folder, repositories, layers[:LINKS], now - 1)
        large["repositories"].append((2_000_000, "docker.io", "zoo/tags"))
        large["links"] += [(2_000_000, digest) for digest in (manifest, *layers[:LINKS])]
        large["tags"] += [(2_000_000, f"v{number}", manifest, now) for number in range(TAGS)]
        _insert(connection, large)
    store.close()


def _insert(connection: sqlite3.Connection, batch: _Rows) -> None:
    with connection:
        for table, rows in batch.items():
            connection.executemany(_INSERT[table], rows)


def _add_image(batch: _Rows, folder: Path, number: int, layers: list[str], used: float) -> None:
    """Write the manifest of one image, and add its rows."""
    children = [layers[(number * 7 + n * 613) % len(layers)] for n in range(LINKS - 1)]
    manifest = _add_manifest(batch, folder, number, children, used)
    # Two hundred of each group, as projects have.
    batch["repositories"].append((number, "docker.io", f"team{number // 200}/app{number % 200}"))
    batch["links"] += [(number, digest) for digest in dict.fromkeys([manifest, *children])]
    batch["tags"].append((number, "v0", manifest, used))


def _add_large_manifest(batch: _Rows, folder: Path, number: int, used: float) -> None:
    children = [f"sha256:{_hash(f'{number} {n}')}" for n in range(index_writes.MAX_CHILDREN)]
    batch["blobs"] += [(child, MIB, None, used - 1e6 + n / 1e5) for n, child in enumerate(children)]
    manifest = _add_manifest(batch, folder, -number, children, used)
    repository = 1_000_000 + number
    batch["repositories"].append((repository, "docker.io", f"zoo{number}/large"))
    batch["links"] += [(repository, digest) for digest in (manifest, *children)]
    batch["tags"].append((repository, "v0", manifest, used))


def _add_manifest(batch: _Rows, folder: Path, number: int, children: list[str], used: float) -> str:
    descriptors = [
        {"mediaType": LAYER if n else CONFIG, "digest": digest, "size": MIB}
        for n, digest in enumerate(children)
    ]
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptors[0],
        "layers": descriptors[1:],
        "annotations": {"number": str(number)},
    }
    content = json.dumps(document).encode()
    name = hashlib.sha256(content).hexdigest()
    (folder / name).write_bytes(content)
    manifest = f"sha256:{name}"
    batch["blobs"].append((manifest, len(content), MANIFEST, used))
    batch["edges"] += [(manifest, child, MIB) for child in dict.fromkeys(children)]
    return manifest


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
