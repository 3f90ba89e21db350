"""A day of a fleet in minutes: how much of it a store of a tenth of everything saves upstream.

The daemon serves it all, one request after the other; what other policies had kept is worked out for the same day.
"""

import hashlib
import http.client
import json
import os
import random
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from proxy.storage.space import INDEX_MARGIN
from tests.bench import peers, policies
from tests.bench.content import MIB
from tests.bench.figures import Goal, Row, Size
from tests.bench.stage import PULLCACHE, pullcache
from tests.bench.trace import BLOCK, Blob, Fleet, Image
from tests.system.images import CONFIG, LAYER, MANIFEST
from tests.system.processes import Process
from tests.system.servers import Daemon
from tests.system.wire import answers, connect

SHARE = 10  # the store has room for a tenth of what is pulled in the day
SHARED_MEMORY = Path("/dev/shm")
INDEX = 2 * MIB  # room for the index, which does not shrink with the blobs

LRU, BEST, BELADY, TRY = "LRU", "best", "Belady", "tried"
# The best of these is what is to be come near to; Belady's knows the future.
TRIED = {
    "LRU": policies.lru,
    "LRU of images": policies.lru_of_images,
    "midpoint": policies.midpoint,
    "LFU-DA": policies.lfu_aging,
    "GDSF": policies.gdsf,
    "S3-FIFO": policies.s3_fifo,
}


def measure(size: Size, place: Path) -> Iterator[Row]:
    """Let a day pass through the daemon, with its prefetching and without, and through the others."""
    fleet = Fleet(size.pulls)
    asked = sum(blob.size for pull in fleet.day for blob in pull.requests())
    digests = _publish(fleet, place / "published")
    brought, capacity = _serve(fleet, digests, place, "off")
    prefetched, _ = _serve(fleet, digests, place, "layers")
    missed: dict[str, float] = {name: policy(fleet.day, capacity) for name, policy in TRIED.items()}
    missed |= {PULLCACHE: brought, BELADY: policies.belady(fleet.day, capacity)}
    missed[BEST] = min(missed[name] for name in TRIED)
    hits = {name: [1 - some / asked] for name, some in missed.items()}
    shown = {name: hits[name] for name in (PULLCACHE, LRU, BEST, BELADY)}
    yield Row("byte hit ratio, no prefetch", "", shown, Goal(">=", 0.99, LRU), digits=3)
    near = {name: hits[name] for name in (PULLCACHE, BEST)}
    yield Row("  beside the best that was tried", "", near, Goal(">=", 0.9, BEST), digits=3)
    for name in TRIED:
        beside = {PULLCACHE: hits[PULLCACHE], TRY: hits[name]}
        yield Row(f"  beside {name}", "", beside, digits=3, more=True)
    upstream = {name: [missed[name] / asked] for name in (PULLCACHE, LRU, BEST, BELADY)}
    yield Row("upstream bytes a client's byte", "", upstream, digits=3)
    upstream[PULLCACHE] = [prefetched / asked]
    yield Row("  with prefetch, as by default", "", upstream, digits=3)


def _serve(fleet: Fleet, digests: dict[Blob, str], place: Path, prefetch: str) -> tuple[float, int]:
    """Let the daemon serve the day; return the bytes that upstream sent, and what its store had room for."""
    nginx = place / f"nginx-{prefetch}"
    nginx.mkdir()
    port = peers.free_port()
    command = peers.static_nginx(nginx, port, place / "published", manifests=MANIFEST)
    upstream = Process(nginx, "nginx", command)
    limit = fleet.total // SHARE + INDEX + INDEX_MARGIN
    env = {"PULLCACHE_FETCH_PREFETCH": prefetch, "PULLCACHE_MANIFESTS_TTL": "1d"}
    try:
        url = f"http://127.0.0.1:{port}"
        upstream.wait_until(partial(answers, url, "/v2/", 403), "an answer")
        # In memory, if there is such a place: this is not about the disk.
        memory = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else place
        with (
            tempfile.TemporaryDirectory(prefix="bench-", dir=memory) as home,
            pullcache(Path(home) / "daemon", url, env, str(limit)) as daemon,
        ):
            _pull(daemon, fleet, digests)
            index = sum(file.stat().st_size for file in daemon.store.glob("index.sqlite*"))
            return daemon.upstream_bytes(), limit - index - INDEX_MARGIN
    finally:
        upstream.stop()


def _pull(daemon: Daemon, fleet: Fleet, digests: dict[Blob, str]) -> None:
    connection = connect(daemon.url, timeout=60)
    for pull in fleet.day:
        base = f"/v2/{_name(pull.image)}"
        _get(connection, f"{base}/manifests/v{pull.image.version}", BLOCK)
        for blob in pull.wanted:
            _get(connection, f"{base}/blobs/{digests[blob]}", blob.size)
    connection.close()


def _get(connection: http.client.HTTPConnection, path: str, size: int) -> None:
    connection.request("GET", path, headers={"Accept": MANIFEST})
    answer = connection.getresponse()
    body = answer.read()
    assert (answer.status, len(body)) == (200, size), f"{answer.status} for {path}: {body!r:.200}"


def _publish(fleet: Fleet, root: Path) -> dict[Blob, str]:
    """Write everything that is pulled as files for nginx; return the digests of configs and layers."""
    digests: dict[Blob, str] = {}
    for image in {pull.image: None for pull in fleet.day}:
        place = root / "v2" / _name(image)
        for kind in ("blobs", "manifests"):
            (place / kind).mkdir(parents=True, exist_ok=True)
        for blob in image.blobs:
            content = random.Random(blob.number).randbytes(blob.size)
            digests[blob] = _digest(content)
            (place / "blobs" / digests[blob]).write_bytes(content)
        content = _manifest(image, digests)
        for reference in (f"v{image.version}", _digest(content)):
            (place / "manifests" / reference).write_bytes(content)
    return digests


def _name(image: Image) -> str:
    return f"team/app{image.repository}"


def _manifest(image: Image, digests: dict[Blob, str]) -> bytes:
    """Return the manifest of an image, as many bytes as the trace says."""
    config, *layers = (
        {"mediaType": LAYER, "digest": digests[blob], "size": blob.size} for blob in image.blobs
    )
    document: dict[str, Any] = {"schemaVersion": 2, "mediaType": MANIFEST}
    document |= {"config": {**config, "mediaType": CONFIG}, "layers": layers}
    return json.dumps(document).encode().ljust(image.manifest.size)


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()
