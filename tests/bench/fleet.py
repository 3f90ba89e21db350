"""A fleet's day of pulls: the byte hit ratio of a store with room for a tenth of all pulled content.

The daemon serves the day in minutes, one request after the other. For other eviction policies the ratio is
simulated.
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
from tests.bench.figures import Goal, LoadSize, Row
from tests.bench.testbed import PULLCACHE, pullcache
from tests.bench.trace import BLOCK, Fleet, SimulatedBlob, SimulatedImage
from tests.system.http_client import connect, has_status
from tests.system.images import CONFIG, LAYER, MANIFEST
from tests.system.processes import Process
from tests.system.servers import Daemon

SHARE = 10  # the store has room for a tenth of the content pulled in the day
SHARED_MEMORY = Path("/dev/shm")
INDEX_SIZE = 2 * MIB  # unlike the blobs, the index is as large as in production

LRU, BEST, BELADY, COMPARED = "LRU", "best", "Belady", "policy"
# The goal is to come close to the best of these. Belady's policy, which knows the future, is not among them.
POLICIES = {
    "LRU": policies.lru,
    "LRU of images": policies.lru_of_images,
    "midpoint": policies.midpoint,
    "LFU-DA": policies.lfu_aging,
    "GDSF": policies.gdsf,
    "S3-FIFO": policies.s3_fifo,
}


def measure(size: LoadSize, directory: Path) -> Iterator[Row]:
    """Measure the daemon with and without prefetch, and simulate the other policies."""
    fleet = Fleet(size.pulls)
    requested = sum(blob.size for pull in fleet.day for blob in pull.requests())
    digests = _publish(fleet, directory / "published")
    fetched, capacity = _serve(fleet, digests, directory, "off")
    with_prefetch, _ = _serve(fleet, digests, directory, "layers")
    missed: dict[str, float] = {
        name: policy(fleet.day, capacity) for name, policy in POLICIES.items()
    }
    missed |= {PULLCACHE: fetched, BELADY: policies.belady(fleet.day, capacity)}
    missed[BEST] = min(missed[name] for name in POLICIES)
    ratios = {name: [1 - missing / requested] for name, missing in missed.items()}
    shown = {name: ratios[name] for name in (PULLCACHE, LRU, BEST, BELADY)}
    yield Row("byte hit ratio, no prefetch", "", shown, Goal(">=", 0.99, LRU), digits=3)
    best = {name: ratios[name] for name in (PULLCACHE, BEST)}
    yield Row("  against the best policy", "", best, Goal(">=", 0.9, BEST), digits=3)
    for name in POLICIES:
        compared = {PULLCACHE: ratios[PULLCACHE], COMPARED: ratios[name]}
        yield Row(f"  against {name}", "", compared, digits=3, more=True)
    upstream = {name: [missed[name] / requested] for name in (PULLCACHE, LRU, BEST, BELADY)}
    yield Row("upstream bytes per client byte", "", upstream, digits=3)
    upstream[PULLCACHE] = [with_prefetch / requested]
    yield Row("  with prefetch (the default)", "", upstream, digits=3)


def _serve(
    fleet: Fleet, digests: dict[SimulatedBlob, str], directory: Path, prefetch: str
) -> tuple[float, int]:
    """Let the daemon serve the day; return the bytes from upstream and the store's room for blobs."""
    nginx = directory / f"nginx-{prefetch}"
    nginx.mkdir()
    port = peers.free_port()
    command = peers.static_nginx(nginx, port, directory / "published", manifests=MANIFEST)
    upstream = Process(nginx, "nginx", command)
    limit = fleet.total // SHARE + INDEX_SIZE + INDEX_MARGIN
    env = {"PULLCACHE_FETCH_PREFETCH": prefetch, "PULLCACHE_MANIFESTS_TTL": "1d"}
    try:
        url = f"http://127.0.0.1:{port}"
        upstream.wait_until(partial(has_status, url, "/v2/", 403), "a response")
        # In memory where possible: the speed of the disk does not matter here.
        parent = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else directory
        with (
            tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as home,
            pullcache(Path(home) / "daemon", url, env, str(limit)) as daemon,
        ):
            _pull(daemon, fleet, digests)
            index = sum(file.stat().st_size for file in daemon.store.glob("index.sqlite*"))
            return daemon.upstream_bytes(), limit - index - INDEX_MARGIN
    finally:
        upstream.stop()


def _pull(daemon: Daemon, fleet: Fleet, digests: dict[SimulatedBlob, str]) -> None:
    connection = connect(daemon.url, timeout=60)
    for pull in fleet.day:
        base = f"/v2/{_name(pull.image)}"
        _get(connection, f"{base}/manifests/v{pull.image.version}", BLOCK)
        for blob in pull.requested:
            _get(connection, f"{base}/blobs/{digests[blob]}", blob.size)
    connection.close()


def _get(connection: http.client.HTTPConnection, path: str, size: int) -> None:
    connection.request("GET", path, headers={"Accept": MANIFEST})
    response = connection.getresponse()
    body = response.read()
    problem = f"{response.status} for {path}: {body!r:.200}"
    assert (response.status, len(body)) == (200, size), problem


def _publish(fleet: Fleet, root: Path) -> dict[SimulatedBlob, str]:
    """Write all pulled content as files for nginx; return the digests of configs and layers."""
    digests: dict[SimulatedBlob, str] = {}
    for image in {pull.image: None for pull in fleet.day}:
        repository = root / "v2" / _name(image)
        for kind in ("blobs", "manifests"):
            (repository / kind).mkdir(parents=True, exist_ok=True)
        for blob in image.blobs:
            content = random.Random(blob.number).randbytes(blob.size)
            digests[blob] = _digest(content)
            (repository / "blobs" / digests[blob]).write_bytes(content)
        content = _manifest(image, digests)
        for reference in (f"v{image.version}", _digest(content)):
            (repository / "manifests" / reference).write_bytes(content)
    return digests


def _name(image: SimulatedImage) -> str:
    return f"team/app{image.repository}"


def _manifest(image: SimulatedImage, digests: dict[SimulatedBlob, str]) -> bytes:
    """Return the manifest of an image, padded to the size that the trace gives it."""
    config, *layers = (
        {"mediaType": LAYER, "digest": digests[blob], "size": blob.size} for blob in image.blobs
    )
    document: dict[str, Any] = {"schemaVersion": 2, "mediaType": MANIFEST}
    document |= {"config": {**config, "mediaType": CONFIG}, "layers": layers}
    return json.dumps(document).encode().ljust(image.manifest.size)


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()
