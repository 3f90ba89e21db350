"""Images as builders make them: with histories, variants, signatures, foreign layers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tests.fakes.content import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    FakeContent,
    descriptor,
)


def push_manifest(
    content: FakeContent,
    repository: str,
    layers: Sequence[bytes],
    *,
    tag: str | None = None,
    platform: str = "linux/amd64",
    history: Sequence[dict[str, Any]] = (),
    run: Mapping[str, Any] | None = None,
    subject: str | None = None,
    foreign: Sequence[bytes] = (),
    artifact_type: str = "",
) -> str:
    """Push an image for one platform and return its digest."""
    os, architecture, variant = (*platform.split("/"), "")[:3]
    config: dict[str, Any] = {"os": os, "architecture": architecture, "history": list(history)}
    config |= {"variant": variant} if variant else {}
    config |= {"config": dict(run)} if run else {}
    raw = json.dumps(config).encode()
    for blob in (raw, *layers):
        content.add_blob(blob, repository)
    manifests = content.repository(repository).manifests
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(raw, OCI_CONFIG),
        "layers": [
            *(descriptor(layer, OCI_LAYER) for layer in layers),
            *(
                {**descriptor(layer, OCI_LAYER), "urls": ["https://elsewhere.example/x"]}
                for layer in foreign
            ),
        ],
        **({"artifactType": artifact_type} if artifact_type else {}),
        **(
            {"subject": descriptor(manifests[subject].content, manifests[subject].media_type)}
            if subject
            else {}
        ),
    }
    return content.add_manifest(repository, tag, json.dumps(document).encode(), OCI_MANIFEST)


def push_index(
    content: FakeContent, repository: str, tag: str | None, manifests: Mapping[str, str]
) -> str:
    """Push an index of manifests by platform, and return its digest."""
    pushed = content.repository(repository).manifests
    entries = []
    for platform, digest in manifests.items():
        os, architecture, variant = (*platform.split("/"), "")[:3]
        described = {"os": os, "architecture": architecture} | (
            {"variant": variant} if variant else {}
        )
        entries.append({**descriptor(pushed[digest].content, OCI_MANIFEST), "platform": described})
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    return content.add_manifest(repository, tag, json.dumps(document).encode(), OCI_INDEX)


def blobs_of(content: FakeContent, repository: str, digest: str) -> list[str]:
    """Return the digests of a manifest's config and layers."""
    document = content.repository(repository).manifests[digest].document
    return [document["config"]["digest"], *(layer["digest"] for layer in document["layers"])]
