"""Bundles: an export into a file and an import from one, beside what copies the same file, and what hashes it.

All of them alternately, on one disk, with a warm page cache, and until the bytes are on the disk.
"""

import io
import json
import os
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.content import MIB
from tests.bench.figures import Goal, Row, Size
from tests.bench.stage import PULLCACHE, STORE_SIZE
from tests.fakes.content import descriptor
from tests.system.images import CONFIG, LAYER, MANIFEST
from tests.system.processes import NOWHERE
from tests.system.servers import Daemon

COPY, HASH = "cp", "sha256sum"
NAME = "docker.io/library/bundled:latest"
LAYER_SIZE = 64 * MIB


def measure(size: Size, place: Path) -> Iterator[Row]:
    """Measure exports and imports of a bundle as large as the cold blob of the other figures."""
    place.mkdir()
    bundle, copy, exported = (place / name for name in ("bundle.tar", "copy.tar", "exported.tar"))
    _make(bundle, size.cold)
    daemon = Daemon(place / "daemon", NOWHERE, max_size=STORE_SIZE)
    figures: dict[str, dict[str, list[float]]] = {"import": {}, "export": {}}
    try:
        daemon.start()
        for _ in range(size.rounds):
            for path in (copy, exported):
                path.unlink(missing_ok=True)
            copied = _rate(bundle, ["cp", bundle, copy], ["sync", copy])
            hashed = _rate(bundle, ["sha256sum", bundle])
            command = [*daemon.python, "import", "--store", daemon.store, bundle]
            imported = _rate(bundle, command)
            command = [*daemon.python, "export", "--store", daemon.store, NAME, "-o", exported]
            both = {"import": imported, "export": _rate(bundle, command)}
            for what, rate in both.items():
                for name, one in ((PULLCACHE, rate), (COPY, copied), (HASH, hashed)):
                    figures[what].setdefault(name, []).append(one)
            daemon.run("rm", NAME)
    finally:
        daemon.finish()
    for what, rates in figures.items():
        work = f"{size.cold // MIB} MiB bundle, {what}"
        ours = rates[PULLCACHE]
        yield Row(work, "MB/s", {PULLCACHE: ours, COPY: rates[COPY]}, Goal(">=", 0.5, COPY))
        hashing = {PULLCACHE: ours, HASH: rates[HASH]}
        yield Row("  beside sha256sum", "MB/s", hashing, Goal(">=", 0.5, HASH))


def _rate(bundle: Path, *commands: list[Any]) -> float:
    """Return how many megabytes of the bundle a second the commands manage, one after the other."""
    began = time.perf_counter()
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return bundle.stat().st_size / (time.perf_counter() - began) / 1e6


def _make(path: Path, size: int) -> None:
    """Write a bundle of one image with `size` bytes of layers."""
    with tarfile.open(path, "w") as archive:
        config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers"}}
        document = {"schemaVersion": 2, "mediaType": MANIFEST}
        document["config"] = _add(archive, json.dumps(config).encode(), CONFIG)
        layers = range(size // LAYER_SIZE)
        document["layers"] = [_add(archive, os.urandom(LAYER_SIZE), LAYER) for _ in layers]
        top = _add(archive, json.dumps(document).encode(), MANIFEST)
        named = {**top, "annotations": {"io.containerd.image.name": NAME}}
        _write(archive, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        _write(archive, "index.json", json.dumps({"manifests": [named]}).encode())


def _add(archive: tarfile.TarFile, content: bytes, media_type: str) -> dict[str, Any]:
    described = descriptor(content, media_type)
    _write(archive, f"blobs/{described['digest'].replace(':', '/')}", content)
    return described


def _write(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
