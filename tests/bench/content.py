"""What is served: made once, pushed to the upstream registry, and laid out as files for nginx."""

import hashlib
import http.client
import json
import random
from pathlib import Path
from urllib.parse import urlsplit

from tests.system.images import CONFIG, LAYER, MANIFEST

MIB = 1 << 20
IMAGE = "library/bench"
COLD = "library/cold"  # blobs that no manifest names, so that nothing but a request fetches them
TAG = "latest"


def path_of(digest: str, repository: str = IMAGE) -> str:
    """Return the path of a blob's URL."""
    return f"/v2/{repository}/blobs/{digest}"


class Content:
    """Blobs by size, and one manifest of a dozen layers; `root` holds the files by URL path."""

    def __init__(self, root: Path, hits: list[int], cold: int) -> None:
        self.root = root
        small = [self._blob(IMAGE, 1024 + n) for n in range(10)]
        blobs = {size: self._blob(IMAGE, size) for size in hits}
        self.blobs = {size: path_of(blob["digest"]) for size, blob in blobs.items()}
        self.cold = path_of(self._blob(COLD, cold)["digest"], COLD)
        self.crowd = path_of(self._blob(COLD, 64 * MIB + 1)["digest"], COLD)
        config = {**self._blob(IMAGE, 4000), "mediaType": CONFIG}
        document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config}
        document["layers"] = [*small, *blobs.values()]
        self._manifest = json.dumps(document, indent=2).encode()
        digest = "sha256:" + hashlib.sha256(self._manifest).hexdigest()
        self.by_tag = f"/v2/{IMAGE}/manifests/{TAG}"
        self.by_digest = f"/v2/{IMAGE}/manifests/{digest}"
        for path in (self.by_tag, self.by_digest):
            self.file(path).parent.mkdir(parents=True, exist_ok=True)
            self.file(path).write_bytes(self._manifest)

    def file(self, path: str) -> Path:
        """Return the file that holds what is at the path of a URL."""
        return self.root / path.removeprefix("/")

    def size(self, path: str) -> int:
        return self.file(path).stat().st_size

    def digest(self, path: str) -> str:
        with self.file(path).open("rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()

    def push(self, url: str) -> None:
        """Upload everything to a registry, as clients do."""
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=60)
        for path in sorted((self.root / "v2").rglob("blobs/*")):
            repository = path.parent.parent.relative_to(self.root / "v2")
            _send(connection, "POST", f"/v2/{repository}/blobs/uploads/")
            place = _send(connection, "POST", f"/v2/{repository}/blobs/uploads/")
            mark = "&" if "?" in place else "?"
            _send(connection, "PUT", f"{place}{mark}digest={path.name}", path)
        _send(connection, "PUT", self.by_tag, self.file(self.by_tag))
        connection.close()

    def _blob(self, repository: str, size: int) -> dict[str, object]:
        seeded = random.Random(size)
        seen = hashlib.sha256()
        fresh = self.root / "fresh"
        fresh.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            for start in range(0, size, MIB):
                piece = seeded.randbytes(min(MIB, size - start))
                seen.update(piece)
                file.write(piece)
        digest = f"sha256:{seen.hexdigest()}"
        target = self.file(path_of(digest, repository))
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.rename(target)
        return {"mediaType": LAYER, "digest": digest, "size": size}


def _send(
    connection: http.client.HTTPConnection, method: str, target: str, body: Path | None = None
) -> str:
    """Send a request, with a file's bytes if there is one; return where the answer points to."""
    headers = {"Content-Type": MANIFEST if "/manifests/" in target else "application/octet-stream"}
    parts = urlsplit(target)
    address = f"{parts.path}?{parts.query}" if parts.query else parts.path
    if body is None:
        connection.request(method, address, headers=headers)
    else:
        headers["Content-Length"] = str(body.stat().st_size)
        with body.open("rb") as file:
            connection.request(method, address, body=file, headers=headers)
    response = connection.getresponse()
    text = response.read()
    assert response.status in (201, 202), f"{method} {target}: {response.status} {text!r}"
    return response.getheader("Location") or ""
