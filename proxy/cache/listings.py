"""Lists: the tags of a repository, the referrers of a manifest, and the cached repositories.

Upstream's whole list is cached for the tags' TTL and the registry API cuts the pages, so that they
are right even where upstream ignores `n` and `last`. While upstream fails, an older list is served,
or one made from the index.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from proxy.concurrency import RESPONSE_TIMEOUT, SingleFlight, enforce_deadline
from proxy.errors import (
    UNREACHABLE_ERRORS,
    InvalidManifestError,
    NoReferrersApiError,
    StorageError,
    UnknownManifestError,
    UpstreamError,
)
from proxy.log import get_logger
from proxy.lru import TTLCache
from proxy.metrics import CacheState
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.oci.referrers import (
    EncodedReferrers,
    RawDescriptor,
    fallback_tag,
    parse_descriptor_digest,
    parse_fallback_index,
)
from proxy.oci.tags import EncodedTags, encode_tags
from proxy.parsing import DocumentParser
from proxy.storage.blobs import BlobStore
from proxy.storage.index import Index
from proxy.storage.list_queries import is_listed_referrer, list_repositories, list_tags
from proxy.upstream.client import Upstream

# Lists of tags and, separately, of referrers that are cached, and their bytes.
MAX_CACHED_LISTS = 1000
MAX_CACHED_LISTS_SIZE = 32 << 20
# Tags, and referrers of one manifest, that are listed from the index.
MAX_LISTED_TAGS = 100_000
MAX_LISTED_REFERRERS = 1000

log = get_logger(__name__)


class ListingCache:
    """Serves the lists of all upstreams."""

    def __init__(
        self,
        *,
        upstreams: Mapping[str, Upstream],
        store: BlobStore,
        index: Index,
        parser: DocumentParser,
        ttl: float,
        group: asyncio.TaskGroup,
        clock: Callable[[], float],
    ) -> None:
        self._upstreams = upstreams
        self._store = store
        self._index = index
        self._parser = parser
        self._ttl = ttl
        self._now = asyncio.get_running_loop().time
        self._tag_cache: TTLCache[Repository, EncodedTags] = TTLCache(
            MAX_CACHED_LISTS, clock, max_size=MAX_CACHED_LISTS_SIZE, size_of=lambda tags: tags.size
        )
        self._tag_fetches: SingleFlight[Repository, EncodedTags] = SingleFlight(group)
        # None where upstream refused the list.
        self._referrer_cache: TTLCache[tuple[Repository, Digest], EncodedReferrers | None]
        self._referrer_cache = TTLCache(
            MAX_CACHED_LISTS,
            clock,
            max_size=MAX_CACHED_LISTS_SIZE,
            size_of=lambda referrers: len(referrers.content) if referrers else 0,
        )
        self._referrer_fetches: SingleFlight[tuple[Repository, Digest], EncodedReferrers]
        self._referrer_fetches = SingleFlight(group)

    async def list_tags(self, repository: Repository) -> tuple[EncodedTags, CacheState]:
        """Return all tags in ASCII order (distribution-spec, "Listing Tags").

        Raises `NotFoundError`, and `UpstreamError` if upstream fails and no tag is cached.
        """
        cached = self._tag_cache.get_with_age(repository)
        if cached and 0 <= cached[0] < self._ttl:
            return cached[1], "hit"
        upstream = self._upstreams[repository.upstream]

        async def fetch() -> EncodedTags:
            tags = await upstream.fetch_tags(repository.name)
            self._tag_cache.set(repository, tags)
            return tags

        try:
            async with enforce_deadline(self._now() + RESPONSE_TIMEOUT, repository.upstream):
                return await self._tag_fetches.run(repository, fetch), "miss"
        except UpstreamError as error:
            stale = cached[1] if cached else await self._list_cached_tags(repository)
            if not stale:
                raise
            log.warning("stale_served", repository=repository.name, list="tags", reason=str(error))
            return stale, "stale"

    async def _list_cached_tags(self, repository: Repository) -> EncodedTags:
        """Return the tags in the index; none if it cannot be read."""

        def read(connection: sqlite3.Connection) -> EncodedTags:
            tags = list_tags(connection, repository, MAX_LISTED_TAGS)
            return encode_tags(b'"%s",' % tag.encode() for tag in tags)

        with suppress(StorageError):
            return await self._index.read(read)
        return EncodedTags(b"")

    async def list_referrers(
        self, repository: Repository, digest: Digest, artifact_type: str = ""
    ) -> tuple[EncodedReferrers, CacheState]:
        """Return the descriptors of all referrers (distribution-spec, "Listing Referrers").

        With an `artifact_type`, only those of that type.

        Raises `UnknownManifestError` if upstream lists none, so that clients go on to the fallback
        tag, and `UpstreamError` if upstream fails and no referrer is cached. While upstream cannot
        be reached, that is an `UnknownManifestError` too.
        """
        referrers, state = await self._list_all_referrers(repository, digest)
        if artifact_type:
            size = len(referrers.content)
            referrers = await self._parser.run(
                repository.upstream, size, referrers.with_type, artifact_type
            )
        return referrers, state

    async def _list_all_referrers(
        self, repository: Repository, digest: Digest
    ) -> tuple[EncodedReferrers, CacheState]:
        key = (repository, digest)
        cached = self._referrer_cache.get_with_age(key)
        if cached and 0 <= cached[0] < self._ttl:
            if cached[1] is None:
                raise UnknownManifestError(f"{repository.upstream} lists no referrers of {digest}")
            return cached[1], "hit"
        try:
            return await self._get_current_referrers(repository, digest), "miss"
        except UpstreamError as error:
            stale = cached[1] if cached else None
            if stale is None:
                found = await self._describe_cached_referrers(repository, digest, error)
                stale = EncodedReferrers.from_descriptors(found)
            reason = str(error)
            log.warning("stale_served", repository=repository.name, list="referrers", reason=reason)
            return stale, "stale"

    async def get_current_referrers(
        self, repository: Repository, digest: Digest
    ) -> list[RawDescriptor]:
        """Return the descriptors of the referrers that upstream lists now.

        Raises `UnknownManifestError` if it lists none, and `UpstreamError`.
        """
        referrers = await self._get_current_referrers(repository, digest)
        return await self._parser.run_for_preload(len(referrers.content), referrers.decode)

    async def _get_current_referrers(
        self, repository: Repository, digest: Digest
    ) -> EncodedReferrers:
        fetch = partial(self._fetch_referrers, repository, digest)
        async with enforce_deadline(self._now() + RESPONSE_TIMEOUT, repository.upstream):
            return await self._referrer_fetches.run((repository, digest), fetch)

    async def _fetch_referrers(self, repository: Repository, digest: Digest) -> EncodedReferrers:
        upstream = self._upstreams[repository.upstream]
        try:
            referrers = await upstream.fetch_referrers(repository.name, digest)
        except NoReferrersApiError:
            raise  # remembered by the upstream
        except UnknownManifestError:
            self._referrer_cache.set((repository, digest), None)
            raise
        self._referrer_cache.set((repository, digest), referrers)
        return referrers

    async def list_repositories(
        self, after: str, count: int, is_allowed: Callable[[Repository], bool]
    ) -> list[Repository]:
        """Return up to `count` allowed repositories that have a stored manifest, in ASCII order.

        Their names, as clients pull them, follow `after`. Raises `StorageError`.
        """
        list_page = partial(list_repositories, after=after, count=count, is_allowed=is_allowed)
        return await self._index.read(list_page)

    async def _describe_cached_referrers(
        self, repository: Repository, subject: Digest, error: UpstreamError
    ) -> list[RawDescriptor]:
        """Return what upstream listed when a preload asked, and the stored referrers.

        Without a preload, these are the stored referrers and those in the cached fallback index.
        A referrer that upstream listed and did not have has none itself.
        If there are none, raises upstream's `error`, or `UnknownManifestError` if upstream cannot
        be reached.
        """
        record = self._index.referrer_record(repository, subject)
        stored = await self._describe_stored_referrers(repository, subject)
        if record:
            descriptors = record.descriptors
        else:
            descriptors = await self._read_fallback_index(repository, subject, stored)
        # What upstream says of a referrer, completed by what it says of itself.
        own = {item["digest"]: item for item in stored}
        found = [{**own.pop(item.get("digest"), {}), **item} for item in descriptors]
        if found or own or record:
            return [*found, *own.values()]
        # The fallback tag cannot be requested either.
        if isinstance(error, UNREACHABLE_ERRORS):
            if await self._is_absent_referrer(repository, subject):
                return []
            raise UnknownManifestError(f"no referrers are cached: {error}") from error
        raise error

    async def _is_absent_referrer(self, repository: Repository, digest: Digest) -> bool:
        """Tell whether upstream listed a manifest as a referrer, and the store does not have it."""
        if self._index.manifest(digest):
            return False
        is_listed = partial(is_listed_referrer, repository=repository, digest=digest)
        with suppress(StorageError):
            return await self._index.read(is_listed)
        return False

    async def _describe_stored_referrers(
        self, repository: Repository, subject: Digest
    ) -> list[RawDescriptor]:
        """Return the descriptors of the stored referrers, made as the specification says."""
        descriptors = []
        for digest, row in self._index.referrers(repository, subject, MAX_LISTED_REFERRERS):
            try:
                content = await self._store.read(digest) or b""
                manifest = await self._parser.run(
                    repository.upstream,
                    len(content),
                    oci.parse_manifest,
                    content,
                    row.media_type or "",
                )
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

    async def _read_fallback_index(
        self, repository: Repository, subject: Digest, stored: Sequence[RawDescriptor]
    ) -> list[RawDescriptor]:
        """Return the descriptors in the cached index under the fallback tag, if it is one of referrers.

        Some registries resolve the tag to the subject itself, or it is just some image: then no
        child is among the `stored` referrers.
        """
        tag = self._index.tag(repository, fallback_tag(subject))
        if tag is None or tag.digest == subject:
            return []
        try:
            content = await self._store.read(tag.digest) or b""
        except StorageError:
            return []
        descriptors = await self._parser.run(
            repository.upstream, len(content), parse_fallback_index, content
        )
        named = {item["digest"] for item in stored}
        is_index = any(
            digest and (str(digest) in named or not self._index.manifest(digest))
            for digest in map(parse_descriptor_digest, descriptors)
        )
        return descriptors if is_index else []
