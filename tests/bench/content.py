"""The content that is served: made once, pushed to the upstream registry, and laid out as files for nginx."""

import hashlib
import http.client
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.system.images import CONFIG, LAYER, MANIFEST

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
IMAGE = "library/bench"
COLD = "library/cold"  # no manifest names its blobs, so that no prefetch fetches them
TAG = "latest"
SMALL_LAYERS = range(1024, 1034)
# The sizes of blobs that are read from the disk one after another.
DISK_BLOBS = range(MIB + 1, MIB + 65)


class BenchContent:
    """Blobs, and the manifest of an image; each is in the file below `root` that its URL's path names."""

    def __init__(self, root: Path, *, hits: Sequence[int], cold: int, shared: int) -> None:
        self.root = root
        big = {size: self._blob(IMAGE, size) for size in hits}
        self.blobs = {size: _path(IMAGE, blob) for size, blob in big.items()}
        self.cold = _path(COLD, self._blob(COLD, cold))
        self.shared = _path(COLD, self._blob(COLD, shared))
        config = {**self._blob(IMAGE, 4000), "mediaType": CONFIG}
        small = [self._blob(IMAGE, size) for size in SMALL_LAYERS]
        document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config}
        manifest = json.dumps({**document, "layers": [*small, *big.values()]}, indent=2).encode()
        digest = "sha256:" + hashlib.sha256(manifest).hexdigest()
        self.by_tag = f"/v2/{IMAGE}/manifests/{TAG}"
        self.by_digest = f"/v2/{IMAGE}/manifests/{digest}"
        for path in (self.by_tag, self.by_digest):
            self.file(path).parent.mkdir(parents=True, exist_ok=True)
            self.file(path).write_bytes(manifest)

    @property
    def hits(self) -> list[str]:
        """Return the paths that servers must have stored before hits are measured."""
        return [self.by_tag, self.by_digest, *self.blobs.values()]

    def file(self, path: str) -> Path:
        """Return the file with the content of a URL's path."""
        return self.root / path.removeprefix("/")

    def size(self, path: str) -> int:
        return self.file(path).stat().st_size

    def digest(self, path: str) -> str:
        """Return the digest of the content of a URL's path."""
        return (self.by_digest if path == self.by_tag else path).rpartition("/")[2]

    def push(self, url: str) -> None:
        """Push everything to a registry, as clients do."""
        base = self.root / "v2"
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        for file in sorted(base.rglob("blobs/*")):
            repository = file.parent.parent.relative_to(base)
            location = _send(connection, "POST", f"/v2/{repository}/blobs/uploads/")
            separator = "&" if "?" in location else "?"
            _send(connection, "PUT", f"{location}{separator}digest={file.name}", file)
        _send(connection, "PUT", self.by_tag, self.file(self.by_tag), MANIFEST)
        connection.close()

    def _blob(self, repository: str, size: int) -> dict[str, Any]:
        """Write a blob of pseudorandom bytes, seeded with its size, and return its descriptor."""
        rng = random.Random(size)
        hasher = hashlib.sha256()
        temporary = self.root / "temporary"
        self.root.mkdir(exist_ok=True)
        with temporary.open("wb") as file:
            for start in range(0, size, MIB):
                chunk = rng.randbytes(min(MIB, size - start))
                hasher.update(chunk)
                file.write(chunk)
        descriptor = {"mediaType": LAYER, "digest": f"sha256:{hasher.hexdigest()}", "size": size}
        target = self.file(_path(repository, descriptor))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(target)
        return descriptor


def _path(repository: str, descriptor: dict[str, Any]) -> str:
    return f"/v2/{repository}/blobs/{descriptor['digest']}"


def _send(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    file: Path | None = None,
    content_type: str = "application/octet-stream",
) -> str:
    """Send a request with the bytes of `file`; return the Location of the response."""
    parts = urlsplit(target)
    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
    headers = {"Content-Type": content_type}
    if file is None:
        connection.request(method, path, headers=headers)
    else:
        headers["Content-Length"] = str(file.stat().st_size)
        with file.open("rb") as body:
            connection.request(method, path, body=body, headers=headers)
    response = connection.getresponse()
    message = response.read()
    assert response.status in (201, 202), f"{method} {target}: {response.status} {message!r}"
    return response.getheader("Location") or ""
