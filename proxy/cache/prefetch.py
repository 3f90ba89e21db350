"""Prefetch: downloads the config and layers of a manifest that a client has just pulled."""

import asyncio
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress

from proxy.cache.access import RepositoryAccess
from proxy.concurrency import start_task
from proxy.config import FetchSettings
from proxy.download.download import Download
from proxy.download.manager import DownloadManager
from proxy.errors import ProxyError
from proxy.log import get_logger
from proxy.lru import CachedManifest, TTLCache
from proxy.metrics import Metrics
from proxy.names import policy_name
from proxy.oci.digest import Digest
from proxy.oci.manifest import INDEX_TYPES
from proxy.oci.reference import Repository
from proxy.repository_rules import RepositoryRules
from proxy.storage.index import Index
from proxy.traffic import fetching_for
from proxy.upstream.client import Upstream

# Seconds during which serving the same manifest again starts no downloads.
REPEAT_INTERVAL = 60.0
# Maximum of manifests that are remembered during that time.
MAX_REMEMBERED = 10_000
# More blobs than any real image has; a manifest of 4 MiB could name tens of thousands.
MAX_BLOBS = 256
# Downloads of one upstream that are started at a time: those of one image, even of a large one.
MAX_STARTED = 256
# Blobs of one upstream that wait to be prefetched; further ones are fetched when clients ask for them.
MAX_QUEUED_BLOBS = 4096
# Blobs that are looked at in one turn of the loop: most are stored.
_BLOBS_PER_TURN = 32

log = get_logger(__name__)


class Prefetcher:
    """Starts what clients will need: downloads of the blobs that an image manifest names, or proofs.

    Of each upstream, up to `MAX_STARTED` at a time; further blobs wait in a queue. Of the started ones only
    some transfer bytes (`fetch.max_downloads`), but they do not count as waiting for the client that pulls them.
    """

    def __init__(
        self,
        downloads: DownloadManager,
        index: Index,
        access: RepositoryAccess,
        upstreams: Mapping[str, Upstream],
        settings: FetchSettings,
        rules: RepositoryRules,
        metrics: Metrics,
        group: asyncio.TaskGroup,
    ) -> None:
        self._downloads = downloads
        self._upstreams = upstreams
        self._settings = settings
        self._rules = rules
        self._index = index
        self._access = access
        self._metrics = metrics
        self._group = group
        loop = asyncio.get_running_loop()
        self._call_soon = loop.call_soon
        self._recently_prefetched: TTLCache[tuple[Repository, Digest], None]
        self._recently_prefetched = TTLCache(MAX_REMEMBERED, loop.time)
        self._queues: dict[str, deque[tuple[Repository, Digest]]] = {}
        self._active: Counter[str] = Counter()
        # Upstreams whose queues are worked on in the next turn of the loop.
        self._scheduled: set[str] = set()
        self._is_dropping = False

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
        children = self._index.children(manifest.digest, MAX_BLOBS)
        queue = self._queues.setdefault(repository.upstream, deque())
        free = MAX_QUEUED_BLOBS - len(queue)
        queue.extend((repository, digest) for digest in children[:free])
        self._record_dropped(repository.upstream, len(children[free:]))
        self._work(repository.upstream)

    def _record_dropped(self, upstream: str, count: int) -> None:
        self._metrics.count_prefetch_dropped(count)
        if count and not self._is_dropping:
            log.warning("prefetch_queue_full", upstream=upstream, blobs=MAX_QUEUED_BLOBS)
        self._is_dropping = bool(count)

    def _work(self, upstream: str) -> None:
        """Start what may be started of the queue."""
        queue = self._queues.get(upstream, ())
        for _ in range(_BLOBS_PER_TURN):
            if not queue or self._active[upstream] >= MAX_STARTED:
                break
            self._start(*queue.popleft())
        if not queue:
            self._queues.pop(upstream, None)
        elif upstream not in self._scheduled and self._active[upstream] < MAX_STARTED:
            self._scheduled.add(upstream)
            self._call_soon(self._continue, upstream)

    def _continue(self, upstream: str) -> None:
        self._scheduled.discard(upstream)
        self._work(upstream)

    def _start(self, repository: Repository, digest: Digest) -> None:
        upstream = self._upstreams[repository.upstream]
        if self._access.get_linked(repository, digest):
            return
        if self._index.has_sent(upstream.name, digest):
            # It was stored for another repository: this one needs a proof.
            self._access.start_check(repository, digest)
            return
        if self._downloads.get(upstream.name, digest):
            return
        try:
            with fetching_for("prefetch"):
                download = self._downloads.start(upstream, repository, digest, self._settings)
            _ = start_task(self._group, self._wait_finished(upstream.name, download))
        except ProxyError:
            return  # the client's own request for the blob will report the error
        self._active[upstream.name] += 1

    async def _wait_finished(self, upstream: str, download: Download) -> None:
        try:
            with suppress(ProxyError):  # as above
                await download.wait_finished()
        finally:
            self._active[upstream] -= 1
            if not self._active[upstream]:
                del self._active[upstream]
        self._work(upstream)
