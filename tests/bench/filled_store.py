"""Makes the store of a daemon that has run for a long time: an index of many blobs, and a file for each.

The files of layers are sparse, because their content is never read.
"""

import hashlib
import json
import os
import sqlite3
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from proxy.storage import index_writes
from proxy.storage.blobs import BlobStore
from tests.bench.content import MIB
from tests.system.images import CONFIG, LAYER, MANIFEST

LAYERS = 10
REPOSITORIES = 500
LAYER_SIZE = MIB
_BATCH = 1000  # images inserted per transaction

_INSERT = {
    "blobs": "INSERT INTO blobs (digest, size, media_type, used) VALUES (?, ?, ?, ?)",
    "edges": "INSERT INTO edges (parent, child, size) VALUES (?, ?, ?)",
    "links": "INSERT INTO links (repository, digest) VALUES (?, ?)",
    "tags": "INSERT INTO tags (repository, tag, digest, checked) VALUES (?, ?, ?, ?)",
}


def fill(root: Path, blobs: int) -> str:
    """Make a store with about `blobs` blobs; return the URL path of the newest image's manifest."""
    store = BlobStore(root)
    folder = root / "blobs" / "sha256"
    images = blobs // (LAYERS + 2)
    now = time.time()
    with closing(index_writes.open_connection(root / "index.sqlite")) as connection:
        connection.execute("PRAGMA cache_size = -1000000")
        connection.execute("PRAGMA synchronous = OFF")
        with connection:
            rows = [(number, "docker.io", f"team/app{number}") for number in range(REPOSITORIES)]
            query = "INSERT INTO repositories (id, upstream, name) VALUES (?, ?, ?)"
            connection.executemany(query, rows)
        all_rows = (_write_image(folder, number, now - images + number) for number in range(images))
        while batch := list(islice(all_rows, _BATCH)):
            with connection:
                _insert(connection, batch)
    store.close()
    last = images - 1
    return f"/v2/team/app{last % REPOSITORIES}/manifests/v{last}"


def _insert(connection: sqlite3.Connection, images: list[dict[str, list[Any]]]) -> None:
    for table, query in _INSERT.items():
        connection.executemany(query, [row for image in images for row in image[table]])


def _write_image(folder: Path, number: int, used: float) -> dict[str, list[Any]]:
    """Write the files of one image; return its rows by table."""
    layers = [_write_sparse(folder, f"{number} {layer}", LAYER_SIZE) for layer in range(LAYERS)]
    config = {**_write_sparse(folder, f"{number} config", 4000), "mediaType": CONFIG}
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}
    content = json.dumps(document).encode()
    name = hashlib.sha256(content).hexdigest()
    (folder / name).write_bytes(content)
    manifest = f"sha256:{name}"
    children = [(blob["digest"], blob["size"]) for blob in (config, *layers)]
    digests = [manifest, *(digest for digest, _ in children)]
    repository = number % REPOSITORIES
    return {
        "blobs": [
            (manifest, len(content), MANIFEST, used),
            *((digest, size, None, used) for digest, size in children),
        ],
        "edges": [(manifest, digest, size) for digest, size in children],
        "links": [(repository, digest) for digest in digests],
        "tags": [(repository, f"v{number}", manifest, used)],
    }


def _write_sparse(folder: Path, seed: str, size: int) -> dict[str, Any]:
    """Write a sparse file of `size` bytes, named after the digest of `seed`; return its descriptor."""
    name = hashlib.sha256(seed.encode()).hexdigest()
    fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, size)
    os.close(fd)
    return {"mediaType": LAYER, "digest": f"sha256:{name}", "size": size}
