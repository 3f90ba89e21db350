"""Prefetch: downloads the config and layers of a manifest that a client has just pulled."""

import asyncio
from collections.abc import Mapping

from proxy.cache.access import RepositoryAccess
from proxy.config import FetchSettings
from proxy.download.manager import DownloadManager
from proxy.errors import ProxyError
from proxy.lru import CachedManifest, TTLCache
from proxy.names import policy_name
from proxy.oci.digest import Digest
from proxy.oci.manifest import INDEX_TYPES
from proxy.oci.reference import Repository
from proxy.rules import ImageRules
from proxy.storage.index import Index
from proxy.traffic import fetching_for
from proxy.upstream.client import Upstream

# Seconds during which serving the same manifest again starts no downloads.
REPEAT_INTERVAL = 60.0
# Maximum of manifests that are remembered during that time.
MAX_REMEMBERED = 10_000
# More blobs than any real image has; a manifest of 4 MiB could name tens of thousands.
MAX_BLOBS = 256


class Prefetcher:
    """Starts what clients will need: downloads of the blobs that an image manifest names, or proofs."""

    def __init__(
        self,
        downloads: DownloadManager,
        index: Index,
        access: RepositoryAccess,
        upstreams: Mapping[str, Upstream],
        settings: FetchSettings,
        rules: ImageRules,
    ) -> None:
        self._downloads = downloads
        self._upstreams = upstreams
        self._settings = settings
        self._rules = rules
        self._index = index
        self._access = access
        self._recently_prefetched: TTLCache[tuple[Repository, Digest], None]
        self._recently_prefetched = TTLCache(MAX_REMEMBERED, asyncio.get_running_loop().time)

    def prefetch_blobs(self, repository: Repository, manifest: CachedManifest) -> None:
        """Start the missing downloads of a manifest that was served; do nothing for an index.

        They are queued behind the downloads that clients wait for.
        """
        key = (repository, manifest.digest)
        seen = self._recently_prefetched.get_with_age(key)
        if (seen and seen[0] < REPEAT_INTERVAL) or manifest.media_type in INDEX_TYPES:
            return
        self._recently_prefetched.set(key, None)
        if not self._rules.settings(policy_name(repository)).prefetches:
            return
        upstream = self._upstreams[repository.upstream]
        for digest in self._index.children(manifest.digest, MAX_BLOBS):
            if self._access.get_linked(repository, digest):
                continue
            if self._index.has_sent(upstream.name, digest):
                # It was stored for another repository: this one needs a proof.
                self._access.start_check(repository, digest)
                continue
            if self._downloads.get(upstream.name, digest):
                continue
            try:
                with fetching_for("prefetch"):
                    self._downloads.start(upstream, repository, digest, self._settings)
            except ProxyError:
                # The client's own request for the blob will report the error.
                return
