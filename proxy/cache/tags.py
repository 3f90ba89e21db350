"""Lists: the tags of a repository, the referrers of a manifest, the repositories that are cached.

Upstream's list is kept whole for a while, and pages are cut here, so that they are right whatever
upstream makes of `n` and `last`. While upstream fails, an older list does, or what the index knows.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from proxy.concurrency import DEADLINE, SingleFlight, until
from proxy.errors import InvalidManifestError, StorageError, UpstreamError
from proxy.log import get_logger
from proxy.lru import Expiring
from proxy.metrics import CacheState
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.storage.blobs import LocalStore
from proxy.storage.index import Index
from proxy.upstream.client import Upstream

LISTS = 1000

log = get_logger(__name__)

# A descriptor as upstream sent it: unknown fields must survive.
Descriptor = dict[str, Any]


class _IndexPage(msgspec.Struct):
    manifests: list[Descriptor]


class Listings:
    """Answers lists for all upstreams."""

    def __init__(
        self,
        *,
        upstreams: Mapping[str, Upstream],
        store: LocalStore,
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
        self._tags: Expiring[Repository, list[str]] = Expiring(LISTS, clock)
        self._tag_flights: SingleFlight[Repository, list[str]] = SingleFlight(group)
        self._referrers: Expiring[tuple[Repository, Digest], list[Descriptor]]
        self._referrers = Expiring(LISTS, clock)
        self._referrer_flights: SingleFlight[tuple[Repository, Digest], list[Descriptor]]
        self._referrer_flights = SingleFlight(group)

    async def tags(self, repository: Repository) -> tuple[list[str], CacheState]:
        """Return all tags in ASCII order (distribution-spec, "Listing Tags").

        Raises `UnknownError`, and `UpstreamError` if upstream fails and nothing is known.
        """
        kept = self._tags.get(repository)
        if kept and 0 <= kept[0] < self._ttl:
            return kept[1], "hit"
        upstream = self._upstreams[repository.upstream]

        async def ask() -> list[str]:
            tags = sorted(set(await upstream.fetch_tags(repository.name)))
            self._tags.put(repository, tags)
            return tags

        try:
            async with until(self._now() + DEADLINE, repository.upstream):
                return await self._tag_flights.do(repository, ask), "miss"
        except UpstreamError as error:
            known = kept[1] if kept else sorted(self._index.tags(repository))
            if not known:
                raise
            log.warning("serving_stale", repository=repository.name, list="tags", reason=str(error))
            return known, "stale"

    async def referrers(
        self, repository: Repository, digest: Digest
    ) -> tuple[list[Descriptor], CacheState]:
        """Return descriptors of what refers to the digest (distribution-spec, "Listing Referrers").

        Raises `UnknownError` where upstream does not have the API, so that clients fall back to tags.
        """
        key = (repository, digest)
        kept = self._referrers.get(key)
        if kept and 0 <= kept[0] < self._ttl:
            return kept[1], "hit"
        upstream = self._upstreams[repository.upstream]

        async def ask() -> list[Descriptor]:
            pages = await upstream.fetch_referrers(repository.name, digest)
            found = [item for page in pages for item in _parse_page(page)]
            self._referrers.put(key, found)
            return found

        try:
            async with until(self._now() + DEADLINE, repository.upstream):
                return await self._referrer_flights.do(key, ask), "miss"
        except UpstreamError as error:
            known = kept[1] if kept else await self._cached_referrers(repository, digest)
            if not known:
                raise
            reason = str(error)
            log.warning(
                "serving_stale", repository=repository.name, list="referrers", reason=reason
            )
            return known, "stale"

    def catalog(self) -> list[Repository]:
        """Return the repositories that have a manifest in the store."""
        return self._index.repositories()

    async def _cached_referrers(self, repository: Repository, subject: Digest) -> list[Descriptor]:
        """Describe the referrers that are in the store, as the specification has it."""
        found = []
        for digest, row in self._index.referrers(repository, subject):
            try:
                content = await self._store.read(digest)
                manifest = oci.parse(content or b"", row.media_type or "")
            except (InvalidManifestError, StorageError):
                continue
            descriptor: Descriptor = {
                "mediaType": manifest.media_type,
                "digest": str(digest),
                "size": row.size,
                "artifactType": manifest.artifact_type,
            }
            if manifest.annotations:
                descriptor["annotations"] = manifest.annotations
            found.append(descriptor)
        return found


def _parse_page(content: bytes) -> list[Descriptor]:
    try:
        return msgspec.json.decode(content, type=_IndexPage).manifests
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UpstreamError("upstream sent something that is no list of referrers") from error
