"""Manifests and blobs: from the store, from a running download, or from upstream.

The order of the questions is the design: may this repository be asked for, is it known to hold the
digest, is the digest here, does somebody fetch it already, and only then upstream.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from copy import copy
from functools import lru_cache, partial

import msgspec

from proxy.cache import freshness
from proxy.cache.freshness import Freshness
from proxy.cache.manifests import ManifestStore
from proxy.concurrency import RESPONSE_TIMEOUT, STALE_MARGIN, SingleFlight, enforce_deadline
from proxy.config import FetchSettings, ManifestsSettings
from proxy.download.manager import DownloadManager
from proxy.download.reader import DownloadReader
from proxy.errors import (
    DigestMismatchError,
    NotFoundError,
    OfflineError,
    RateLimitedError,
    StorageError,
    UnknownBlobError,
    UnknownManifestError,
    UpstreamError,
)
from proxy.log import get_logger
from proxy.lru import CachedManifest, TTLCache
from proxy.metrics import CacheState, Metrics
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository, Tag
from proxy.storage.blobs import BlobStore, OpenBlob
from proxy.storage.index import Index, TagRow
from proxy.storage.space import SpaceManager
from proxy.upstream.client import Upstream

MAX_CACHED_ERRORS = 10_000

log = get_logger(__name__)


class ManifestResult(msgspec.Struct, frozen=True):
    """A manifest and how it was come by. `age` and `ttl` are seconds; `ttl` is None by digest."""

    manifest: CachedManifest
    cache_state: CacheState
    age: float = 0.0
    ttl: float | None = None
    warning: str = ""


class BlobResult(msgspec.Struct, frozen=True):
    """Where the bytes of a blob come from."""

    source: OpenBlob | DownloadReader
    cache_state: CacheState


class PullThroughCache:
    """Answers for all upstreams out of one store."""

    def __init__(
        self,
        *,
        upstreams: Mapping[str, Upstream],
        store: BlobStore,
        index: Index,
        space: SpaceManager,
        downloads: DownloadManager,
        settings: ManifestsSettings,
        fetch_settings: FetchSettings,
        metrics: Metrics,
        executor: Executor,
        group: asyncio.TaskGroup,
        clock: Callable[[], float],
    ) -> None:
        self._upstreams = upstreams
        self._store = store
        self._index = index
        self._space = space
        self._downloads = downloads
        self._settings = settings
        self._fetch_settings = fetch_settings
        self._clock = clock
        self._now = asyncio.get_running_loop().time
        self._manifest_store = ManifestStore(store, index, space, metrics, executor)
        self._tag_ttl = lru_cache(maxsize=4096)(
            partial(freshness.tag_ttl, rules=settings.tag_ttl, default=settings.ttl)
        )
        self._accepts = lru_cache(maxsize=256)(freshness.accepts)
        self._negative_cache: TTLCache[tuple[Repository, Tag], NotFoundError]
        self._negative_cache = TTLCache(MAX_CACHED_ERRORS, clock)
        self._quota_errors: TTLCache[tuple[Repository, Tag], RateLimitedError]
        self._quota_errors = TTLCache(MAX_CACHED_ERRORS, clock)
        self._fetches: SingleFlight[tuple[Repository, Reference], tuple[CachedManifest, CacheState]]
        self._fetches = SingleFlight(group)
        self._access_checks: SingleFlight[tuple[Repository, Digest], None] = SingleFlight(group)

    # Manifests.

    async def get_manifest(
        self, repository: Repository, reference: Reference, accept: tuple[str, ...]
    ) -> ManifestResult:
        """Return the manifest that `reference` names now.

        By tag in a form that the client's `accept` lines take; by digest whatever they say.
        Raises `UnknownError`, `UpstreamError` and `DigestMismatchError`.
        """
        deadline = self._now() + RESPONSE_TIMEOUT
        if isinstance(reference, Digest):
            return await self._get_by_digest(repository, reference, deadline)
        answer = await self._get_by_tag(repository, reference, deadline - STALE_MARGIN)
        if self._accepts(accept, answer.manifest.media_type):
            return answer
        return await self._select_platform_manifest(repository, answer, accept, deadline)

    def lookup_cached_manifest(
        self, repository: Repository, reference: Reference, accept: tuple[str, ...]
    ) -> ManifestResult | None:
        """Return what `manifest` would, if all of it is in memory and nobody has to be asked."""
        if isinstance(reference, Digest):
            row = self._index.blob(repository, reference)
            if not (row and row.is_linked and row.media_type):
                return None
            held = self._manifest_store.lookup_cached(reference)
            return ManifestResult(held, "hit") if held else None
        known = self._index.tag(repository, reference)
        if known is None or self._tag_freshness(reference, known) is not Freshness.FRESH:
            return None
        held = self._manifest_store.lookup_cached(known.digest)
        if held is None or not self._accepts(accept, held.media_type):
            return None
        age = self._clock() - known.checked_at
        return ManifestResult(held, "hit", age, self._tag_ttl(reference))

    async def get_current_manifest(
        self, repository: Repository, reference: Reference
    ) -> CachedManifest:
        """Return what `reference` names upstream now: a tag is asked about however fresh it is.

        What is here is not fetched again. Raises as `manifest` does.
        """
        deadline = self._now() + RESPONSE_TIMEOUT
        if isinstance(reference, Digest):
            return (await self._get_by_digest(repository, reference, deadline)).manifest
        known = self._index.tag(repository, reference)
        held, _ = await self._refresh_once(repository, reference, known, deadline)
        return held

    async def _get_by_tag(
        self, repository: Repository, tag: Tag, deadline: float
    ) -> ManifestResult:
        known = self._index.tag(repository, tag)
        if known is None:
            self._check_negative_cache(repository, tag)
            held, state = await self._refresh_once(repository, tag, None, deadline)
            return ManifestResult(held, state, 0.0, self._tag_ttl(tag))
        ttl, age = self._tag_ttl(tag), self._clock() - known.checked_at
        verdict = self._tag_freshness(tag, known)
        if verdict in (Freshness.FRESH, Freshness.STALE_WHILE_REVALIDATE) and (
            fresh := await self._manifest_store.load(known.digest)
        ):
            if verdict is Freshness.STALE_WHILE_REVALIDATE:
                work = partial(self._refresh, repository, tag, known)
                self._fetches.start((repository, tag), work)
            return ManifestResult(fresh, "hit", age, ttl)
        try:
            held, state = await self._refresh_once(repository, tag, known, deadline)
        except (UpstreamError, DigestMismatchError) as error:
            # Offline, nobody could say anything newer: nothing is too old.
            is_dead = verdict is Freshness.EXPIRED and not isinstance(error, OfflineError)
            stale = None if is_dead else await self._manifest_store.load(known.digest)
            if stale is None:
                raise
            log.warning("stale_served", repository=repository.name, tag=tag, reason=str(error))
            return ManifestResult(stale, "stale", max(0.0, age), 0.0, f"stale: {error}")
        return ManifestResult(held, state, 0.0, ttl)

    async def _refresh_once(
        self, repository: Repository, tag: Tag, tag_row: TagRow | None, deadline: float
    ) -> tuple[CachedManifest, CacheState]:
        work = partial(self._refresh, repository, tag, tag_row)
        return await self._run_once(repository, tag, work, deadline)

    async def _get_by_digest(
        self, repository: Repository, digest: Digest, deadline: float
    ) -> ManifestResult:
        row = self._index.blob(repository, digest)
        if row and row.media_type:
            if not row.is_linked:
                await self._verify_repository_access(repository, digest, deadline, is_manifest=True)
            if held := await self._manifest_store.load(digest):
                return ManifestResult(held, "hit")
        work = partial(self._fetch_and_store, repository, digest)
        held, state = await self._run_once(repository, digest, work, deadline)
        return ManifestResult(held, state)

    async def _select_platform_manifest(
        self,
        repository: Repository,
        result: ManifestResult,
        accept: tuple[str, ...],
        deadline: float,
    ) -> ManifestResult:
        """Return the default platform's manifest of an index to a client that takes no index."""
        held = result.manifest
        chosen = None
        if held.media_type in oci.INDEX_TYPES:
            index = await self._manifest_store.parse(held.content, held.media_type)
            chosen = index.select_platform("linux", "amd64")
        if chosen:
            single = await self._get_by_digest(repository, chosen, deadline)
            if self._accepts(accept, single.manifest.media_type):
                return msgspec.structs.replace(result, manifest=single.manifest)
        raise UnknownManifestError(
            f"the tag is a {held.media_type}, which the Accept header does not take"
        )

    async def _run_once(
        self,
        repository: Repository,
        reference: Reference,
        work: Callable[[], Awaitable[tuple[CachedManifest, CacheState]]],
        deadline: float,
    ) -> tuple[CachedManifest, CacheState]:
        """Do the work once for all who wait for it, none of them beyond `deadline`."""
        key = (repository, reference)
        is_joining = key in self._fetches
        async with enforce_deadline(deadline, repository.upstream):
            held, state = await self._fetches.run(key, work)
        return held, "collapsed" if is_joining and state == "miss" else state

    async def _refresh(
        self, repository: Repository, tag: Tag, tag_row: TagRow | None
    ) -> tuple[CachedManifest, CacheState]:
        """Ask upstream what the tag stands for; HEAD first if the answer may be at hand already."""
        upstream = self._upstreams[repository.upstream]
        try:
            if tag_row is None:
                held, state = await self._fetch_and_store(repository, tag)
            else:
                held, state = await self._revalidate(upstream, repository, tag, tag_row)
        except NotFoundError as error:
            self._negative_cache.set((repository, tag), error)
            if tag_row:
                await self._index.delete_tag(repository, tag)
            raise
        self._negative_cache.discard((repository, tag))
        await self._try_index_write(self._index.set_tag(repository, tag, held.digest))
        return held, state

    async def _revalidate(
        self, upstream: Upstream, repository: Repository, tag: Tag, tag_row: TagRow
    ) -> tuple[CachedManifest, CacheState]:
        """Return what a known tag stands for now: a HEAD, and a pull only if it has moved.

        Raises `RateLimitedError` rather than spend one of the last pulls where the old copy does.
        """
        key = (repository, tag)
        may_stay = upstream.scarce_quota_reason and await self._has_servable_copy(tag, tag_row)
        spared = self._quota_errors.get_with_age(key)
        if may_stay and spared and 0 <= spared[0] < self._tag_ttl(tag):
            raise copy(spared[1])
        digest = await upstream.resolve(repository.name, tag)
        if digest and (held := await self._load_and_link(repository, digest)):
            return held, "revalidated"
        if upstream.scarce_quota_reason and await self._has_servable_copy(tag, tag_row):
            error = RateLimitedError(f"{upstream.scarce_quota_reason}, kept for what is not cached")
            self._quota_errors.set(key, error)
            raise error
        if digest is None:
            return await self._fetch_and_store(repository, tag)
        try:
            return await self._fetch_and_store(repository, digest)
        except NotFoundError as error:
            # The tag is there, or HEAD would have said so: upstream contradicts itself.
            raise UpstreamError(f"{repository.upstream} names {digest} and has it not") from error

    async def _load_and_link(self, repository: Repository, digest: Digest) -> CachedManifest | None:
        """Return the manifest that upstream's HEAD has named for a tag, if it is here."""
        row = self._index.blob(repository, digest)
        held = await self._manifest_store.load(digest) if row and row.media_type else None
        if held and row and not row.is_linked:
            # The HEAD that named the digest has shown that the repository holds it.
            await self._try_index_write(self._index.link(repository, digest))
        return held

    async def _has_servable_copy(self, tag: Tag, tag_row: TagRow) -> bool:
        is_dead = self._tag_freshness(tag, tag_row) is Freshness.EXPIRED
        return not is_dead and await self._manifest_store.load(tag_row.digest) is not None

    def _tag_freshness(self, tag: Tag, tag_row: TagRow) -> Freshness:
        return freshness.compute_freshness(
            self._clock() - tag_row.checked_at,
            ttl=self._tag_ttl(tag),
            stale_while_revalidate=self._settings.stale_while_revalidate,
            stale_if_error=self._settings.stale_if_error,
        )

    async def _fetch_and_store(
        self, repository: Repository, reference: Reference
    ) -> tuple[CachedManifest, CacheState]:
        """Fetch a manifest and keep it."""
        upstream = self._upstreams[repository.upstream]
        fetched = await upstream.fetch_manifest(repository.name, reference)
        return await self._manifest_store.add(repository, fetched), "miss"

    def _check_negative_cache(self, repository: Repository, tag: Tag) -> None:
        remembered = self._negative_cache.get_with_age((repository, tag))
        if remembered and 0 <= remembered[0] < self._settings.negative_ttl:
            raise copy(remembered[1])

    async def _try_index_write(self, index_write: Awaitable[object]) -> None:
        """Write to the index. A disk that fails costs a question more later, not this answer."""
        try:
            await index_write
        except StorageError as error:
            log.warning("index_write_failed", reason=str(error))

    # Blobs.

    @asynccontextmanager
    async def open_blob(
        self, repository: Repository, digest: Digest, *, client: str = ""
    ) -> AsyncIterator[BlobResult]:
        """Open the blob, as far as it is here; what is missing comes while it is read.

        `client` is the address that asks. Raises `UnknownBlobError`, `UpstreamError`,
        `DigestMismatchError` and `TooManyRequestsError`.
        """
        deadline = self._now() + RESPONSE_TIMEOUT
        if opened := await self._open_stored(repository, digest, deadline):
            with opened:
                yield BlobResult(opened, "hit")
            return
        upstream = self._upstreams[repository.upstream]
        download = self._downloads.get(upstream.name, digest)
        state: CacheState = "collapsed"
        if download and download.repository != repository:
            # It is fetched from another repository: that says nothing of this one.
            if not self._index.is_linked(repository, digest):
                await self._verify_repository_access(
                    repository, digest, deadline, is_manifest=False
                )
            async with enforce_deadline(deadline, repository.upstream):
                download = await self._downloads.join(upstream.name, digest, client)
            if not download and (opened := await self._open_stored(repository, digest, deadline)):
                with opened:
                    yield BlobResult(opened, "hit")
                return
        if download is None:
            settings = self._fetch_settings
            download = self._downloads.start(upstream, repository, digest, settings, client=client)
            state = "miss"
        else:
            self._downloads.add_client(download, client)
        async with download.attach() as reader:
            yield BlobResult(reader, state)

    def lookup_cached_blob(self, repository: Repository, digest: Digest) -> OpenBlob | None:
        """Return a blob of the store, if nobody has to be asked whether the repository holds it."""
        row = self._index.blob(repository, digest)
        opened = self._store.open(digest, row.size) if row and row.is_linked else None
        if opened:
            self._index.touch(digest)
        return opened

    async def get_blob_size(
        self, repository: Repository, digest: Digest
    ) -> tuple[int | None, CacheState]:
        """Return the size of a blob without fetching it; None if nobody says.

        Raises `UnknownBlobError` and `UpstreamError`.
        """
        deadline = self._now() + RESPONSE_TIMEOUT
        if opened := await self._open_stored(repository, digest, deadline):
            with opened:
                return opened.size, "hit"
        size = self._index.declared_size(repository, digest)
        if size is not None and self._index.is_linked(repository, digest):
            return size, "miss"
        async with enforce_deadline(deadline, repository.upstream):
            upstream = self._upstreams[repository.upstream]
            return await upstream.fetch_blob_size(repository.name, digest), "miss"

    async def _open_stored(
        self, repository: Repository, digest: Digest, deadline: float
    ) -> OpenBlob | None:
        row = self._index.blob(repository, digest)
        if row is None:
            return None
        if not row.is_linked:
            await self._verify_repository_access(repository, digest, deadline, is_manifest=False)
        opened = await self._space.open_blob(digest, row.size)
        if opened:
            self._index.touch(digest)
        return opened

    # Links.

    async def _verify_repository_access(
        self, repository: Repository, digest: Digest, deadline: float, *, is_manifest: bool
    ) -> None:
        """Ask upstream whether the repository holds what is here already, by one HEAD.

        Raises `UnknownError` if it does not, `UpstreamError` if nobody can tell.
        """

        async def ask() -> None:
            upstream = self._upstreams[repository.upstream]
            if is_manifest:
                await upstream.resolve(repository.name, digest)
            elif not await upstream.has_blob(repository.name, digest):
                raise UnknownBlobError(f"{upstream.name} does not have it under {repository.name}")
            await self._try_index_write(self._index.link(repository, digest))

        async with enforce_deadline(deadline, repository.upstream):
            await self._access_checks.run((repository, digest), ask)
