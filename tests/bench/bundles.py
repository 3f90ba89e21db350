"""Bundles: export to a file and import from a file, compared with cp and sha256sum of the same file.

They run alternately on one disk, with a warm page cache, and until the bytes are on the disk.
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
from tests.bench.figures import Goal, LoadSize, Row
from tests.bench.testbed import PULLCACHE, STORE_SIZE
from tests.fakes.content import descriptor
from tests.system.images import CONFIG, LAYER, MANIFEST
from tests.system.processes import UNREACHABLE
from tests.system.servers import Daemon

COPY, HASH = "cp", "sha256sum"
NAME = "docker.io/library/bundled:latest"
LAYER_SIZE = 64 * MIB


def measure(size: LoadSize, directory: Path) -> Iterator[Row]:
    """Measure exports and imports of a bundle with the size of the cold blob."""
    directory.mkdir()
    names = ("bundle.tar", "copy.tar", "exported.tar")
    bundle, copy, exported = (directory / name for name in names)
    _write_bundle(bundle, size.cold)
    daemon = Daemon(directory / "daemon", UNREACHABLE, max_size=STORE_SIZE)
    figures: dict[str, dict[str, list[float]]] = {"import": {}, "export": {}}
    try:
        daemon.start()
        for _ in range(size.rounds):
            for path in (copy, exported):
                path.unlink(missing_ok=True)
            cp_rate = _rate(bundle, ["cp", bundle, copy], ["sync", copy])
            hash_rate = _rate(bundle, ["sha256sum", bundle])
            command = [*daemon.program, "import", "--store", daemon.store, bundle]
            import_rate = _rate(bundle, command)
            command = [*daemon.program, "export", "--store", daemon.store, NAME, "-o", exported]
            rates = {"import": import_rate, "export": _rate(bundle, command)}
            for what, our_rate in rates.items():
                for name, rate in ((PULLCACHE, our_rate), (COPY, cp_rate), (HASH, hash_rate)):
                    figures[what].setdefault(name, []).append(rate)
            daemon.run("rm", NAME)
    finally:
        daemon.finish()
    for what, by_name in figures.items():
        work = f"{size.cold // MIB} MiB bundle, {what}"
        ours = by_name[PULLCACHE]
        yield Row(work, "MB/s", {PULLCACHE: ours, COPY: by_name[COPY]}, Goal(">=", 0.5, COPY))
        hashing = {PULLCACHE: ours, HASH: by_name[HASH]}
        yield Row("  against sha256sum", "MB/s", hashing, Goal(">=", 0.5, HASH))


def _rate(bundle: Path, *commands: list[Any]) -> float:
    """Run the commands one after the other; return the megabytes of the bundle per second."""
    started = time.perf_counter()
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return bundle.stat().st_size / (time.perf_counter() - started) / 1e6


def _write_bundle(path: Path, size: int) -> None:
    """Write a bundle of one image with `size` bytes of layers."""
    with tarfile.open(path, "w") as archive:
        config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers"}}
        document = {"schemaVersion": 2, "mediaType": MANIFEST}
        document["config"] = _add(archive, json.dumps(config).encode(), CONFIG)
        layers = range(size // LAYER_SIZE)
        document["layers"] = [_add(archive, os.urandom(LAYER_SIZE), LAYER) for _ in layers]
        manifest = _add(archive, json.dumps(document).encode(), MANIFEST)
        entry = {**manifest, "annotations": {"io.containerd.image.name": NAME}}
        _write(archive, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        _write(archive, "index.json", json.dumps({"manifests": [entry]}).encode())


def _add(archive: tarfile.TarFile, content: bytes, media_type: str) -> dict[str, Any]:
    blob = descriptor(content, media_type)
    _write(archive, f"blobs/{blob['digest'].replace(':', '/')}", content)
    return blob


def _write(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
