"""Makes images that run Debian's static busybox, as OCI layouts on disk."""

import gzip
import hashlib
import io
import json
import random
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.system.processes import run

BUSYBOX = Path("/bin/busybox")
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass(frozen=True)
class BuiltImage:
    """An image index in an OCI layout. Its command prints `prints`."""

    layout: Path
    repository: str
    tag: str
    prints: str
    index: str  # this and the following fields are digests
    manifest: str
    config: str
    layers: tuple[str, ...]
    registry: str = "docker.io"

    @property
    def reference(self) -> str:
        """The image's name with its tag, or with its digest if the tag is empty."""
        version = f":{self.tag}" if self.tag else f"@{self.index}"
        return f"{self.registry}/{self.repository}{version}"

    def push(self, registry: str, tag: str = "") -> None:
        """Copy the index and its content to the registry at `host:port`, optionally as another tag."""
        target = f"docker://{registry}/{self.repository}:{tag or self.tag}"
        source = f"oci:{self.layout}:{self.tag}"
        run("skopeo", "copy", "--all", "--quiet", "--dest-tls-verify=false", source, target)

    def bytes_of(self, digest: str) -> bytes:
        return (self.layout / "blobs" / digest.replace(":", "/")).read_bytes()


class _Layout:
    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs" / "sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def add(self, media_type: str, content: bytes | dict[str, Any]) -> dict[str, Any]:
        """Add a blob and return its descriptor."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        hexadecimal = hashlib.sha256(data).hexdigest()
        (self.path / "blobs" / "sha256" / hexadecimal).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{hexadecimal}", "size": len(data)}

    def add_manifest(
        self, arch: str, diff_ids: list[str], layers: list[dict[str, Any]], command: list[str]
    ) -> Any:
        """Add an image of one platform; return its manifest and that manifest's descriptor."""
        config = {
            "architecture": arch,
            "os": "linux",
            "config": {"Cmd": command},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.add(CONFIG, config),
            "layers": layers,
        }
        platform = {"architecture": arch, "os": "linux"}
        return manifest, {**self.add(MANIFEST, manifest), "platform": platform}


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mode = 0o755
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def make_image(
    layout: Path,
    *,
    repository: str = "library/hello",
    tag: str = "latest",
    prints: str = "",
    layer_sizes: Sequence[int] = (1 << 10, 300 << 10, 3 << 20),
) -> BuiltImage:
    """Write an index of two platforms whose images share incompressible layers and print `prints`."""
    prints = prints or f"hello from {repository}:{tag}"
    rng = random.Random(prints)
    archives = [_tar({"bin/busybox": BUSYBOX.read_bytes()})]
    archives += [_tar({f"data/{n}": rng.randbytes(size)}) for n, size in enumerate(layer_sizes)]
    target = _Layout(layout)
    diff_ids = ["sha256:" + hashlib.sha256(archive).hexdigest() for archive in archives]
    layers = [target.add(LAYER, gzip.compress(archive, 1, mtime=0)) for archive in archives]
    command = ["/bin/busybox", "echo", prints]
    manifest, amd64 = target.add_manifest("amd64", diff_ids, layers, command)
    _, arm64 = target.add_manifest("arm64", diff_ids, layers, command)
    manifests = [amd64, arm64]
    index = target.add(INDEX, {"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests})
    index["annotations"] = {"org.opencontainers.image.ref.name": tag}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [index]}))
    return BuiltImage(
        layout=layout,
        repository=repository,
        tag=tag,
        prints=prints,
        index=index["digest"],
        manifest=amd64["digest"],
        config=manifest["config"]["digest"],
        layers=tuple(layer["digest"] for layer in manifest["layers"]),
    )
