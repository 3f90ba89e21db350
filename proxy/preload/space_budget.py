"""The space budget of a preload: images are admitted one by one, so that none evicts another."""

from collections.abc import Iterable, Sequence

from proxy.errors import NoSpaceError
from proxy.images.store import ImageStore
from proxy.oci.digest import Digest
from proxy.preload.resolved import ResolvedImage
from proxy.sizes import format_bytes
from proxy.storage.blobs import allocated_size
from proxy.storage.space import Lease


class SpaceBudget:
    """The space that one preload may fill: all of the store except pinned content."""

    def __init__(self, image_store: ImageStore, lease: Lease) -> None:
        self._image_store = image_store
        self._lease = lease
        self._available = image_store.space.unpinned_capacity()
        self._admitted: set[Digest] = set()

    def shortfall(self, images: Sequence[ResolvedImage]) -> int:
        """Return how many bytes the store lacks for all these images together."""
        content = {digest: size for image in images for digest, size in image.all_content().items()}
        return max(0, self._additional_size(content.items()) - max(0, self._available))

    def admit(self, image: ResolvedImage) -> None:
        """Give the image its space and lease its content, or raise `NoSpaceError`."""
        content = image.all_content()
        needed = self._additional_size(content.items())
        if needed > self._available:
            raise NoSpaceError(
                f"the image needs {format_bytes(needed)}; pins and the images before it leave "
                f"{format_bytes(max(0, self._available))}: raise store.max_size or unpin an image"
            )
        self._available -= needed
        self._admitted.update(content)
        self._lease.digests.update(content)

    def _additional_size(self, content: Iterable[tuple[Digest, int]]) -> int:
        """Return the space for blobs that are neither admitted yet nor pinned."""
        is_pinned = self._image_store.index.is_pinned
        return sum(
            allocated_size(size)
            for digest, size in content
            if digest not in self._admitted and not is_pinned(digest)
        )
