"""Which manifests policies do not judge: signatures, attestations and what else refers to an image. Pure.

They are recognised by what they are, never by the name of their tag: nothing that a client could run is
exempt.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from proxy.oci.manifest import Manifest

# Media types of signatures and attestations: cosign, Sigstore bundles, in-toto, Notation.
_SIGNATURE_TYPES = (
    "application/vnd.dev.cosign.",
    "application/vnd.dev.sigstore.",
    "application/vnd.dsse.envelope",
    "application/vnd.in-toto",
    "application/vnd.cncf.notary.",
    "application/jose+json",
    "application/cose",
)
# Parts of the media types that clients unpack as layers. docker does not look at the type of a layer,
# so that `octet-stream` is among them.
_LAYER_TYPE_PARTS = ("tar", "layer", "rootfs", "gzip", "zstd", "octet-stream")
_IMAGE_CONFIG_TYPES = (
    "application/vnd.oci.image.config",
    "application/vnd.docker.container.image",
)


def is_exempt(manifest: Manifest, content: bytes) -> bool:
    """Tell whether a manifest is a signature, an attestation, or an artifact that refers to an image.

    An index is exempt if it lists such artifacts only, as the referrers tag schema has it
    (distribution-spec, "Referrers Tag Schema"); what it lists is judged on its own.
    """
    if manifest.is_index:
        return _lists_only_artifacts(content)
    # The config comes first, see `Manifest.children`.
    layer_types = [child.media_type.lower() for child in manifest.children[1:]]
    if layer_types and all(one.startswith(_SIGNATURE_TYPES) for one in layer_types):
        return True
    return manifest.subject is not None and not _has_layers(layer_types)


def _has_layers(media_types: Iterable[str]) -> bool:
    return any(part in one for one in media_types for part in _LAYER_TYPE_PARTS)


def _lists_only_artifacts(content: bytes) -> bool:
    try:
        document = msgspec.json.decode(content)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    items = document.get("manifests") if isinstance(document, dict) else None
    return isinstance(items, list) and bool(items) and all(map(_is_artifact, items))


def _is_artifact(descriptor: Any) -> bool:
    if not isinstance(descriptor, Mapping) or descriptor.get("platform"):
        return False
    kind = descriptor.get("artifactType")
    return isinstance(kind, str) and bool(kind) and not kind.lower().startswith(_IMAGE_CONFIG_TYPES)
