"""`ImageStore`: the blob store and its index, read as manifests and image configurations."""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from proxy.concurrency import run_in_thread
from proxy.errors import InvalidManifestError, StorageError
from proxy.names import NameParser
from proxy.oci import manifest as oci
from proxy.oci.config import ImageConfig, parse_config
from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest
from proxy.storage.blobs import BlobStore
from proxy.storage.image_queries import ImageQueries, open_image_queries
from proxy.storage.index import Index
from proxy.storage.space import SpaceManager

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class ImageStore:
    """The parts of the store that work on images needs."""

    blob_store: BlobStore
    index: Index
    space: SpaceManager
    names: NameParser
    executor: Executor

    async def query(self, work: Callable[[ImageQueries], R]) -> R:
        """Return the result of `work`, run in a thread on a connection of its own.

        Raises `StorageError`.
        """

        def run_queries() -> R:
            with open_image_queries(self.index.path) as queries:
                return work(queries)

        return await run_in_thread(self.index.list_threads, run_queries)

    # The methods below block on the disk.

    def has_blob(self, digest: Digest, size: int) -> bool:
        """Tell whether the disk has a readable file of this blob with this size."""
        with suppress(StorageError):
            if opened := self.blob_store.open(digest, size):
                opened.close()
                return True
        return False

    def load_manifest(self, digest: Digest, size: int) -> Manifest:
        """Return a stored manifest.

        Raises `InvalidManifestError` if its file is missing or damaged.
        """
        content = self.blob_store.read_sync(digest, size) if size <= oci.MAX_MANIFEST_SIZE else None
        if content is None:
            raise InvalidManifestError(f"{digest} is missing, damaged or too large for a manifest")
        # The type in an index is only a hint; the document states its own type.
        return oci.parse_manifest(content, "")

    def load_config(self, manifest: Manifest, stored: Mapping[Digest, int]) -> ImageConfig | None:
        """Return the manifest's image configuration; None if not `stored` or of another kind."""
        config = manifest.config
        size = stored.get(config.digest) if config else None
        if config is None or size is None or size > oci.MAX_MANIFEST_SIZE:
            return None
        content = self.blob_store.read_sync(config.digest, size)
        try:
            return parse_config(content) if content else None
        except InvalidManifestError:
            return None
