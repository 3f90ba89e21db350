"""The room of a store, given to images one after another, so that none drives out what another has brought."""

from collections.abc import Iterable, Sequence

from proxy.errors import NoSpaceError
from proxy.images.tree import ImageStore
from proxy.oci.digest import Digest
from proxy.preload.resolve import ResolvedImage
from proxy.storage.blobs import allocated_size
from proxy.storage.space import Lease


class SpaceBudget:
    """The room that one preload gives out."""

    def __init__(self, image_store: ImageStore, lease: Lease) -> None:
        self._image_store = image_store
        self._lease = lease
        self._available = image_store.space.unpinned_capacity()
        self._admitted: set[Digest] = set()

    def shortfall(self, images: Sequence[ResolvedImage]) -> int:
        """Return how many bytes these take together that there are not."""
        together = {digest: size for one in images for digest, size in one.all_content().items()}
        return max(0, self._additional_size(together.items()) - max(0, self._available))

    def admit(self, image: ResolvedImage) -> None:
        """Give the image its share, or raise `NoSpaceError`. What is here of it is kept."""
        contents = image.all_content()
        more = self._additional_size(contents.items())
        if more > self._available:
            raise NoSpaceError(
                f"it takes {more} bytes, and the store has {max(0, self._available)} left beside pins and the "
                "images before it: raise store.max_size, or unpin something"
            )
        self._available -= more
        self._admitted.update(contents)
        self.add_to_lease(contents)

    def add_to_lease(self, digests: Iterable[Digest]) -> None:
        """Hold what is here of these: it is not evicted meanwhile."""
        self._lease.digests.update(digests)

    def _additional_size(self, blobs: Iterable[tuple[Digest, int]]) -> int:
        """Return how much room blobs take that was not given yet. What is pinned has its own."""
        is_pinned = self._image_store.index.is_pinned
        return sum(
            allocated_size(size)
            for digest, size in blobs
            if digest not in self._admitted and not is_pinned(digest)
        )
