"""Images with packages, and SBOMs that are attached to them."""

import json
from typing import Any

from tests.fakes.content import OCI_INDEX, OCI_MANIFEST, FakeContent, FakeImage, descriptor
from tests.support.layers import DPKG_STATUS, OS_RELEASE, make_layer
from tests.support.program import Program

SPDX = "https://spdx.dev/Document"
CYCLONEDX_TYPE = "application/vnd.cyclonedx+json"
DEBIAN = make_layer({"var/lib/dpkg/status": DPKG_STATUS, "etc/os-release": OS_RELEASE})
PYTHON = make_layer(
    {"app/lib/flask-3.0.dist-info/METADATA": b"Name: Flask\nVersion: 3.0.1\n", "app/x.jar": b"x"}
)


async def pull_whole(program: Program, image: FakeImage) -> None:
    """Pull an image, and wait until it is stored."""
    await program.pull(image)
    await program.wait_for_downloads()


def make_cyclonedx(*packages: tuple[str, str]) -> bytes:
    """Return an SBOM of Python packages, by name and version."""
    components = [
        {"type": "library", "name": name, "version": version, "purl": f"pkg:pypi/{name}@{version}"}
        for name, version in packages
    ]
    document = {"bomFormat": "CycloneDX", "specVersion": "1.6", "components": components}
    return json.dumps(document).encode()


def make_statement(digest: str, *packages: tuple[str, str]) -> bytes:
    """Return an in-toto statement with an SPDX document about the image with a digest."""
    document = {
        "_type": "https://in-toto.io/Statement/v0.1",
        "predicateType": SPDX,
        "subject": [{"name": "x", "digest": {"sha256": digest.removeprefix("sha256:")}}],
        "predicate": {
            "spdxVersion": "SPDX-2.3",
            "packages": [{"name": name, "versionInfo": version} for name, version in packages],
        },
    }
    return json.dumps(document).encode()


def push_artifact(
    content: FakeContent,
    repository: str,
    blob: bytes,
    media_type: str,
    *,
    subject: str | None = None,
    predicate: str = "",
) -> str:
    """Push a manifest with one document, which refers to `subject`; return its digest."""
    config = b"{}"
    for one in (config, blob):
        content.add_blob(one, repository)
    layer: dict[str, Any] = descriptor(blob, media_type)
    if predicate:
        layer["annotations"] = {"in-toto.io/predicate-type": predicate}
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": media_type,
        "config": descriptor(config, "application/vnd.oci.empty.v1+json"),
        "layers": [layer],
    }
    if subject:
        pushed = content.repository(repository).manifests[subject]
        document["subject"] = descriptor(pushed.content, pushed.media_type)
    return content.add_manifest(repository, None, json.dumps(document).encode(), OCI_MANIFEST)


def push_attested(
    content: FakeContent,
    repository: str,
    tag: str,
    manifests: dict[str, str],
    attested: dict[str, str],
) -> str:
    """Push an index of manifests by platform, with BuildKit's attestations by platform."""
    pushed = content.repository(repository).manifests
    entries: list[dict[str, Any]] = [
        {
            **descriptor(pushed[digest].content, OCI_MANIFEST),
            "platform": dict(zip(("os", "architecture"), platform.split("/"), strict=True)),
        }
        for platform, digest in manifests.items()
    ]
    entries += [
        {
            **descriptor(pushed[digest].content, OCI_MANIFEST),
            "platform": {"os": "unknown", "architecture": "unknown"},
            "annotations": {
                "vnd.docker.reference.digest": manifests[platform],
                "vnd.docker.reference.type": "attestation-manifest",
            },
        }
        for platform, digest in attested.items()
    ]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    return content.add_manifest(repository, tag, json.dumps(document).encode(), OCI_INDEX)
