"""Bundles in tests: asked from a program and given to one, taken apart and put together by hand."""

import asyncio
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from typing import Any

from proxy.cli.api_client import AdminClient
from tests.fakes.content import OCI_INDEX, OCI_MANIFEST, Image, descriptor, digest_of
from tests.support.program import Program

NAME = "io.containerd.image.name"
REF_NAME = "org.opencontainers.image.ref.name"

# What the tests' fake registry keeps a repository's images under, as bundles spell it.
APP = "docker.io/library/app"


LAYERS = (b"first" * 5000, b"second")


async def pull(program: Program, image: Image) -> None:
    """Pull all platforms of an image."""
    await program.pull(image)
    for digest in image.manifests.values():
        answer = await program.manifest(image, digest)
        for named in (answer.json["config"], *answer.json["layers"]):
            await program.blob(named["digest"], image.repository)
    await program.settled()


async def export(
    program: Program, *images: str, platforms: Sequence[str] = (), exclude: Iterable[str] = ()
) -> bytes:
    """Return the bundle that the program makes, whose size it has said before."""
    wanted = {"images": images, "platforms": platforms, "exclude": sorted(exclude)}
    target = io.BytesIO()

    def work() -> None:
        plan = AdminClient(program.root).post("/api/v1/export/plan", wanted)
        AdminClient(program.root).post_to_file("/api/v1/export", wanted, target)
        assert len(target.getvalue()) == plan["size"]

    await asyncio.to_thread(work)
    return target.getvalue()


async def take(program: Program, bundle: bytes, *, name: str | None = None) -> dict[str, Any]:
    """Give the program a bundle; return its report."""

    def work() -> Any:
        pieces = (bundle[at : at + 70_001] for at in range(0, len(bundle), 70_001))
        *_, report = AdminClient(program.root).stream(
            "POST", "/api/v1/import", upload=pieces, name=name
        )
        return report

    report: dict[str, Any] = await asyncio.to_thread(work)
    return report


def files(bundle: bytes) -> dict[str, bytes]:
    """Return what is in the tar, in order, read by the standard library."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(bundle)) as archive:
        for entry in archive:
            content = archive.extractfile(entry)
            assert content is not None, entry.name
            assert entry.name not in found
            found[entry.name] = content.read()
    return found


def blobs(bundle: bytes) -> set[str]:
    """Return the digests of the blobs in the bundle, after checking their bytes."""
    found = set()
    for name, content in files(bundle).items():
        if name.startswith("blobs/"):
            _, algorithm, encoded = name.split("/")
            assert digest_of(content, algorithm) == f"{algorithm}:{encoded}"
            found.add(f"{algorithm}:{encoded}")
    return found


def tar(entries: dict[str, bytes] | Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """Return an archive of files, or of entries as odd as the caller likes."""
    if isinstance(entries, dict):
        entries = [(tarfile.TarInfo(name), content) for name, content in entries.items()]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for entry, content in entries:
            entry.size = entry.size or len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def path(digest: str) -> str:
    """Return where a layout has the blob."""
    return f"blobs/{digest.replace(':', '/')}"


class Layout:
    """An OCI image layout put together by hand: `files` can be changed before `tar` is called."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}
        self.images: list[dict[str, Any]] = []

    def add(self, content: bytes | dict[str, Any], media_type: str = "") -> dict[str, Any]:
        """Add a blob and return its descriptor."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        described = descriptor(data, media_type)
        self.files[path(described["digest"])] = data
        return described

    def add_manifest(self, *layers: bytes, architecture: str = "amd64") -> dict[str, Any]:
        """Add a manifest with a config and layers, and return its descriptor."""
        config = {"os": "linux", "architecture": architecture, "layers": len(layers)}
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self.add(config, "application/vnd.oci.image.config.v1+json"),
            "layers": [
                self.add(layer, "application/vnd.oci.image.layer.v1.tar") for layer in layers
            ],
        }
        platform = {"os": "linux", "architecture": architecture}
        return {**self.add(document, OCI_MANIFEST), "platform": platform}

    def add_index(self, *manifests: dict[str, Any]) -> dict[str, Any]:
        """Add an image index."""
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
        return self.add(document, OCI_INDEX)

    def list(self, described: dict[str, Any], **annotations: str) -> str:
        """List an image in index.json under `name` (containerd's) and `ref` (everybody else's)."""
        keys = {"name": NAME, "ref": REF_NAME}
        named = {keys[key]: text for key, text in annotations.items()}
        self.images.append({**described, "annotations": named})
        digest: str = described["digest"]
        return digest

    def tar(self) -> bytes:
        """Return the archive, as skopeo makes it: the index after the blobs."""
        index = json.dumps({"schemaVersion": 2, "manifests": self.images}).encode()
        return tar({**self.files, "index.json": self.files.get("index.json", index)})


def layout(*layers: bytes, name: str = f"{APP}:1") -> tuple[Layout, str]:
    """Return a layout with one image, and the image's digest."""
    made = Layout()
    return made, made.list(made.add_manifest(*layers or (b"a layer",)), name=name)
