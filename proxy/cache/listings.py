"""Lists: the tags of a repository, the referrers of a manifest, the repositories that are cached.

Upstream's list is kept whole for a while, and pages are cut here, so that they are right whatever
upstream makes of `n` and `last`. While upstream fails, an older list does, or what the index knows.
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

MAX_CACHED_LISTS = 1000

log = get_logger(__name__)

# A descriptor as upstream sent it: unknown fields must survive.
RawDescriptor = dict[str, Any]


class _ReferrersPage(msgspec.Struct):
    manifests: list[RawDescriptor]


class ListingCache:
    """Answers lists for all upstreams."""

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

        Raises `UnknownError`, and `UpstreamError` if upstream fails and nothing is known.
        """
        kept = self._tag_cache.get_with_age(repository)
        if kept and 0 <= kept[0] < self._ttl:
            return kept[1], "hit"
        upstream = self._upstreams[repository.upstream]

        async def ask() -> list[str]:
            tags = sorted(set(await upstream.fetch_tags(repository.name)))
            self._tag_cache.set(repository, tags)
            return tags

        try:
            async with enforce_deadline(self._now() + RESPONSE_TIMEOUT, repository.upstream):
                return await self._tag_fetches.run(repository, ask), "miss"
        except UpstreamError as error:
            known = kept[1] if kept else sorted(self._index.tags(repository))
            if not known:
                raise
            log.warning("stale_served", repository=repository.name, list="tags", reason=str(error))
            return known, "stale"

    async def list_referrers(
        self, repository: Repository, digest: Digest
    ) -> tuple[list[RawDescriptor], CacheState]:
        """Return descriptors of what refers to the digest (distribution-spec, "Listing Referrers").

        Raises `UnknownError` where upstream does not have the API, so that clients fall back to tags.
        """
        key = (repository, digest)
        kept = self._referrer_cache.get_with_age(key)
        if kept and 0 <= kept[0] < self._ttl:
            return kept[1], "hit"
        upstream = self._upstreams[repository.upstream]

        async def ask() -> list[RawDescriptor]:
            pages = await upstream.fetch_referrers(repository.name, digest)
            found = [item for page in pages for item in _parse_referrers_page(page)]
            self._referrer_cache.set(key, found)
            return found

        try:
            async with enforce_deadline(self._now() + RESPONSE_TIMEOUT, repository.upstream):
                return await self._referrer_fetches.run(key, ask), "miss"
        except UpstreamError as error:
            known = kept[1] if kept else await self._describe_stored_referrers(repository, digest)
            if not known:
                raise
            reason = str(error)
            log.warning("stale_served", repository=repository.name, list="referrers", reason=reason)
            return known, "stale"

    def list_repositories(self) -> list[Repository]:
        """Return the repositories that have a manifest in the store."""
        return self._index.repositories()

    async def _describe_stored_referrers(
        self, repository: Repository, subject: Digest
    ) -> list[RawDescriptor]:
        """Describe the referrers that are in the store, as the specification has it."""
        found = []
        for digest, row in self._index.referrers(repository, subject):
            try:
                content = await self._store.read(digest)
                manifest = oci.parse_manifest(content or b"", row.media_type or "")
            except (InvalidManifestError, StorageError):
                continue
            descriptor: RawDescriptor = {
                "mediaType": manifest.media_type,
                "digest": str(digest),
                "size": row.size,
                "artifactType": manifest.artifact_type,
            }
            if manifest.annotations:
                descriptor["annotations"] = manifest.annotations
            found.append(descriptor)
        return found


def _parse_referrers_page(content: bytes) -> list[RawDescriptor]:
    try:
        return msgspec.json.decode(content, type=_ReferrersPage).manifests
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UpstreamError("upstream sent something that is no list of referrers") from error
