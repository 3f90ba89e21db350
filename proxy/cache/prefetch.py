"""What a client will ask for next: a manifest that was just served names it."""

import asyncio

from proxy.download.manager import Downloads
from proxy.errors import ProxyError
from proxy.lru import Expiring, Held
from proxy.oci.digest import Digest
from proxy.oci.manifest import INDEX_TYPES
from proxy.oci.reference import Repository
from proxy.storage.index import Index

# A manifest that is served again within so many seconds is not looked into again.
PAUSE = 60.0
# More blobs than any image has: a manifest of 4 MiB could name tens of thousands.
MAX_BLOBS = 256


class Prefetch:
    """Starts the downloads of what an image manifest names and is not in the store."""

    def __init__(self, downloads: Downloads, index: Index) -> None:
        self._downloads = downloads
        self._index = index
        self._announced: Expiring[tuple[Repository, Digest], None]
        self._announced = Expiring(10_000, asyncio.get_running_loop().time)

    def announce(self, repository: Repository, held: Held) -> None:
        """Take note that a client has been given this manifest. An index announces nothing."""
        key = (repository, held.digest)
        seen = self._announced.get(key)
        if (seen and seen[0] < PAUSE) or held.media_type in INDEX_TYPES:
            return
        self._announced.put(key, None)
        for digest in self._index.children(held.digest)[:MAX_BLOBS]:
            is_here = self._index.blob(repository, digest) or self._downloads.find(digest)
            # Not linked are foreign layers: upstream does not hold them.
            if is_here or not self._index.is_linked(repository, digest):
                continue
            try:
                self._downloads.start(repository, digest, is_urgent=False)
            except ProxyError:
                # Who asks for it will hear why.
                return
