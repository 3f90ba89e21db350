"""Content of images that another node of the fleet has, brought into the store for an operation of this node."""

from collections.abc import Mapping

from proxy.cache.blobs import BlobCache
from proxy.cache.manifests import ManifestCache
from proxy.config import FetchSettings
from proxy.download.manager import DownloadManager
from proxy.errors import ProxyError
from proxy.fleet.directory import Directory
from proxy.log import get_logger
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository
from proxy.traffic import fetching_for
from proxy.upstream.client import Upstream

log = get_logger(__name__)


class FleetContent:
    """Fetches what another node has, in the way in which clients' requests are answered."""

    def __init__(
        self,
        *,
        directory: Directory,
        upstreams: Mapping[str, Upstream],
        manifests: ManifestCache,
        blobs: BlobCache,
        downloads: DownloadManager,
        settings: FetchSettings,
    ) -> None:
        self._directory = directory
        self._upstreams = upstreams
        self._manifests = manifests
        self._blobs = blobs
        self._downloads = downloads
        self._settings = settings

    async def fetch(
        self, repository: Repository, reference: Reference, *, is_manifest: bool
    ) -> bool:
        """Store a manifest or a blob if another node has it; return whether it is stored now.

        What no other node has is not asked for upstream. A failure is logged.
        """
        digest = await self._find_digest(repository, reference)
        if digest is None or not await self._directory.is_held(digest):
            return False
        try:
            with fetching_for("preload"):
                if is_manifest:
                    await self._manifests.get_manifest(repository, reference, ())
                    return True
                return await self._fetch_blob(repository, digest)
        except ProxyError as error:
            log.info("fleet_content_missing", digest=str(digest), reason=str(error))
            return False

    async def _find_digest(self, repository: Repository, reference: Reference) -> Digest | None:
        """Return what a tag means in the fleet; None if that is not known."""
        if isinstance(reference, Digest):
            return reference
        shared = await self._directory.get_tag(repository, reference)
        if shared is None or not shared.is_fresh:
            # `get_manifest` asks upstream about a tag that is not fresh.
            await self._directory.release_tag(repository, reference)
        return shared.digest if shared else None

    async def _fetch_blob(self, repository: Repository, digest: Digest) -> bool:
        if await self._blobs.is_servable(repository, digest):
            return True
        upstream = self._upstreams[repository.upstream]
        attached = self._downloads.attach(upstream, repository, digest, self._settings)
        async with attached as download:
            await download.wait_finished()
        return await self._blobs.is_servable(repository, digest)
