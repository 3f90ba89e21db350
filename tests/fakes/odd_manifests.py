"""Manifests as registries have them and the specifications do not: clients pull them all the same."""

import gzip
import io
import json
import tarfile
from dataclasses import dataclass
from typing import Any

from tests.fakes.content import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    FakeContent,
    descriptor,
    digest_of,
)


def _tar(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


_ARCHIVES = (_tar("first"), _tar("second"))
# docker can pull an image of these.
LAYERS = tuple(gzip.compress(archive, mtime=0) for archive in _ARCHIVES)
CONFIG = json.dumps(
    {
        "os": "linux",
        "architecture": "amd64",
        "rootfs": {"type": "layers", "diff_ids": [digest_of(one) for one in _ARCHIVES]},
    }
).encode()
DEEP = b'"x":' + b'{"y":' * 500 + b"1" + b"}" * 500
OCI_ARTIFACT = "application/vnd.oci.artifact.manifest.v1+json"
ORAS_ARTIFACT = "application/vnd.cncf.oras.artifact.manifest.v1+json"
BUILDKIT_CONFIG = "application/vnd.buildkit.cacheconfig.v0"


@dataclass(frozen=True, slots=True)
class OddManifest:
    """A manifest, how it is sent, and the content that it names."""

    content: bytes
    content_type: str = OCI_MANIFEST
    blobs: tuple[bytes, ...] = (CONFIG, *LAYERS)
    manifests: tuple[bytes, ...] = ()

    @property
    def digest(self) -> str:
        """The digest of the manifest."""
        return digest_of(self.content)

    def push(self, content: FakeContent, repository: str, tag: str) -> None:
        """Push everything to a fake registry."""
        for blob in self.blobs:
            content.add_blob(blob, repository)
        for manifest in self.manifests:
            content.add_manifest(repository, None, manifest, OCI_MANIFEST)
        content.add_manifest(repository, tag, self.content, self.content_type)


def encode(document: object) -> bytes:
    """Return a document as JSON."""
    return json.dumps(document).encode()


def without(table: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return a JSON object without these fields."""
    return {name: value for name, value in table.items() if name not in names}


LAYER = descriptor(LAYERS[0], OCI_LAYER)
IMAGE: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": OCI_MANIFEST,
    "config": descriptor(CONFIG, OCI_CONFIG),
    "layers": [descriptor(layer, OCI_LAYER) for layer in LAYERS],
}
DOCKER_IMAGE = {
    "schemaVersion": 2,
    "mediaType": DOCKER_MANIFEST,
    "config": descriptor(CONFIG, DOCKER_CONFIG),
    "layers": [descriptor(layer, DOCKER_LAYER) for layer in LAYERS],
}
CHILD = encode(IMAGE)
INDEX: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": OCI_INDEX,
    "manifests": [
        descriptor(CHILD, OCI_MANIFEST) | {"platform": {"os": "linux", "architecture": "amd64"}}
    ],
}


def image(**changes: Any) -> OddManifest:
    """Return an image manifest with these fields changed."""
    return OddManifest(encode(IMAGE | changes))


def image_with_layer(layer: dict[str, Any]) -> OddManifest:
    """Return an image manifest with this as the descriptor of its first layer."""
    return image(layers=[layer, IMAGE["layers"][1]])


def image_with_text(text: bytes) -> OddManifest:
    """Return an image manifest with this JSON text at the end."""
    return OddManifest(encode(IMAGE)[:-1] + b"," + text + b"}")


def index(**changes: Any) -> OddManifest:
    """Return an index of one image with these fields changed."""
    return OddManifest(encode(INDEX | changes), OCI_INDEX, manifests=(CHILD,))


def index_with_child(child: dict[str, Any]) -> OddManifest:
    """Return an index with this as the descriptor of its one image."""
    return index(manifests=[child])


def artifact(media_type: str) -> OddManifest:
    """Return a manifest of an artifact, which names its blobs as such."""
    document = {
        "mediaType": media_type,
        "artifactType": "application/vnd.example.sbom",
        "blobs": [descriptor(layer, "application/spdx+json") for layer in LAYERS],
    }
    return OddManifest(encode(document), media_type, LAYERS)


ODD_IMAGES = {
    # Fields that are absent, null, or of another type.
    "no layers": OddManifest(encode(without(IMAGE, "layers")), blobs=(CONFIG,)),
    "null layers": OddManifest(encode(IMAGE | {"layers": None}), blobs=(CONFIG,)),
    "no config": OddManifest(encode(without(IMAGE, "config")), blobs=LAYERS),
    "null config": OddManifest(encode(IMAGE | {"config": None}), blobs=LAYERS),
    "null manifests": image(manifests=None),
    "null subject": image(subject=None),
    "null annotations": image(annotations=None),
    "annotation of null": image(annotations={"title": None}),
    "annotation of a number": image(annotations={"title": 5}),
    "null artifactType": image(artifactType=None),
    "no schemaVersion": OddManifest(encode(without(IMAGE, "schemaVersion"))),
    "text as schemaVersion": image(schemaVersion="2"),
    "no mediaType": OddManifest(encode(without(IMAGE, "mediaType"))),
    "null mediaType": image(mediaType=None),
    "empty mediaType": image(mediaType=""),
    "another mediaType": image(mediaType="application/json"),
    # Descriptors.
    "negative size": image_with_layer(LAYER | {"size": -1}),
    "null size": image_with_layer(LAYER | {"size": None}),
    "no size": image_with_layer(without(LAYER, "size")),
    "text as size": image_with_layer(LAYER | {"size": str(len(LAYERS[0]))}),
    "huge size": image_with_layer(LAYER | {"size": 2**70}),
    "no layer mediaType": image_with_layer(without(LAYER, "mediaType")),
    "null layer mediaType": image_with_layer(LAYER | {"mediaType": None}),
    "layer with a digest only": image_with_layer({"digest": LAYER["digest"]}),
    "null urls": image_with_layer(LAYER | {"urls": None}),
    "no urls": image_with_layer(LAYER | {"urls": []}),
    "null layer annotations": image_with_layer(LAYER | {"annotations": None}),
    "config without mediaType": image(config=without(IMAGE["config"], "mediaType")),
    "config without size": image(config=without(IMAGE["config"], "size")),
    "the same layer twice": image(layers=[LAYER, LAYER, *IMAGE["layers"]]),
    # Names.
    "annotations that differ by case": image(annotations={"Maintainer": "A", "maintainer": "B"}),
    "unknown fields that differ by case": image_with_text(b'"x":1,"X":2'),
    "the same field twice": image_with_text(b'"layers":' + encode(IMAGE["layers"])),
    "a field in capitals": OddManifest(encode(IMAGE).replace(b'"layers"', b'"LAYERS"')),
    # Values that are not read.
    "not UTF-8": image_with_text(b'"annotations":{"author":"J\xf6rg"}'),
    "lone surrogate": image_with_text(b'"annotations":{"author":"\\ud800"}'),
    "huge number": image_with_text(b'"x":' + b"9" * 5000),
    "deep object": image_with_text(DEEP),
    "text after the document": OddManifest(encode(IMAGE) + b"\n<!-- page -->"),
    "unknown fields": image(history=[{}], data="e30=", urls={"a": [None]}),
    # Types.
    "docker sent as OCI": OddManifest(encode(DOCKER_IMAGE), OCI_MANIFEST),
    "OCI sent as docker": OddManifest(encode(IMAGE), DOCKER_MANIFEST),
    "docker without mediaType": OddManifest(
        encode(without(DOCKER_IMAGE, "mediaType")), DOCKER_MANIFEST
    ),
    "sent as text": OddManifest(encode(IMAGE), "text/plain; charset=utf-8"),
    "sent with a charset": OddManifest(encode(IMAGE), f"{OCI_MANIFEST}; charset=utf-8"),
    "sent in capitals": OddManifest(encode(IMAGE), OCI_MANIFEST.upper()),
    "sent as JSON": OddManifest(encode(IMAGE), "application/json"),
    "sent without a type": OddManifest(encode(IMAGE), ""),
    "of no type": OddManifest(encode(without(IMAGE, "mediaType")), ""),
    "of no type and sent as bytes": OddManifest(
        encode(without(IMAGE, "mediaType")), "application/octet-stream"
    ),
    "OCI artifact": artifact(OCI_ARTIFACT),
    "ORAS artifact": artifact(ORAS_ARTIFACT),
    "unknown manifest": OddManifest(
        encode(IMAGE | {"mediaType": "application/vnd.example.manifest"}),
        "application/vnd.example.manifest",
    ),
}
ODD_INDEXES = {
    "null layers in an index": index(layers=None, config=None),
    "index without mediaType": OddManifest(
        encode(without(INDEX, "mediaType")), OCI_INDEX, manifests=(CHILD,)
    ),
    "index with annotations of null": index(annotations={"x": None}),
    "empty platform": index_with_child(descriptor(CHILD, OCI_MANIFEST) | {"platform": {}}),
    "null platform": index_with_child(descriptor(CHILD, OCI_MANIFEST) | {"platform": None}),
    "platform of nulls": index_with_child(
        descriptor(CHILD, OCI_MANIFEST) | {"platform": {"os": None, "architecture": None}}
    ),
    "platform without os": index_with_child(
        descriptor(CHILD, OCI_MANIFEST) | {"platform": {"architecture": "amd64"}}
    ),
    "null variant": index_with_child(
        INDEX["manifests"][0]
        | {"platform": {"os": "linux", "architecture": "amd64", "variant": None}}
    ),
    "child without mediaType": index_with_child(without(INDEX["manifests"][0], "mediaType")),
    "child without size": index_with_child(without(INDEX["manifests"][0], "size")),
    "child with a digest only": index_with_child({"digest": digest_of(CHILD)}),
    "null children": OddManifest(encode(INDEX | {"manifests": None}), OCI_INDEX, ()),
    "no children": OddManifest(encode(without(INDEX, "manifests")), OCI_INDEX, ()),
    "BuildKit cache": OddManifest(
        encode(
            INDEX
            | {
                "manifests": [
                    *(descriptor(layer, OCI_LAYER) for layer in LAYERS),
                    descriptor(CONFIG, BUILDKIT_CONFIG),
                ]
            }
        ),
        OCI_INDEX,
    ),
    "index of an image and a blob": OddManifest(
        encode(INDEX | {"manifests": [*INDEX["manifests"], LAYER]}), OCI_INDEX, manifests=(CHILD,)
    ),
}
ODD_MANIFESTS = ODD_IMAGES | ODD_INDEXES
