"""Reading blob files that are missing from the index: their sizes, and the manifests among them."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from proxy.errors import InvalidManifestError, StorageError
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.storage.blobs import BlobStore
from proxy.storage.index_writes import MAX_CHILDREN


def scan_blobs(
    store: BlobStore, digests: Iterable[Digest] | None = None
) -> list[tuple[Digest, int, oci.Manifest | None]]:
    """Return digest, size and manifest (or None) of those of these blobs, or of all, that have a file.

    File names are trusted, but a manifest is verified before it is parsed.
    Blocks. Raises `StorageError`.
    """
    found = []
    try:
        for digest, size in store.iter_blobs() if digests is None else _stat_blobs(store, digests):
            content = b""
            if size <= oci.MAX_MANIFEST_SIZE:
                content = Path(store.blob_path(digest)).read_bytes()
            is_right = bool(content) and Digest.from_content(content, digest.algorithm) == digest
            found.append((digest, size, parse_manifest(content) if is_right else None))
    except OSError as error:
        raise StorageError(f"the store {store.root} cannot be read: {error}") from error
    return found


def parse_manifest(content: bytes) -> oci.Manifest | None:
    """Return the manifest in a blob, if its `mediaType` says that it is one and it may be indexed."""
    if not content.startswith(b"{"):
        return None
    try:
        manifest = oci.parse_manifest(content, "")
    except InvalidManifestError:
        return None
    is_indexed = manifest.is_stated and manifest.child_count <= MAX_CHILDREN
    return manifest if is_indexed else None


def _stat_blobs(store: BlobStore, digests: Iterable[Digest]) -> Iterator[tuple[Digest, int]]:
    for digest in digests:
        with suppress(OSError):
            yield digest, Path(store.blob_path(digest)).stat(follow_symlinks=False).st_size
