"""Repairs: what the scrub has found damaged is fetched anew, without a request of a client."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress

from proxy.cache.manifests import ManifestCache
from proxy.config import FetchSettings
from proxy.download.manager import DownloadManager
from proxy.errors import DeniedError, NoSpaceError, NotFoundError, ProxyError
from proxy.log import get_logger
from proxy.names import NameParser
from proxy.oci.reference import Repository
from proxy.storage.index import Index
from proxy.storage.scrub import DamagedBlob
from proxy.traffic import purpose
from proxy.upstream.client import Upstream

# Seconds until a repair that has failed is tried again.
RETRY_INTERVAL = 600.0
# Blobs that wait to be repaired. Further ones are fetched when clients request them.
MAX_PENDING = 1000

# Errors that another attempt would not change.
_FINAL_ERRORS = (NotFoundError, DeniedError)

log = get_logger(__name__)


class BlobRepairer:
    """Fetches damaged blobs from the repositories that were linked to them, by one configuration."""

    def __init__(
        self,
        *,
        upstreams: Mapping[str, Upstream],
        names: NameParser,
        manifests: ManifestCache,
        downloads: DownloadManager,
        index: Index,
        settings: FetchSettings,
    ) -> None:
        self._upstreams = upstreams
        self._names = names
        self._manifests = manifests
        self._downloads = downloads
        self._index = index
        self._settings = settings

    async def repair(self, blob: DamagedBlob) -> None:
        """Fetch a blob from the first repository that has it.

        Raises `NotFoundError` or `DeniedError` if no repository ever will, else another `ProxyError`.
        """
        problem: ProxyError = NotFoundError("no repository is known to have it")
        for repository in blob.repositories:
            if self._index.blob_size(blob.digest) is not None:
                return
            try:
                self._names.check_allowed(repository)
                await self._fetch(repository, blob)
            except ProxyError as error:
                if isinstance(problem, _FINAL_ERRORS):
                    problem = error
        if self._index.blob_size(blob.digest) is None:
            raise problem

    async def _fetch(self, repository: Repository, blob: DamagedBlob) -> None:
        if blob.is_manifest:
            _ = await self._manifests.get_manifest(repository, blob.digest, ())
            return
        upstream = self._upstreams[repository.upstream]
        attached = self._downloads.attach(upstream, repository, blob.digest, self._settings)
        async with attached as download:
            await download.wait_finished()
        if download.has_stopped_storing:
            raise NoSpaceError("the store has no space for it, or its disk fails")


class RepairQueue:
    """The blobs that wait to be repaired.

    `get_repairer` is called for each attempt, as a reload replaces the repairer.
    """

    def __init__(self, get_repairer: Callable[[], BlobRepairer]) -> None:
        self._get_repairer = get_repairer
        self._pending: deque[DamagedBlob] = deque()
        self._added = asyncio.Event()

    def add(self, blob: DamagedBlob) -> None:
        """Repair a blob as soon as possible, unless too many wait."""
        if len(self._pending) < MAX_PENDING:
            self._pending.append(blob)
            self._added.set()

    async def run(self) -> None:
        """Repair blobs until cancelled; those that fail are tried again. Runs in a task of its own."""
        purpose.set("repair")
        while True:
            self._added.clear()
            for _ in range(len(self._pending)):
                await self._repair_next()
            with suppress(TimeoutError):
                async with asyncio.timeout(RETRY_INTERVAL if self._pending else None):
                    await self._added.wait()

    async def _repair_next(self) -> None:
        blob = self._pending.popleft()
        try:
            await self._get_repairer().repair(blob)
        except ProxyError as error:
            is_final = isinstance(error, _FINAL_ERRORS)
            log.warning(
                "blob_repair_failed",
                digest=str(blob.digest),
                reason=str(error),
                retry_after=None if is_final else RETRY_INTERVAL,
            )
            if not is_final:
                self._pending.append(blob)
        else:
            log.info("blob_repaired", digest=str(blob.digest))
