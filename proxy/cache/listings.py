"""Lists: the tags of a repository, the referrers of a manifest, and the cached repositories.

Upstream's whole list is cached for the tags' TTL and the registry API cuts the pages, so that they
are right even where upstream ignores `n` and `last`. While upstream fails, an older list is served,
or one made from the index.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from proxy.concurrency import RESPONSE_TIMEOUT, SingleFlight, enforce_deadline
from proxy.errors import InvalidManifestError, StorageError, UpstreamError
from proxy.log import get_logger
from proxy.lru import TTLCache
from proxy.metrics import CacheState
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.storage.blobs import BlobStore
from proxy.storage.index import Index
from proxy.upstream.client import Upstream

# Lists of tags and, separately, of referrers that are cached.
MAX_CACHED_LISTS = 1000

log = get_logger(__name__)

# A descriptor as upstream sent it; fields unknown to us are passed on.
RawDescriptor = dict[str, Any]


class _ReferrersPage(msgspec.Struct):
    manifests: list[RawDescriptor]


class ListingCache:
    """Serves the lists of all upstreams."""

    def __init__(
        self,
        *,
        upstreams: Mapping[str, Upstream],
        store: BlobStore,
        index: Index,
        ttl: float,
        group: asyncio.TaskGroup,
        clock: Callable[[], float],
    ) -> None:
        self._upstreams = upstreams
        self._store = store
        self._index = index
        self._ttl = ttl
        self._now = asyncio.get_running_loop().time
        self._tag_cache: TTLCache[Repository, list[str]] = TTLCache(MAX_CACHED_LISTS, clock)
        self._tag_fetches: SingleFlight[Repository, list[str]] = SingleFlight(group)
        self._referrer_cache: TTLCache[tuple[Repository, Digest], list[RawDescriptor]]
        self._referrer_cache = TTLCache(MAX_CACHED_LISTS, clock)
        self._referrer_fetches: SingleFlight[tuple[Repository, Digest], list[RawDescriptor]]
        self._referrer_fetches = SingleFlight(group)

    async def list_tags(self, repository: Repository) -> tuple[list[str], CacheState]:
        """Return all tags in ASCII order (distribution-spec, "Listing Tags").

        Raises `NotFoundError`, and `UpstreamError` if upstream fails and no tag is cached.
        """
        cached = self._tag_cache.get_with_age(repository)
        if cached and 0 <= cached[0] < self._ttl:
            return cached[1], "hit"
        upstream = self._upstreams[repository.upstream]

        async def fetch() -> list[str]:
            tags = sorted(set(await upstream.fetch_tags(repository.name)))
            self._tag_cache.set(repository, tags)
            return tags

        try:
            async with enforce_deadline(self._now() + RESPONSE_TIMEOUT, repository.upstream):
                return await self._tag_fetches.run(repository, fetch), "miss"
        except UpstreamError as error:
            stale = cached[1] if cached else sorted(self._index.tags(repository))
            if not stale:
                raise
            log.warning("stale_served", repository=repository.name, list="tags", reason=str(error))
            return stale, "stale"

    async def list_referrers(
        self, repository: Repository, digest: Digest
    ) -> tuple[list[RawDescriptor], CacheState]:
        """Return the descriptors of all referrers (distribution-spec, "Listing Referrers").

        Raises `NotFoundError` if upstream lacks this API (clients then use the fallback tag), and
        `UpstreamError` if upstream fails and no referrer is cached.
        """
        key = (repository, digest)
        cached = self._referrer_cache.get_with_age(key)
        if cached and 0 <= cached[0] < self._ttl:
            return cached[1], "hit"
        upstream = self._upstreams[repository.upstream]

        async def fetch() -> list[RawDescriptor]:
            pages = await upstream.fetch_referrers(repository.name, digest)
            referrers = [item for page in pages for item in _parse_referrers_page(page)]
            self._referrer_cache.set(key, referrers)
            return referrers

        try:
            async with enforce_deadline(self._now() + RESPONSE_TIMEOUT, repository.upstream):
                return await self._referrer_fetches.run(key, fetch), "miss"
        except UpstreamError as error:
            stale = (
                cached[1] if cached else await self._describe_stored_referrers(repository, digest)
            )
            if not stale:
                raise
            reason = str(error)
            log.warning("stale_served", repository=repository.name, list="referrers", reason=reason)
            return stale, "stale"

    def list_repositories(self) -> list[Repository]:
        """Return the repositories that have a manifest in the store."""
        return self._index.repositories()

    async def _describe_stored_referrers(
        self, repository: Repository, subject: Digest
    ) -> list[RawDescriptor]:
        """Return the descriptors of the stored referrers, made as the specification says."""
        descriptors = []
        for digest, row in self._index.referrers(repository, subject):
            try:
                content = await self._store.read(digest)
                manifest = oci.parse_manifest(content or b"", row.media_type or "")
            except (InvalidManifestError, StorageError):
                continue
            if manifest.doubt:
                continue
            descriptor: RawDescriptor = {
                "mediaType": manifest.media_type,
                "digest": str(digest),
                "size": row.size,
                "artifactType": manifest.artifact_type,
            }
            if manifest.annotations:
                descriptor["annotations"] = manifest.annotations
            descriptors.append(descriptor)
        return descriptors


def _parse_referrers_page(content: bytes) -> list[RawDescriptor]:
    try:
        return msgspec.json.decode(content, type=_ReferrersPage).manifests
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UpstreamError("upstream sent an invalid referrers list") from error
