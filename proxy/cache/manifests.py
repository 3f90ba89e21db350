"""Manifests by tag and by digest: fresh ones from the store, expired tags revalidated upstream.

When the TTL of a tag has expired, one HEAD request revalidates it for all waiting clients. If
upstream fails, a stale copy is served instead. `freshness.py` has the rules for fresh and stale.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from copy import copy
from functools import lru_cache, partial

import msgspec

from proxy.cache import freshness
from proxy.cache.access import RepositoryAccess
from proxy.cache.facts import FactsCache
from proxy.cache.fleet import FleetManifests
from proxy.cache.freshness import Freshness
from proxy.cache.manifest_store import ManifestStore
from proxy.cache.policy import PolicyGate
from proxy.concurrency import RESPONSE_TIMEOUT, SingleFlight, enforce_deadline
from proxy.config import ManifestsSettings
from proxy.errors import (
    UNREACHABLE_ERRORS,
    DigestMismatchError,
    NotFoundError,
    OfflineError,
    ProxyError,
    RateLimitedError,
    StorageError,
    UnknownManifestError,
    UnknownNameError,
    UpstreamError,
)
from proxy.fleet.directory import SharedTag
from proxy.log import get_logger
from proxy.lru import CachedManifest, TTLCache
from proxy.metrics import CacheState
from proxy.names import policy_name
from proxy.oci.accept import accepts
from proxy.oci.digest import Digest
from proxy.oci.manifest import INDEX_TYPES
from proxy.oci.reference import Reference, Repository, Tag
from proxy.oci.referrers import subject_of_tag
from proxy.repository_rules import NEVER, RepositoryRules
from proxy.storage.index import Index, TagRow
from proxy.upstream.client import FetchedManifest, Upstream

# Maximum of remembered missing tags and, separately, of tags that were not pulled to save quota.
MAX_CACHED_ERRORS = 10_000
# Indexes of which the manifest for clients that take no index is remembered.
MAX_SELECTED_PLATFORMS = 1000
# Longer values of `Accept` are parsed for each request, in characters.
MAX_REMEMBERED_ACCEPT = 2048
# Seconds before the deadline of the response at which the revalidation of a tag ends, so that the
# stale copy can still be served.
STALE_MARGIN = 1.0

log = get_logger(__name__)


class ManifestResult(msgspec.Struct, frozen=True):
    """A manifest and its cache status. `age` and `ttl` are in seconds; `ttl` is None by digest."""

    manifest: CachedManifest
    cache_state: CacheState
    age: float = 0.0
    ttl: float | None = None
    warning: str = ""


class ManifestCache:
    """Serves manifests of all upstreams, from the store where they are fresh."""

    def __init__(
        self,
        *,
        upstreams: Mapping[str, Upstream],
        store: ManifestStore,
        index: Index,
        access: RepositoryAccess,
        policy: PolicyGate | None,
        facts: FactsCache,
        settings: ManifestsSettings,
        rules: RepositoryRules,
        group: asyncio.TaskGroup,
        clock: Callable[[], float],
        fleet: FleetManifests | None = None,
    ) -> None:
        self._upstreams = upstreams
        self._store = store
        self._index = index
        self._access = access
        self._policy = policy
        self._facts = facts
        self._settings = settings
        self._clock = clock
        self._fleet = fleet
        self._now = asyncio.get_running_loop().time
        self._tag_ttl = lru_cache(maxsize=4096)(
            lambda repository, tag: rules.ttl(policy_name(repository), tag)
        )
        self._accepts_cached = lru_cache(maxsize=256)(accepts)
        # Copies of the errors, without the frames that raised them: those take 7 KB each.
        self._missing_tags: TTLCache[tuple[Repository, Tag], NotFoundError]
        self._missing_tags = TTLCache(MAX_CACHED_ERRORS, clock)
        self._quota_errors: TTLCache[tuple[Repository, Tag], RateLimitedError]
        self._quota_errors = TTLCache(MAX_CACHED_ERRORS, clock)
        self._selected_platforms: TTLCache[tuple[Digest, str], Digest | None]
        self._selected_platforms = TTLCache(MAX_SELECTED_PLATFORMS, clock)
        self._fetches: SingleFlight[tuple[Repository, Reference], tuple[CachedManifest, CacheState]]
        self._fetches = SingleFlight(group)

    def lookup_cached_manifest(
        self, repository: Repository, reference: Reference, accept: tuple[str, ...]
    ) -> ManifestResult | None:
        """Return what `get_manifest` would, if that needs no waiting; otherwise None.

        The manifest is then in memory, and upstream need not be asked.
        """
        result = self._lookup_fresh(repository, reference, accept)
        if result is None or self._policy is None:
            return result
        permission = self._policy.find_permission(repository, reference)
        if permission is None:
            return None
        permitted, served = permission.digest, result.manifest.digest
        if permitted is not served and permitted != served:
            return None
        if permission.warning:
            return msgspec.structs.replace(result, warning=permission.warning)
        return result

    def _lookup_fresh(
        self, repository: Repository, reference: Reference, accept: tuple[str, ...]
    ) -> ManifestResult | None:
        """Return a manifest that is in memory and fresh, whatever the policies say."""
        if isinstance(reference, Digest):
            row = self._access.get_linked(repository, reference)
            if row is None or row.media_type is None:
                return None
            manifest = self._store.lookup_cached(reference, row.media_type)
            return ManifestResult(manifest, "hit") if manifest else None
        tag_row = self._index.tag(repository, reference)
        if tag_row is None:
            return None
        age, ttl = self._clock() - tag_row.checked_at, self._tag_ttl(repository, reference)
        if not freshness.is_fresh(age, ttl):
            return None
        manifest = self._store.lookup_cached(tag_row.digest, tag_row.media_type)
        if manifest is None or not self._accepts(accept, manifest.media_type):
            return None
        return ManifestResult(manifest, "hit", age, ttl)

    def is_judged(self, repository: Repository, digest: Digest) -> bool:
        """Tell whether policies have to judge a digest that a client asks for as a blob."""
        if self._policy is None:
            return False
        row = self._index.blob(repository, digest)
        return row is not None and row.media_type is not None

    async def get_manifest(
        self, repository: Repository, reference: Reference, accept: tuple[str, ...]
    ) -> ManifestResult:
        """Return the manifest that `reference` names.

        By tag, the client's `Accept` lines must allow it; by digest, they are ignored. Raises
        `NotFoundError`, `UpstreamError` and `DigestMismatchError`.
        """
        deadline = self._now() + RESPONSE_TIMEOUT
        if isinstance(reference, Digest):
            result = await self._get_by_digest(repository, reference, deadline)
            self._facts.note_pull(repository, result.manifest.digest)
            return await self._apply_policy(repository, reference, result, deadline)
        if self._policy:
            ttl = self._tag_ttl(repository, reference)
            # A refusal may end, even of a tag that never moves.
            refusal_ttl = self._settings.ttl if ttl == NEVER else ttl
            self._policy.raise_if_refused(repository, reference, refusal_ttl)
        result = await self._get_by_tag(repository, reference, deadline - STALE_MARGIN)
        self._facts.note_pull(repository, result.manifest.digest)
        result = await self._apply_policy(repository, reference, result, deadline)
        if self._accepts(accept, result.manifest.media_type):
            return result
        return await self._select_platform_manifest(repository, result, accept, deadline)

    async def get_current_manifest(
        self, repository: Repository, reference: Reference, *, is_forced: bool = False
    ) -> CachedManifest:
        """Return the manifest that `reference` names upstream now; a fresh tag is revalidated too.

        Stored manifests are not fetched again. About a tag that a rule calls immutable upstream is asked
        only if `is_forced`. Raises as `get_manifest` does.
        """
        is_tag = not isinstance(reference, Digest)
        if is_tag and not is_forced and self._tag_ttl(repository, reference) == NEVER:
            return (await self.get_manifest(repository, reference, ())).manifest
        deadline = self._now() + RESPONSE_TIMEOUT
        if isinstance(reference, Digest):
            result = await self._get_by_digest(repository, reference, deadline)
        else:
            tag_row = self._index.tag(repository, reference)
            manifest, state = await self._refresh_once(
                repository, reference, tag_row, deadline, is_current=True
            )
            result = ManifestResult(manifest, state)
        return (await self._apply_policy(repository, reference, result, deadline)).manifest

    async def get_for_peer(
        self, repository: Repository, digest: Digest, *, is_proven: bool
    ) -> ManifestResult:
        """Return a manifest for another node of the fleet, without asking upstream for it.

        The rules are those of `BlobCache.open_for_peer`. Waits for a request to upstream that is running.
        Raises `UnknownManifestError`, and `UnknownNameError` if it is stored, but not for the repository.
        """
        await self._fetches.wait((repository, digest))
        row = self._index.blob(repository, digest)
        if row is None or row.media_type is None:
            raise UnknownManifestError("this node does not have it")
        if not (row.is_linked or (is_proven and self._index.has_sent(repository.upstream, digest))):
            raise UnknownNameError("this node does not have it for this repository")
        manifest = await self._store.load(digest, row.media_type)
        if manifest is None:
            raise UnknownManifestError("this node does not have it")
        return ManifestResult(manifest, "hit")

    def find_ripening(
        self, repository: Repository, reference: Reference
    ) -> tuple[Digest, str] | None:
        """Return what `PolicyGate.find_ripening` does."""
        return self._policy.find_ripening(repository, reference) if self._policy else None

    async def get_unjudged_manifest(
        self, repository: Repository, reference: Reference
    ) -> CachedManifest:
        """Return the manifest that `reference` names, without applying policies or moving the tag.

        Upstream is asked about a tag; while it fails, the newest content that the tag is known to
        have meant is returned. Raises as `get_manifest` does.
        """
        deadline = self._now() + RESPONSE_TIMEOUT
        if isinstance(reference, Digest):
            return (await self._get_by_digest(repository, reference, deadline)).manifest
        try:
            async with enforce_deadline(deadline, repository.upstream):
                manifest, _ = await self._fetch_and_store(repository, reference)
        except UpstreamError:
            meanings = self._policy.known_meanings(repository, reference) if self._policy else []
            tag_row = self._index.tag(repository, reference)
            known = meanings[0] if meanings else tag_row and tag_row.digest
            stored = await self._load_permitted(repository, known, deadline) if known else None
            if stored is None:
                raise
            return stored
        return manifest

    async def add_manifest(
        self, repository: Repository, tag: Tag, fetched: FetchedManifest
    ) -> CachedManifest:
        """Store a manifest that upstream has just sent, under its tag. Raises `UpstreamError`."""
        manifest, _ = await self._store_fetched(repository, fetched)
        self._missing_tags.discard((repository, tag))
        await self._write_tag(self._index.set_tag(repository, tag, manifest.digest))
        return manifest

    # Policies.

    async def _apply_policy(
        self,
        repository: Repository,
        reference: Reference,
        result: ManifestResult,
        deadline: float,
    ) -> ManifestResult:
        """Return what the policies let the reference mean, with their warning.

        Raises `PolicyDeniedError` and `PolicyUndecidedError`.
        """
        if self._policy is None:
            return result
        permission = await self._policy.admit(repository, reference, result.manifest)
        manifest, digest = result.manifest, permission.digest
        if digest != manifest.digest:
            try:
                manifest = (await self._get_by_digest(repository, digest, deadline)).manifest
            except NotFoundError:
                if permission.refusal:
                    raise copy(permission.refusal) from None
                raise
            if not isinstance(reference, Digest):
                await self._write_tag(self._index.move_tag(repository, reference, digest))
        warning = "; ".join(filter(None, (result.warning, permission.warning)))
        return msgspec.structs.replace(result, manifest=manifest, warning=warning)

    async def _write_tag(self, write: Awaitable[None]) -> None:
        """Write a tag. If that fails this answer is right all the same; the next request asks again."""
        try:
            await write
        except StorageError as error:
            log.warning("index_write_failed", reason=str(error))

    def _accepts(self, accept: tuple[str, ...], media_type: str) -> bool:
        if sum(map(len, accept)) > MAX_REMEMBERED_ACCEPT:
            return accepts(accept, media_type)
        return self._accepts_cached(accept, media_type)

    # By digest.

    async def _get_by_digest(
        self, repository: Repository, digest: Digest, deadline: float
    ) -> ManifestResult:
        if manifest := await self._load_permitted(repository, digest, deadline):
            return ManifestResult(manifest, "hit")
        fetch = partial(self._fetch_and_store, repository, digest)
        manifest, state = await self._run_once(repository, digest, fetch, deadline)
        return ManifestResult(manifest, state)

    async def _load_permitted(
        self, repository: Repository, digest: Digest, deadline: float
    ) -> CachedManifest | None:
        """Return a stored manifest that the repository may be served."""
        row = await self._access.get_manifest(repository, digest, deadline)
        return await self._store.load(digest, row.media_type) if row else None

    # By tag.

    async def _load_tagged(self, tag_row: TagRow) -> CachedManifest | None:
        """Return the stored manifest of a tag; its repository has sent it, or proved that it has it."""
        return await self._store.load(tag_row.digest, tag_row.media_type)

    async def _get_by_tag(
        self, repository: Repository, tag: Tag, deadline: float
    ) -> ManifestResult:
        ttl = self._tag_ttl(repository, tag)
        tag_row = self._index.tag(repository, tag)
        if tag_row is None:
            return await self._get_unknown_tag(repository, tag, ttl, deadline)
        age = self._clock() - tag_row.checked_at
        verdict = self._tag_freshness(repository, tag, tag_row)
        if verdict in (Freshness.FRESH, Freshness.STALE_WHILE_REVALIDATE) and (
            stored := await self._load_tagged(tag_row)
        ):
            if verdict is Freshness.STALE_WHILE_REVALIDATE:
                refresh = partial(self._refresh, repository, tag, tag_row)
                self._fetches.start((repository, tag), refresh)
            return ManifestResult(stored, "hit", age, ttl)
        try:
            manifest, state = await self._refresh_once(repository, tag, tag_row, deadline)
        except (UpstreamError, DigestMismatchError) as error:
            if stale := await self._serve_stale(repository, tag, error):
                return stale
            raise
        return ManifestResult(manifest, state, 0.0, ttl)

    async def _get_unknown_tag(
        self, repository: Repository, tag: Tag, ttl: float, deadline: float
    ) -> ManifestResult:
        self._raise_if_known_missing(repository, tag)
        try:
            manifest, state = await self._refresh_once(repository, tag, None, deadline)
        except (UpstreamError, DigestMismatchError) as error:
            # Another node of the fleet may have known the tag.
            if stale := await self._serve_stale(repository, tag, error):
                return stale
            if isinstance(error, UNREACHABLE_ERRORS):
                self._raise_if_without_referrers(repository, tag, error)
            raise
        return ManifestResult(manifest, state, 0.0, ttl)

    async def _serve_stale(
        self, repository: Repository, tag: Tag, error: ProxyError
    ) -> ManifestResult | None:
        """Return what a tag named before upstream failed; None if there is nothing, or it is too old."""
        tag_row = self._index.tag(repository, tag)
        if tag_row is None:
            return None
        # While the cache is offline no newer answer can exist, so no copy is too old.
        is_expired = self._tag_freshness(repository, tag, tag_row) is Freshness.EXPIRED
        if is_expired and not isinstance(error, OfflineError):
            return None
        stale = await self._load_tagged(tag_row)
        if stale is None:
            return None
        log.warning("stale_served", repository=repository.name, tag=tag, reason=str(error))
        age = max(0.0, self._clock() - tag_row.checked_at)
        return ManifestResult(stale, "stale", age, 0.0, f"stale: {error}")

    def _tag_freshness(self, repository: Repository, tag: Tag, tag_row: TagRow) -> Freshness:
        return freshness.compute_freshness(
            self._clock() - tag_row.checked_at,
            ttl=self._tag_ttl(repository, tag),
            stale_while_revalidate=self._settings.stale_while_revalidate,
            stale_if_error=self._settings.stale_if_error,
        )

    def _raise_if_known_missing(self, repository: Repository, tag: Tag) -> None:
        """Raise the error that upstream gave for the tag, for `negative_ttl` seconds after it."""
        missing = self._missing_tags.get_with_age((repository, tag))
        if missing and 0 <= missing[0] < self._settings.negative_ttl:
            raise copy(missing[1])

    def _raise_if_without_referrers(
        self, repository: Repository, tag: Tag, error: UpstreamError
    ) -> None:
        """Raise `NotFoundError` for a tag of referrers that upstream did not have when last asked.

        Clients ask for such tags to see whether there is any, so 404 is an answer and 503 is not.
        """
        subject = subject_of_tag(tag)
        if subject is None:
            return
        if record := self._index.referrer_record(repository, subject):
            if tag not in record.tags:
                raise UnknownManifestError(f"upstream did not have it when asked: {error}")
        elif missing := self._missing_tags.get_with_age((repository, tag)):
            raise copy(missing[1])

    async def _refresh_once(
        self,
        repository: Repository,
        tag: Tag,
        tag_row: TagRow | None,
        deadline: float,
        *,
        is_current: bool = False,
    ) -> tuple[CachedManifest, CacheState]:
        refresh = partial(self._refresh, repository, tag, tag_row, is_current=is_current)
        return await self._run_once(repository, tag, refresh, deadline)

    async def _refresh(
        self,
        repository: Repository,
        tag: Tag,
        tag_row: TagRow | None,
        *,
        is_current: bool = False,
    ) -> tuple[CachedManifest, CacheState]:
        """Ask upstream which digest the tag names, and remember the answer.

        In a fleet, another node may just have asked; with `is_current` this one asks all the same.
        """
        shared = None if is_current else await self._get_shared_tag(repository, tag)
        if shared and shared.is_fresh and (adopted := await self._adopt(repository, tag, shared)):
            return adopted
        try:
            manifest, state = await self._ask_upstream(repository, tag, tag_row)
        except ProxyError as error:
            await self._share_failure(repository, tag, error)
            if shared and not isinstance(error, NotFoundError):
                await self._adopt_stale(repository, tag, tag_row, shared)
            raise
        if self._fleet:
            ttl, keep = self._tag_ttl(repository, tag), self._settings.stale_if_error
            await self._fleet.set_tag(repository, tag, manifest.digest, ttl=ttl, keep=keep)
        await self._remember_tag(repository, tag, manifest)
        return manifest, state

    async def _adopt_stale(
        self, repository: Repository, tag: Tag, tag_row: TagRow | None, shared: SharedTag
    ) -> None:
        """Remember what another node has heard of a tag, if that is newer than what this one has."""
        is_newer = tag_row is None or shared.age < self._clock() - tag_row.checked_at
        if is_newer and shared.digest:
            await self._adopt(repository, tag, shared)

    async def _ask_upstream(
        self, repository: Repository, tag: Tag, tag_row: TagRow | None
    ) -> tuple[CachedManifest, CacheState]:
        try:
            if tag_row is None:
                return await self._fetch_and_store(repository, tag)
            return await self._revalidate(repository, tag, tag_row)
        except NotFoundError as error:
            self._missing_tags.set((repository, tag), copy(error))
            if tag_row:
                await self._write_tag(self._index.delete_tag(repository, tag))
            raise

    async def _get_shared_tag(self, repository: Repository, tag: Tag) -> SharedTag | None:
        return await self._fleet.get_tag(repository, tag) if self._fleet else None

    async def _share_failure(self, repository: Repository, tag: Tag, error: ProxyError) -> None:
        """Tell the fleet that upstream does not have a tag, or that this node got no answer."""
        if self._fleet is None:
            return
        if isinstance(error, NotFoundError):
            ttl = self._settings.negative_ttl
            await self._fleet.set_tag(repository, tag, None, ttl=ttl, keep=0)
        else:
            await self._fleet.release_tag(repository, tag)

    async def _remember_tag(
        self, repository: Repository, tag: Tag, manifest: CachedManifest, age: float = 0.0
    ) -> None:
        """Remember what upstream has said of a tag, `age` seconds ago."""
        self._missing_tags.discard((repository, tag))
        served = manifest.digest
        if self._policy:
            permission = await self._policy.admit(repository, tag, manifest, is_current=True)
            served = permission.digest
        await self._write_tag(
            self._index.set_tag(repository, tag, served, stated=manifest.digest, age=age)
        )

    async def _adopt(
        self, repository: Repository, tag: Tag, shared: SharedTag
    ) -> tuple[CachedManifest, CacheState] | None:
        """Return the manifest that a tag names according to another node, and remember that.

        None if the content cannot be had now. Raises `UnknownManifestError` if upstream does not have the tag.
        """
        if shared.digest is None:
            await self._write_tag(self._index.delete_tag(repository, tag))
            raise UnknownManifestError("upstream does not have it, as it told another node")
        deadline = self._now() + RESPONSE_TIMEOUT
        try:
            manifest = await self._load_permitted(repository, shared.digest, deadline)
            state: CacheState = "revalidated"
            if manifest is None:
                manifest, state = await self._fetch_and_store(repository, shared.digest)
        except ProxyError as error:
            log.info("shared_tag_unusable", repository=repository.name, tag=tag, reason=str(error))
            return None
        await self._remember_tag(repository, tag, manifest, shared.age)
        return manifest, state

    async def _revalidate(
        self, repository: Repository, tag: Tag, tag_row: TagRow
    ) -> tuple[CachedManifest, CacheState]:
        """Return what a cached tag names now: by HEAD, and by GET only if the tag has moved.

        Raises `RateLimitedError` if the GET would spend one of the last pulls of upstream's quota
        although a stale copy can be served.
        """
        key = (repository, tag)
        upstream = self._upstreams[repository.upstream]
        if upstream.scarce_quota_reason and await self._has_servable_copy(repository, tag, tag_row):
            refused = self._quota_errors.get_with_age(key)
            if refused and 0 <= refused[0] < self._tag_ttl(repository, tag):
                raise copy(refused[1])
        resolved = await upstream.resolve(repository.name, tag)
        digest = resolved.digest
        # A mirror may have named the digest, so this alone links nothing.
        deadline = self._now() + RESPONSE_TIMEOUT
        if digest and (stored := await self._load_permitted(repository, digest, deadline)):
            return stored, "revalidated"
        if resolved.manifest:
            return await self._store_fetched(repository, resolved.manifest)
        if upstream.scarce_quota_reason and await self._has_servable_copy(repository, tag, tag_row):
            error = RateLimitedError(
                f"{upstream.scarce_quota_reason}, reserved for content that is not cached"
            )
            self._quota_errors.set(key, copy(error))
            raise error
        if digest is None:
            return await self._fetch_and_store(repository, tag)
        try:
            return await self._fetch_and_store(repository, digest)
        except NotFoundError:
            # Upstream contradicts its HEAD, so the tag itself decides.
            fetched = await self._fetch_and_store(repository, tag)
            upstream.record_unreliable_head(repository.name)
            return fetched

    async def _has_servable_copy(self, repository: Repository, tag: Tag, tag_row: TagRow) -> bool:
        is_too_old = self._tag_freshness(repository, tag, tag_row) is Freshness.EXPIRED
        return not is_too_old and await self._load_tagged(tag_row) is not None

    async def _select_platform_manifest(
        self,
        repository: Repository,
        result: ManifestResult,
        accept: tuple[str, ...],
        deadline: float,
    ) -> ManifestResult:
        """Return the linux/amd64 manifest of an index to a client that does not accept indexes.

        Docker Hub does the same. Raises `UnknownManifestError` if the client accepts neither.
        """
        top = result.manifest
        if top.media_type in INDEX_TYPES and (
            digest := await self._select_platform(repository, top)
        ):
            manifest = (await self._get_by_digest(repository, digest, deadline)).manifest
            if self._accepts(accept, manifest.media_type):
                return msgspec.structs.replace(result, manifest=manifest)
        raise UnknownManifestError(
            f"the tag is a {top.media_type}, which the Accept header does not allow"
        )

    async def _select_platform(
        self, repository: Repository, index: CachedManifest
    ) -> Digest | None:
        """Return the linux/amd64 manifest of an index; parsing a large one again takes long."""
        key = (index.digest, index.media_type)
        if known := self._selected_platforms.get_with_age(key):
            return known[1]
        parsed = await self._store.parse(repository, index.content, index.media_type)
        digest = parsed.select_platform("linux", "amd64")
        self._selected_platforms.set(key, digest)
        return digest

    # Upstream.

    async def _run_once(
        self,
        repository: Repository,
        reference: Reference,
        work: Callable[[], Awaitable[tuple[CachedManifest, CacheState]]],
        deadline: float,
    ) -> tuple[CachedManifest, CacheState]:
        """Run the work once for all requests that need it; each waits until its own `deadline`."""
        key = (repository, reference)
        is_joining = key in self._fetches
        async with enforce_deadline(deadline, repository.upstream):
            manifest, state = await self._fetches.run(key, work)
        return manifest, "collapsed" if is_joining and state == "miss" else state

    async def _fetch_and_store(
        self, repository: Repository, reference: Reference
    ) -> tuple[CachedManifest, CacheState]:
        upstream = self._upstreams[repository.upstream]
        fetch = partial(upstream.fetch_manifest, repository.name, reference)
        if self._fleet and isinstance(reference, Digest):
            commit = partial(self._commit, repository)
            return await self._fleet.fetch(repository, reference, fetch, commit)
        return await self._store_fetched(repository, await fetch())

    async def _store_fetched(
        self, repository: Repository, fetched: FetchedManifest
    ) -> tuple[CachedManifest, CacheState]:
        """Store a manifest that upstream has sent; the fleet learns at once that this node has it."""
        if self._fleet:
            return await self._fleet.store(repository, fetched, partial(self._commit, repository))
        return await self._commit(repository, fetched)

    async def _commit(
        self, repository: Repository, fetched: FetchedManifest
    ) -> tuple[CachedManifest, CacheState]:
        manifest, is_stored = await self._store.add(repository, fetched)
        return manifest, "miss" if is_stored else "bypass"
