"""Manifests and blobs: from the store, from a running download, or from upstream.

The order of the questions is the design: may this repository be asked for, is it known to hold the
digest, is the digest here, does somebody fetch it already, and only then upstream.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from copy import copy
from functools import lru_cache, partial

import msgspec

from proxy.cache import policy
from proxy.cache.download import Download
from proxy.cache.downloads import Downloads
from proxy.cache.eviction import Space
from proxy.cache.memory import Expiring, Held, ManifestMemory
from proxy.cache.policy import Freshness
from proxy.config import ManifestsSettings
from proxy.errors import (
    DigestMismatchError,
    InvalidManifestError,
    NoSpaceError,
    StorageError,
    UnknownBlobError,
    UnknownError,
    UnknownManifestError,
    UpstreamError,
    UpstreamTimeoutError,
)
from proxy.flight import SingleFlight, in_thread
from proxy.log import get_logger
from proxy.metrics import CacheState, Metrics
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Tag
from proxy.storage.index import Index, TagRow
from proxy.storage.local import LocalStore, OpenBlob
from proxy.storage.tables import Repository
from proxy.upstream.client import Fetched, Upstream

# Clients give up on a mirror that is silent for 30 s (containerd 2.3, Docker 29).
DEADLINE = 25.0

HOT_MANIFESTS = 32 << 20
NEGATIVE_ENTRIES = 10_000

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
        self._metrics = metrics
        self._threads = threads
        self._clock = clock
        self._memory = ManifestMemory(HOT_MANIFESTS)
        self._tag_ttl = lru_cache(maxsize=4096)(
            partial(policy.tag_ttl, rules=settings.tag_ttl, default=settings.ttl)
        )
        self._unknown: Expiring[tuple[Repository, Tag], UnknownError] = Expiring(
            NEGATIVE_ENTRIES, clock
        )
        self._fetches: SingleFlight[tuple[Repository, Reference], tuple[Held, CacheState]]
        self._fetches = SingleFlight(group)
        self._proofs: SingleFlight[tuple[Repository, Digest], None] = SingleFlight(group)

    # Manifests.

    async def manifest(
        self, repository: Repository, reference: Reference, accept: Iterable[str]
    ) -> ManifestAnswer:
        """Return the manifest that `reference` names now.

        By tag in a form that the client's `accept` lines take; by digest whatever they say.
        Raises `UnknownError`, `UpstreamError` and `DigestMismatchError`.
        """
        if isinstance(reference, Digest):
            return await self._by_digest(repository, reference)
        answer = await self._by_tag(repository, reference)
        if policy.accepts(accept, answer.held.media_type):
            return answer
        return await self._converted(repository, answer, accept)

    async def _by_tag(self, repository: Repository, tag: Tag) -> ManifestAnswer:
        known = self._index.tag(repository, tag)
        if known is None:
            self._check_unknown(repository, tag)
            held, state = await self._refreshed(repository, tag, None)
            return ManifestAnswer(held, state, 0.0, self._tag_ttl(tag))
        ttl, age = self._tag_ttl(tag), self._clock() - known.checked
        verdict = policy.freshness(
            age,
            ttl=ttl,
            revalidate=self._settings.stale_while_revalidate,
            stale=self._settings.stale_if_error,
        )
        if verdict in (Freshness.FRESH, Freshness.REVALIDATE) and (
            fresh := await self._held(known.digest)
        ):
            if verdict is Freshness.REVALIDATE:
                work = partial(self._refresh, repository, tag, known)
                self._fetches.begin((repository, tag), work)
            return ManifestAnswer(fresh, "hit", age, ttl)
        try:
            held, state = await self._refreshed(repository, tag, known)
        except (UpstreamError, DigestMismatchError) as error:
            stale = None if verdict is Freshness.DEAD else await self._held(known.digest)
            if stale is None:
                raise
            log.warning("serving_stale", repository=repository.name, tag=tag, reason=str(error))
            return ManifestAnswer(stale, "stale", max(0.0, age), 0.0, f"stale: {error}")
        return ManifestAnswer(held, state, 0.0, ttl)

    async def _refreshed(
        self, repository: Repository, tag: Tag, known: TagRow | None
    ) -> tuple[Held, CacheState]:
        return await self._once(repository, tag, partial(self._refresh, repository, tag, known))

    async def _by_digest(self, repository: Repository, digest: Digest) -> ManifestAnswer:
        row = self._index.blob(repository, digest)
        if row and row.media_type:
            if not row.is_linked:
                await self._prove(repository, digest, is_manifest=True)
            if held := await self._held(digest):
                return ManifestAnswer(held, "hit")
        held, state = await self._once(repository, digest, partial(self._fetch, repository, digest))
        return ManifestAnswer(held, state)

    async def _converted(
        self, repository: Repository, answer: ManifestAnswer, accept: Iterable[str]
    ) -> ManifestAnswer:
        """Return the default platform's manifest of an index to a client that takes no index."""
        held = answer.held
        chosen = None
        if held.media_type in oci.INDEX_TYPES:
            chosen = oci.parse(held.content, held.media_type).select("linux", "amd64")
        if chosen:
            single = await self._by_digest(repository, chosen)
            if policy.accepts(accept, single.held.media_type):
                return msgspec.structs.replace(answer, held=single.held)
        raise UnknownManifestError(
            f"the tag is a {held.media_type}, which the Accept header does not take"
        )

    async def _once(
        self,
        repository: Repository,
        reference: Reference,
        work: Callable[[], Awaitable[tuple[Held, CacheState]]],
    ) -> tuple[Held, CacheState]:
        """Do the work once for all who wait for it, none of them longer than `DEADLINE`."""
        key = (repository, reference)
        is_joining = key in self._fetches
        try:
            async with asyncio.timeout(DEADLINE):
                held, state = await self._fetches.do(key, work)
        except TimeoutError:
            raise UpstreamTimeoutError(
                f"{repository.upstream} has not answered for {DEADLINE:.0f} s; try again"
            ) from None
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
                digest = await upstream.resolve(repository.name, tag)
                held, state = await self._at_hand_or_fetched(repository, tag, digest)
        except UnknownError as error:
            self._unknown.put((repository, tag), error)
            if known:
                await self._index.drop_tag(repository, tag)
            raise
        self._unknown.drop((repository, tag))
        await self._remember(self._index.set_tag(repository, tag, held.digest))
        return held, state

    async def _at_hand_or_fetched(
        self, repository: Repository, tag: Tag, digest: Digest | None
    ) -> tuple[Held, CacheState]:
        """Return what upstream's HEAD has named for the tag, None if it named nothing."""
        if digest is None:
            return await self._fetch(repository, tag)
        row = self._index.blob(repository, digest)
        if row and row.media_type and (held := await self._held(digest)):
            # The HEAD that named the digest has shown that the repository holds it.
            if not row.is_linked:
                await self._remember(self._index.link(repository, digest))
            return held, "revalidated"
        try:
            return await self._fetch(repository, digest)
        except UnknownError as error:
            # The tag is there, or HEAD would have said so: upstream contradicts itself.
            raise UpstreamError(f"{repository.upstream} names {digest} and has it not") from error

    async def _fetch(self, repository: Repository, reference: Reference) -> tuple[Held, CacheState]:
        """Fetch a manifest, look at it, keep it."""
        upstream = self._upstreams[repository.upstream]
        fetched = await upstream.fetch_manifest(repository.name, reference)
        try:
            manifest = oci.parse(fetched.content, fetched.content_type)
        except InvalidManifestError as error:
            raise UpstreamError(f"{upstream.name} did not send a manifest: {error}") from error
        held = Held(fetched.digest, manifest.media_type, fetched.content)
        self._memory.put(held)
        await self._keep(repository, fetched, manifest)
        return held, "miss"

    async def _keep(self, repository: Repository, fetched: Fetched, manifest: oci.Manifest) -> None:
        """Commit a manifest. Where that fails it is served all the same."""
        size = len(fetched.content)
        reservation = await self._space.reserve(size)
        if reservation is None:
            self._metrics.uncached("no_space")
            return
        try:
            await in_thread(self._threads, self._store.put, fetched.digest, fetched.content)
            is_new = await self._index.add_manifest(repository, fetched.digest, size, manifest)
        except StorageError as error:
            self._space.release(reservation)
            self._metrics.uncached("no_space" if isinstance(error, NoSpaceError) else "disk_error")
            log.warning("not_stored", digest=str(fetched.digest), reason=str(error))
        else:
            self._space.commit(reservation, size, is_new=is_new)

    async def _held(self, digest: Digest) -> Held | None:
        """Return a manifest of the store, verified; None if it is gone or damaged."""
        held = self._memory.get(digest)
        if held is None:
            row = self._index.manifest(digest)
            if row is None:
                return None
            content = await self._store.read(digest)
            if content is None:
                await self._space.forget(digest, row.size)
                return None
            held = Held(digest, row.media_type or "", content)
            self._memory.put(held)
        self._index.touch(digest)
        return held

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
        if opened := await self._open_stored(repository, digest):
            with opened:
                yield BlobAnswer(opened, "hit")
            return
        download = self._downloads.find(digest)
        state: CacheState = "collapsed"
        if download and download.repository != repository:
            # Somebody fetches it from elsewhere: that says nothing of this repository.
            if not self._index.is_linked(repository, digest):
                await self._prove(repository, digest, is_manifest=False)
            download = self._downloads.find(digest)
        if download is None:
            download, state = self._downloads.start(repository, digest), "miss"
        download.acquire()
        try:
            yield BlobAnswer(download, state)
        finally:
            download.release()

    async def blob_size(
        self, repository: Repository, digest: Digest
    ) -> tuple[int | None, CacheState]:
        """Return the size of a blob without fetching it; None if nobody says.

        Raises `UnknownBlobError` and `UpstreamError`.
        """
        if opened := await self._open_stored(repository, digest):
            with opened:
                return opened.size, "hit"
        size = self._index.child_size(repository, digest)
        if size is not None and self._index.is_linked(repository, digest):
            return size, "miss"
        size = await self._upstreams[repository.upstream].blob_size(repository.name, digest)
        return size, "miss"

    async def _open_stored(self, repository: Repository, digest: Digest) -> OpenBlob | None:
        row = self._index.blob(repository, digest)
        if row is None:
            return None
        if not row.is_linked:
            await self._prove(repository, digest, is_manifest=False)
        opened = self._store.open(digest, row.size)
        if opened:
            self._index.touch(digest)
        else:
            log.warning(
                "blob_lost", digest=str(digest), reason="its file is gone or of another size"
            )
            await self._space.forget(digest, row.size)
        return opened

    # Links.

    async def _prove(self, repository: Repository, digest: Digest, *, is_manifest: bool) -> None:
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

        await self._proofs.do((repository, digest), ask)
