"""Content that an operation wants of an image, brought into the store with the care of a preload."""

from collections.abc import Mapping
from contextlib import suppress

from proxy.cache.blobs import BlobCache
from proxy.cache.listings import ListingCache
from proxy.cache.manifests import ManifestCache
from proxy.config import FetchSettings
from proxy.download.download import Download
from proxy.download.manager import DownloadManager
from proxy.errors import (
    InvalidManifestError,
    NoSpaceError,
    NotFoundError,
    ProxyError,
    RateLimitedError,
    UnknownManifestError,
)
from proxy.names import NameParser
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository, Tag
from proxy.oci.referrers import RawDescriptor, fallback_tag, parse_fallback_index
from proxy.parsing import DocumentParser
from proxy.storage.index import Index
from proxy.traffic import fetching_for
from proxy.upstream.client import Upstream

# Seconds after which upstream's quota is looked at again, as in a preload.
QUOTA_RETRY_AFTER = 900.0


class ContentFetcher:
    """Fetches what the store lacks, by policies and `deny`, and leaves the last pulls of a quota to clients."""

    def __init__(
        self,
        *,
        upstreams: Mapping[str, Upstream],
        names: NameParser,
        manifests: ManifestCache,
        blobs: BlobCache,
        listings: ListingCache,
        downloads: DownloadManager,
        index: Index,
        parser: DocumentParser,
        settings: FetchSettings,
    ) -> None:
        self._upstreams = upstreams
        self._names = names
        self._manifests = manifests
        self._blobs = blobs
        self._listings = listings
        self._downloads = downloads
        self._index = index
        self._parser = parser
        self._settings = settings

    async def fetch_manifest(self, repository: Repository, reference: Reference) -> bytes:
        """Store a manifest and return its content. Raises as `ManifestCache.get_current_manifest` does."""
        upstream = self._upstream(repository)
        if not (isinstance(reference, Digest) and self._index.manifest(reference)):
            _raise_if_scarce(upstream)
        with fetching_for("preload"):
            manifest = await self._manifests.get_current_manifest(repository, reference)
        return manifest.content

    async def fetch_blob(self, repository: Repository, digest: Digest, size: int) -> None:
        """Store a blob; one of another size is not fetched to its end.

        Raises `UnknownBlobError`, `UpstreamError`, `DigestMismatchError`, `NoSpaceError` and
        `InvalidManifestError`.
        """
        upstream = self._upstream(repository)
        if await self._blobs.is_servable(repository, digest):
            return
        with fetching_for("preload"):
            attached = self._downloads.attach(upstream, repository, digest, self._settings)
            async with attached as download:
                await _wait_finished(download, size)
        if download.has_stopped_storing:
            raise NoSpaceError(f"the store has no space for {digest}, or its disk has errors")

    async def list_referrers(self, repository: Repository, subject: Digest) -> list[RawDescriptor]:
        """Return the descriptors of what refers to a manifest, by the API or the fallback tag.

        Raises `UpstreamError`.
        """
        upstream = self._upstream(repository)
        try:
            return await self._listings.get_current_referrers(repository, subject)
        except UnknownManifestError:
            pass  # no API, or no list of this manifest
        # Not stored: GitLab and others resolve this tag to what is no index of referrers.
        tag = fallback_tag(subject)
        # Shows whether HEAD works, so that its 404 for a tag is believed.
        with suppress(ProxyError):
            await upstream.probe_head(repository.name, subject)
        try:
            resolved = await upstream.find_tag(repository.name, tag)
            if resolved is None or resolved.digest == subject:
                return []
            _raise_if_scarce(upstream)
            fetched = resolved.manifest or await upstream.fetch_manifest(
                repository.name, resolved.digest or tag
            )
        except NotFoundError:
            return []
        size = len(fetched.content)
        return await self._parser.run_for_preload(size, parse_fallback_index, fetched.content)

    async def has_tag(self, repository: Repository, tag: Tag) -> bool:
        """Tell whether upstream has a tag, asked by HEAD where that works. Raises `UpstreamError`."""
        return await self._upstream(repository).find_tag(repository.name, tag) is not None

    def _upstream(self, repository: Repository) -> Upstream:
        """Return the upstream of a repository. Raises `DeniedError`."""
        self._names.check_allowed(repository)
        return self._upstreams[repository.upstream]


async def _wait_finished(download: Download, size: int) -> None:
    """Wait for the end of a download. Raises `InvalidManifestError` if upstream states another size."""
    await download.wait_started()
    if download.size not in (None, size):
        raise InvalidManifestError(
            f"{download.digest} has {download.size} bytes, not {size} as its descriptor states"
        )
    await download.wait_finished()


def _raise_if_scarce(upstream: Upstream) -> None:
    if upstream.scarce_quota_reason:
        raise RateLimitedError(
            f"{upstream.scarce_quota_reason}, reserved for clients", retry_after=QUOTA_RETRY_AFTER
        )
