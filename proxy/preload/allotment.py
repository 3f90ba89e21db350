"""The room of a store, given to images one after another, so that none drives out what another has brought."""

from collections.abc import Iterable, Sequence

from proxy.errors import NoSpaceError
from proxy.images.tree import Contents
from proxy.oci.digest import Digest
from proxy.preload.resolve import Found
from proxy.storage.blobs import footprint
from proxy.storage.space import Hold


class Allotment:
    """The room that one preload gives out."""

    def __init__(self, contents: Contents, hold: Hold) -> None:
        self._contents = contents
        self._hold = hold
        self._room = contents.space.room()
        self._given: set[Digest] = set()

    def lacking(self, images: Sequence[Found]) -> int:
        """Return how many bytes these take together that there are not."""
        together = {digest: size for one in images for digest, size in one.contents().items()}
        return max(0, self._more(together.items()) - max(0, self._room))

    def admit(self, image: Found) -> None:
        """Give the image its share, or raise `NoSpaceError`. What is here of it is kept."""
        contents = image.contents()
        more = self._more(contents.items())
        if more > self._room:
            raise NoSpaceError(
                f"it takes {more} bytes, and the store has {max(0, self._room)} left beside pins and the "
                "images before it: raise store.max_size, or unpin something"
            )
        self._room -= more
        self._given.update(contents)
        self.keep(contents)

    def keep(self, digests: Iterable[Digest]) -> None:
        """Hold what is here of these: it is not evicted meanwhile."""
        self._hold.digests.update(digests)

    def _more(self, blobs: Iterable[tuple[Digest, int]]) -> int:
        """Return how much room blobs take that was not given yet. What is pinned has its own."""
        is_pinned = self._contents.index.is_pinned
        return sum(
            footprint(size)
            for digest, size in blobs
            if digest not in self._given and not is_pinned(digest)
        )
