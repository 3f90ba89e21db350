"""Bundles in tests: exported from a program, imported into one, unpacked, and built by hand."""

import asyncio
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from typing import Any

from proxy.cli.api_client import AdminClient
from tests.fakes.content import OCI_INDEX, OCI_MANIFEST, FakeImage, descriptor, digest_of
from tests.support.program import Program

# The annotations that name an image: containerd's, and that of the image-spec.
IMAGE_NAME_ANNOTATION = "io.containerd.image.name"
REF_NAME_ANNOTATION = "org.opencontainers.image.ref.name"

# The fake registry's default repository, by the name that bundles give it.
APP_FULL_NAME = "docker.io/library/app"

LAYERS = (b"first" * 5000, b"second")


async def pull_all_platforms(program: Program, image: FakeImage) -> None:
    """Pull an image with all manifests of its index."""
    await program.pull(image)
    for digest in image.manifests.values():
        manifest = (await program.manifest(image, digest)).json
        for part in (manifest["config"], *manifest["layers"]):
            await program.blob(part["digest"], image.repository)
    await program.wait_for_downloads()


async def export_bundle(
    program: Program,
    *images: str,
    platforms: Sequence[str] = (),
    exclude: Iterable[str] = (),
    facts: bool = False,
) -> bytes:
    """Return the bundle that the program sends, after checking that it has the announced size."""
    document: dict[str, Any] = {"images": images, "platforms": platforms}
    document |= {"exclude": sorted(exclude), "facts": facts}
    target = io.BytesIO()

    def work() -> None:
        plan = AdminClient(program.root).post("/api/v1/export/plan", document)
        AdminClient(program.root).post_to_file("/api/v1/export", document, target)
        assert len(target.getvalue()) == plan["size"]

    await asyncio.to_thread(work)
    return target.getvalue()


async def import_bundle(
    program: Program, bundle: bytes, *, name: str | None = None
) -> dict[str, Any]:
    """Upload a bundle in chunks of an odd size, and return the report."""
    size = 70_001

    def work() -> Any:
        chunks = (bundle[at : at + size] for at in range(0, len(bundle), size))
        *_, report = AdminClient(program.root).stream(
            "POST", "/api/v1/import", upload=chunks, name=name
        )
        return report

    report: dict[str, Any] = await asyncio.to_thread(work)
    return report


def unpack_tar(bundle: bytes) -> dict[str, bytes]:
    """Return the files of a tar by name, in order, read by the standard library."""
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(bundle)) as archive:
        for entry in archive:
            content = archive.extractfile(entry)
            assert content is not None, entry.name
            assert entry.name not in files
            files[entry.name] = content.read()
    return files


def blob_digests(bundle: bytes) -> set[str]:
    """Return the digests of the blobs in a bundle, after checking their bytes."""
    digests = set()
    for name, content in unpack_tar(bundle).items():
        if name.startswith("blobs/"):
            _, algorithm, encoded = name.split("/")
            assert digest_of(content, algorithm) == f"{algorithm}:{encoded}"
            digests.add(f"{algorithm}:{encoded}")
    return digests


def make_tar(entries: dict[str, bytes] | Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """Return a tar of files by name, or of entries with arbitrary headers."""
    if isinstance(entries, dict):
        entries = [(tarfile.TarInfo(name), content) for name, content in entries.items()]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for entry, content in entries:
            entry.size = entry.size or len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def blob_path(digest: str) -> str:
    """Return the path of a blob in a layout, which is also its path in a store."""
    return f"blobs/{digest.replace(':', '/')}"


class LayoutBuilder:
    """Builds an OCI image layout. A test may change `files` before it calls `to_tar`."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}
        self.images: list[dict[str, Any]] = []

    def add_blob(self, content: bytes | dict[str, Any], media_type: str = "") -> dict[str, Any]:
        """Add a blob and return its descriptor."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        described = descriptor(data, media_type)
        self.files[blob_path(described["digest"])] = data
        return described

    def add_manifest(self, *layers: bytes, architecture: str = "amd64") -> dict[str, Any]:
        """Add a manifest with a config and layers, and return its descriptor."""
        config = {"os": "linux", "architecture": architecture, "layers": len(layers)}
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self.add_blob(config, "application/vnd.oci.image.config.v1+json"),
            "layers": [
                self.add_blob(layer, "application/vnd.oci.image.layer.v1.tar") for layer in layers
            ],
        }
        platform = {"os": "linux", "architecture": architecture}
        return {**self.add_blob(document, OCI_MANIFEST), "platform": platform}

    def add_index(self, *manifests: dict[str, Any]) -> dict[str, Any]:
        """Add an image index and return its descriptor."""
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
        return self.add_blob(document, OCI_INDEX)

    def list_image(self, described: dict[str, Any], **annotations: str) -> str:
        """List an image in index.json, and return its digest.

        The annotation `name` is containerd's, `ref` that of the image-spec.
        """
        keys = {"name": IMAGE_NAME_ANNOTATION, "ref": REF_NAME_ANNOTATION}
        named = {keys[key]: text for key, text in annotations.items()}
        self.images.append({**described, "annotations": named})
        digest: str = described["digest"]
        return digest

    def to_tar(self) -> bytes:
        """Return the archive in skopeo's order: the index after the blobs."""
        index = json.dumps({"schemaVersion": 2, "manifests": self.images}).encode()
        return make_tar({**self.files, "index.json": self.files.get("index.json", index)})


def build_layout(*layers: bytes, name: str = f"{APP_FULL_NAME}:1") -> tuple[LayoutBuilder, str]:
    """Return a layout of one image with these layers, and the image's digest."""
    builder = LayoutBuilder()
    digest = builder.list_image(builder.add_manifest(*layers or (b"a layer",)), name=name)
    return builder, digest
