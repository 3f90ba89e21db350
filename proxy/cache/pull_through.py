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

from proxy.cache import policy
from proxy.cache.manifests import Manifests
from proxy.cache.policy import Freshness
from proxy.concurrency import DEADLINE, MARGIN, SingleFlight, until
from proxy.config import ManifestsSettings
from proxy.download.download import Download
from proxy.download.manager import Downloads
from proxy.errors import (
    DigestMismatchError,
    OfflineError,
    RateLimitedError,
    StorageError,
    UnknownBlobError,
    UnknownError,
    UnknownManifestError,
    UpstreamError,
)
from proxy.log import get_logger
from proxy.lru import Expiring, Held
from proxy.metrics import CacheState, Metrics
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository, Tag
from proxy.storage.blobs import LocalStore, OpenBlob
from proxy.storage.index import Index, TagRow
from proxy.storage.space import Space
from proxy.upstream.client import Upstream

REMEMBERED_TAGS = 10_000

log = get_logger(__name__)


class ManifestAnswer(msgspec.Struct, frozen=True):
    """A manifest and how it was come by. `age` and `ttl` are seconds; `ttl` is None by digest."""

    held: Held
    state: CacheState
    age: float = 0.0
    ttl: float | None = None
    warning: str = ""


class BlobAnswer(msgspec.Struct, frozen=True):
    """Where the bytes of a blob come from."""

    source: OpenBlob | Download
    state: CacheState


class PullThrough:
    """Answers for all upstreams out of one store."""

    def __init__(
        self,
        *,
        upstreams: Mapping[str, Upstream],
        store: LocalStore,
        index: Index,
        space: Space,
        downloads: Downloads,
        settings: ManifestsSettings,
        metrics: Metrics,
        threads: Executor,
        group: asyncio.TaskGroup,
        clock: Callable[[], float],
    ) -> None:
        self._upstreams = upstreams
        self._store = store
        self._index = index
        self._space = space
        self._downloads = downloads
        self._settings = settings
        self._clock = clock
        self._now = asyncio.get_running_loop().time
        self._manifests = Manifests(store, index, space, metrics, threads)
        self._tag_ttl = lru_cache(maxsize=4096)(
            partial(policy.tag_ttl, rules=settings.tag_ttl, default=settings.ttl)
        )
        self._accepts = lru_cache(maxsize=256)(policy.accepts)
        self._unknown: Expiring[tuple[Repository, Tag], UnknownError]
        self._unknown = Expiring(REMEMBERED_TAGS, clock)
        self._spared: Expiring[tuple[Repository, Tag], RateLimitedError]
        self._spared = Expiring(REMEMBERED_TAGS, clock)
        self._fetches: SingleFlight[tuple[Repository, Reference], tuple[Held, CacheState]]
        self._fetches = SingleFlight(group)
        self._proofs: SingleFlight[tuple[Repository, Digest], None] = SingleFlight(group)

    # Manifests.

    async def manifest(
        self, repository: Repository, reference: Reference, accept: tuple[str, ...]
    ) -> ManifestAnswer:
        """Return the manifest that `reference` names now.

        By tag in a form that the client's `accept` lines take; by digest whatever they say.
        Raises `UnknownError`, `UpstreamError` and `DigestMismatchError`.
        """
        deadline = self._now() + DEADLINE
        if isinstance(reference, Digest):
            return await self._by_digest(repository, reference, deadline)
        answer = await self._by_tag(repository, reference, deadline - MARGIN)
        if self._accepts(accept, answer.held.media_type):
            return answer
        return await self._converted(repository, answer, accept, deadline)

    def at_hand(
        self, repository: Repository, reference: Reference, accept: tuple[str, ...]
    ) -> ManifestAnswer | None:
        """Return what `manifest` would, if all of it is in memory and nobody has to be asked."""
        if isinstance(reference, Digest):
            row = self._index.blob(repository, reference)
            if not (row and row.is_linked and row.media_type):
                return None
            held = self._manifests.at_hand(reference)
            return ManifestAnswer(held, "hit") if held else None
        known = self._index.tag(repository, reference)
        if known is None or self._freshness(reference, known) is not Freshness.FRESH:
            return None
        held = self._manifests.at_hand(known.digest)
        if held is None or not self._accepts(accept, held.media_type):
            return None
        age = self._clock() - known.checked
        return ManifestAnswer(held, "hit", age, self._tag_ttl(reference))

    async def current(self, repository: Repository, reference: Reference) -> Held:
        """Return what `reference` names upstream now: a tag is asked about however fresh it is.

        What is here is not fetched again. Raises as `manifest` does.
        """
        deadline = self._now() + DEADLINE
        if isinstance(reference, Digest):
            return (await self._by_digest(repository, reference, deadline)).held
        known = self._index.tag(repository, reference)
        held, _ = await self._refreshed(repository, reference, known, deadline)
        return held

    async def _by_tag(self, repository: Repository, tag: Tag, deadline: float) -> ManifestAnswer:
        known = self._index.tag(repository, tag)
        if known is None:
            self._check_unknown(repository, tag)
            held, state = await self._refreshed(repository, tag, None, deadline)
            return ManifestAnswer(held, state, 0.0, self._tag_ttl(tag))
        ttl, age = self._tag_ttl(tag), self._clock() - known.checked
        verdict = self._freshness(tag, known)
        if verdict in (Freshness.FRESH, Freshness.REVALIDATE) and (
            fresh := await self._manifests.held(known.digest)
        ):
            if verdict is Freshness.REVALIDATE:
                work = partial(self._refresh, repository, tag, known)
                self._fetches.begin((repository, tag), work)
            return ManifestAnswer(fresh, "hit", age, ttl)
        try:
            held, state = await self._refreshed(repository, tag, known, deadline)
        except (UpstreamError, DigestMismatchError) as error:
            # Offline, nobody could say anything newer: nothing is too old.
            is_dead = verdict is Freshness.DEAD and not isinstance(error, OfflineError)
            stale = None if is_dead else await self._manifests.held(known.digest)
            if stale is None:
                raise
            log.warning("serving_stale", repository=repository.name, tag=tag, reason=str(error))
            return ManifestAnswer(stale, "stale", max(0.0, age), 0.0, f"stale: {error}")
        return ManifestAnswer(held, state, 0.0, ttl)

    async def _refreshed(
        self, repository: Repository, tag: Tag, known: TagRow | None, deadline: float
    ) -> tuple[Held, CacheState]:
        work = partial(self._refresh, repository, tag, known)
        return await self._once(repository, tag, work, deadline)

    async def _by_digest(
        self, repository: Repository, digest: Digest, deadline: float
    ) -> ManifestAnswer:
        row = self._index.blob(repository, digest)
        if row and row.media_type:
            if not row.is_linked:
                await self._prove(repository, digest, deadline, is_manifest=True)
            if held := await self._manifests.held(digest):
                return ManifestAnswer(held, "hit")
        work = partial(self._fetch, repository, digest)
        held, state = await self._once(repository, digest, work, deadline)
        return ManifestAnswer(held, state)

    async def _converted(
        self,
        repository: Repository,
        answer: ManifestAnswer,
        accept: tuple[str, ...],
        deadline: float,
    ) -> ManifestAnswer:
        """Return the default platform's manifest of an index to a client that takes no index."""
        held = answer.held
        chosen = None
        if held.media_type in oci.INDEX_TYPES:
            index = await self._manifests.parsed(held.content, held.media_type)
            chosen = index.select("linux", "amd64")
        if chosen:
            single = await self._by_digest(repository, chosen, deadline)
            if self._accepts(accept, single.held.media_type):
                return msgspec.structs.replace(answer, held=single.held)
        raise UnknownManifestError(
            f"the tag is a {held.media_type}, which the Accept header does not take"
        )

    async def _once(
        self,
        repository: Repository,
        reference: Reference,
        work: Callable[[], Awaitable[tuple[Held, CacheState]]],
        deadline: float,
    ) -> tuple[Held, CacheState]:
        """Do the work once for all who wait for it, none of them beyond `deadline`."""
        key = (repository, reference)
        is_joining = key in self._fetches
        async with until(deadline, repository.upstream):
            held, state = await self._fetches.do(key, work)
        return held, "collapsed" if is_joining and state == "miss" else state

    async def _refresh(
        self, repository: Repository, tag: Tag, known: TagRow | None
    ) -> tuple[Held, CacheState]:
        """Ask upstream what the tag stands for; HEAD first if the answer may be at hand already."""
        upstream = self._upstreams[repository.upstream]
        try:
            if known is None:
                held, state = await self._fetch(repository, tag)
            else:
                held, state = await self._checked(upstream, repository, tag, known)
        except UnknownError as error:
            self._unknown.put((repository, tag), error)
            if known:
                await self._index.drop_tag(repository, tag)
            raise
        self._unknown.drop((repository, tag))
        await self._remember(self._index.set_tag(repository, tag, held.digest))
        return held, state

    async def _checked(
        self, upstream: Upstream, repository: Repository, tag: Tag, known: TagRow
    ) -> tuple[Held, CacheState]:
        """Return what a known tag stands for now: a HEAD, and a pull only if it has moved.

        Raises `RateLimitedError` rather than spend one of the last pulls where the old copy does.
        """
        key = (repository, tag)
        may_stay = upstream.scarcity and await self._is_servable(tag, known)
        spared = self._spared.get(key)
        if may_stay and spared and 0 <= spared[0] < self._tag_ttl(tag):
            raise copy(spared[1])
        digest = await upstream.resolve(repository.name, tag)
        if digest and (held := await self._at_hand(repository, digest)):
            return held, "revalidated"
        if upstream.scarcity and await self._is_servable(tag, known):
            error = RateLimitedError(f"{upstream.scarcity}, kept for what is not cached")
            self._spared.put(key, error)
            raise error
        if digest is None:
            return await self._fetch(repository, tag)
        try:
            return await self._fetch(repository, digest)
        except UnknownError as error:
            # The tag is there, or HEAD would have said so: upstream contradicts itself.
            raise UpstreamError(f"{repository.upstream} names {digest} and has it not") from error

    async def _at_hand(self, repository: Repository, digest: Digest) -> Held | None:
        """Return the manifest that upstream's HEAD has named for a tag, if it is here."""
        row = self._index.blob(repository, digest)
        held = await self._manifests.held(digest) if row and row.media_type else None
        if held and row and not row.is_linked:
            # The HEAD that named the digest has shown that the repository holds it.
            await self._remember(self._index.link(repository, digest))
        return held

    async def _is_servable(self, tag: Tag, known: TagRow) -> bool:
        is_dead = self._freshness(tag, known) is Freshness.DEAD
        return not is_dead and await self._manifests.held(known.digest) is not None

    def _freshness(self, tag: Tag, known: TagRow) -> Freshness:
        return policy.freshness(
            self._clock() - known.checked,
            ttl=self._tag_ttl(tag),
            revalidate=self._settings.stale_while_revalidate,
            stale=self._settings.stale_if_error,
        )

    async def _fetch(self, repository: Repository, reference: Reference) -> tuple[Held, CacheState]:
        """Fetch a manifest and keep it."""
        upstream = self._upstreams[repository.upstream]
        fetched = await upstream.fetch_manifest(repository.name, reference)
        return await self._manifests.keep(repository, fetched), "miss"

    def _check_unknown(self, repository: Repository, tag: Tag) -> None:
        remembered = self._unknown.get((repository, tag))
        if remembered and 0 <= remembered[0] < self._settings.negative_ttl:
            raise copy(remembered[1])

    async def _remember(self, writing: Awaitable[object]) -> None:
        """Write to the index. A disk that fails costs a question more later, not this answer."""
        try:
            await writing
        except StorageError as error:
            log.warning("not_remembered", reason=str(error))

    # Blobs.

    @asynccontextmanager
    async def blob(self, repository: Repository, digest: Digest) -> AsyncIterator[BlobAnswer]:
        """Open the blob, as far as it is here; what is missing comes while it is read.

        Raises `UnknownBlobError`, `UpstreamError` and `DigestMismatchError`.
        """
        deadline = self._now() + DEADLINE
        if opened := await self._open_stored(repository, digest, deadline):
            with opened:
                yield BlobAnswer(opened, "hit")
            return
        download = self._downloads.find(digest)
        state: CacheState = "collapsed"
        if download and download.repository != repository:
            # Somebody fetches it from elsewhere: that says nothing of this repository.
            if not self._index.is_linked(repository, digest):
                await self._prove(repository, digest, deadline, is_manifest=False)
            async with until(deadline, repository.upstream):
                download = await self._downloads.find_begun(digest)
            if not download and (opened := await self._open_stored(repository, digest, deadline)):
                with opened:
                    yield BlobAnswer(opened, "hit")
                return
        if download is None:
            download, state = self._downloads.start(repository, digest), "miss"
        download.acquire()
        try:
            yield BlobAnswer(download, state)
        finally:
            download.release()

    def blob_at_hand(self, repository: Repository, digest: Digest) -> OpenBlob | None:
        """Return a blob of the store, if nobody has to be asked whether the repository holds it."""
        row = self._index.blob(repository, digest)
        opened = self._store.open(digest, row.size) if row and row.is_linked else None
        if opened:
            self._index.touch(digest)
        return opened

    async def blob_size(
        self, repository: Repository, digest: Digest
    ) -> tuple[int | None, CacheState]:
        """Return the size of a blob without fetching it; None if nobody says.

        Raises `UnknownBlobError` and `UpstreamError`.
        """
        deadline = self._now() + DEADLINE
        if opened := await self._open_stored(repository, digest, deadline):
            with opened:
                return opened.size, "hit"
        size = self._index.child_size(repository, digest)
        if size is not None and self._index.is_linked(repository, digest):
            return size, "miss"
        async with until(deadline, repository.upstream):
            upstream = self._upstreams[repository.upstream]
            return await upstream.blob_size(repository.name, digest), "miss"

    async def _open_stored(
        self, repository: Repository, digest: Digest, deadline: float
    ) -> OpenBlob | None:
        row = self._index.blob(repository, digest)
        if row is None:
            return None
        if not row.is_linked:
            await self._prove(repository, digest, deadline, is_manifest=False)
        opened = await self._space.open_blob(digest, row.size)
        if opened:
            self._index.touch(digest)
        return opened

    # Links.

    async def _prove(
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
            await self._remember(self._index.link(repository, digest))

        async with until(deadline, repository.upstream):
            await self._proofs.do((repository, digest), ask)
