"""The checks of an import: an image must be complete and have an allowed name to be added.

The bytes of the bundle are checked earlier, where they are read: compression in `decompress`,
archive entries in `tar`, digests and sizes of blobs in `reader`, documents in `proxy.oci.layout`.
`proxy.images.tree` finds missing and malformed parts of an image; `import_` has the order of all checks.
"""

from collections.abc import Collection
from dataclasses import replace

from proxy.errors import BundleError
from proxy.images.tree import ManifestNode
from proxy.names import NameParser
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository


def select_expected(
    image: ManifestNode, expected: Collection[Digest] | None, bundled: Collection[Digest]
) -> ManifestNode:
    """Return the image with only those manifests of its index that the import must complete.

    These are the `expected` ones if the bundle states them; otherwise the manifests that are in the
    bundle; if none are, those that are complete in the store.
    """
    if not image.is_index:
        return image
    required = bundled if expected is None else expected
    children = [child for child in image.children if child.digest in required]
    return replace(
        image,
        children=children or [child for child in image.children if not child.all_missing()],
    )


def check_problems(image: ManifestNode) -> None:
    """Raise `BundleError` if a manifest of the image is invalid or contradicts the store."""
    if problems := image.all_problems():
        raise BundleError(problems[0])


def missing_digests(image: ManifestNode) -> list[str]:
    """Return the digests that neither the bundle nor the store has; none if it is complete."""
    if image.manifest and image.is_index and not image.children:
        return [str(child.digest) for child in image.manifest.children]
    return [blob.digest for blob in image.all_missing()]


def check_name(text: str, digest: Digest, names: NameParser) -> tuple[Repository, Reference]:
    """Return the repository and reference to add an image under.

    Raises `BundleError` if there is no name, or if it has another digest than the image;
    `InvalidReferenceError`; `DeniedError` if the configuration does not allow it.
    """
    if not text:
        raise BundleError("the bundle names no repository for this image: give one with --name")
    repository, reference = names.parse_allowed(text)
    if isinstance(reference, Digest) and reference != digest:
        raise BundleError(f"the bundle has {digest} under this name")
    return repository, reference
