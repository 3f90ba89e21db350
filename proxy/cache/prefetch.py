"""What a client will ask for next: a manifest that was just served names it."""

import asyncio
from collections.abc import Mapping

from proxy.config import FetchSettings
from proxy.download.manager import DownloadManager
from proxy.errors import ProxyError
from proxy.lru import CachedManifest, TTLCache
from proxy.oci.digest import Digest
from proxy.oci.manifest import INDEX_TYPES
from proxy.oci.reference import Repository
from proxy.storage.index import Index
from proxy.upstream.client import Upstream

# A manifest that is served again within so many seconds is not looked into again.
REPEAT_INTERVAL = 60.0
# More blobs than any image has: a manifest of 4 MiB could name tens of thousands.
MAX_BLOBS = 256


class Prefetcher:
    """Starts the downloads of what an image manifest names and is not in the store."""

    def __init__(
        self,
        downloads: DownloadManager,
        index: Index,
        upstreams: Mapping[str, Upstream],
        settings: FetchSettings,
    ) -> None:
        self._downloads = downloads
        self._upstreams = upstreams
        self._settings = settings
        self._index = index
        self._recently_prefetched: TTLCache[tuple[Repository, Digest], None]
        self._recently_prefetched = TTLCache(10_000, asyncio.get_running_loop().time)

    def prefetch_blobs(self, repository: Repository, manifest: CachedManifest) -> None:
        """Take note that a client has been given this manifest. An index announces nothing."""
        key = (repository, manifest.digest)
        seen = self._recently_prefetched.get_with_age(key)
        if (seen and seen[0] < REPEAT_INTERVAL) or manifest.media_type in INDEX_TYPES:
            return
        self._recently_prefetched.set(key, None)
        upstream = self._upstreams[repository.upstream]
        for digest in self._index.children(manifest.digest)[:MAX_BLOBS]:
            is_here = self._index.blob(repository, digest) or self._downloads.get(
                upstream.name, digest
            )
            # Not linked are foreign layers: upstream does not hold them.
            if is_here or not self._index.is_linked(repository, digest):
                continue
            try:
                self._downloads.start(upstream, repository, digest, self._settings)
            except ProxyError:
                # Who asks for it will hear why.
                return
