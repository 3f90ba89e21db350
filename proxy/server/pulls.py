"""Pulls: the GET of an image's manifest, with what the same client asks for of it afterwards.

A pull is counted when it begins, and its result is corrected with each later request: a hit while
nothing of its content came from upstream, a miss while all of it did, else partial. Content that was
fetched after the pull began came from upstream, even if a prefetch had already stored it.

Repeated hits, as of a fleet or a benchmark, only count up an entry in memory; `settle` adds the
entries to the totals every few seconds.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from proxy.console import describe_target
from proxy.lru import TTLCache
from proxy.metrics import CacheState, Metrics
from proxy.names import full_name
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository, Tag
from proxy.oci.referrers import subject_of_tag
from proxy.server.activity.recent_pulls import PullRecord, RecentPulls
from proxy.server.registry.router import TargetResource
from proxy.server.request_context import RequestContext
from proxy.storage.index import Index
from proxy.traffic import TEST_PULL_AGENT, PullResult, TrafficCounts
from proxy.upstream.client import Upstream

# Seconds in which the requests of a client belong to its pull.
PULL_WINDOW = 600.0
# Clients and repositories with pulls that requests may still belong to, and the pulls of each.
MAX_OPEN_PULLS = 10_000
MAX_PULLS_PER_CLIENT = 8
# Digests that HEAD named for a tag, so that a GET of the digest counts as a pull of the tag.
MAX_NAMED_DIGESTS = 10_000
# Manifests whose last transfer from upstream is remembered.
MAX_FETCHED_MANIFESTS = 10_000
# Resources, by client, whose hits are counted together.
MAX_ENTRIES = 10_000
# Characters of a path that names no image of an upstream.
MAX_SHOWN_TARGET = 200
# The problem of a pull whose client disconnected before it had an answer.
GAVE_UP = "the client disconnected before it had an answer"

_UPSTREAM_STATES: tuple[CacheState, ...] = ("miss", "collapsed", "peer", "bypass")

_PARENT_SQL = "SELECT 1 FROM edges WHERE parent = ? AND child = ?"
_SUBJECT_SQL = "SELECT 1 FROM blobs WHERE digest = ? AND subject = ?"


@dataclass(eq=False, slots=True)
class _Pull:
    """A pull that later requests may belong to. `at` is Unix time, `began` by `time.perf_counter`."""

    day: str
    at: float
    began: float
    repository: Repository
    image: str
    client: str
    digest: Digest
    is_by_tag: bool
    record: PullRecord
    has_cached: bool = False
    has_upstream: bool = False
    failed: frozenset[Tag | Digest] = frozenset()

    @property
    def result(self) -> PullResult:
        if not self.has_upstream:
            return "hit"
        return "partial" if self.has_cached else "miss"


@dataclass(eq=False, slots=True)
class _Entry:
    """Hits for one resource by one client since the last `settle`, or a single other request."""

    day: str
    repository: Repository
    image: str
    client: str
    is_pull: bool
    is_limited: bool
    record: PullRecord | None
    requests: int = 1
    sent: int = 0


class PullTracker:
    """Recognises pulls among the requests of clients, and counts them.

    `download_age` returns the seconds since the last download of a blob began, None if it is
    forgotten. `upstreams` are those of the configuration that applies. `clock` returns Unix time.
    """

    def __init__(
        self,
        metrics: Metrics,
        index: Index,
        download_age: Callable[[str, Digest], float | None],
        clock: Callable[[], float],
    ) -> None:
        self.upstreams: Mapping[str, Upstream] = {}
        self.recent = RecentPulls(clock)
        self._metrics = metrics
        self._tally = metrics.traffic
        self._index = index
        self._download_age = download_age
        self._clock = clock
        self._gets: dict[tuple[str | None, TargetResource], _Entry] = {}
        self._heads: dict[tuple[str | None, TargetResource], _Entry] = {}
        self._open: OrderedDict[tuple[str, Repository], list[_Pull]] = OrderedDict()
        # The tag that a HEAD named a digest for, and when that request began.
        self._named: TTLCache[tuple[str, Repository, Digest], tuple[Tag, float]]
        self._named = TTLCache(MAX_NAMED_DIGESTS, clock)
        self._fetched: TTLCache[tuple[str, Digest], None]
        self._fetched = TTLCache(MAX_FETCHED_MANIFESTS, time.perf_counter)

    def record(self, context: RequestContext, target: TargetResource) -> None:
        """Record a request for a manifest or blob that was answered, unless `doctor` sent it."""
        request = context.request
        if request.headers.get("user-agent") == TEST_PULL_AGENT:
            return
        entries = self._gets if request.method == "GET" else self._heads
        entry = entries.get((request.client, target))
        if entry is not None and context.cache_state == "hit":
            entry.requests += 1
            entry.sent += context.bytes_sent
        elif target.kind in ("manifest", "blob"):
            entry = self._record_first(context, target)
            if context.cache_state != "hit":
                self._settle_entry(entry)
                return
            if len(entries) >= MAX_ENTRIES:
                self._settle_entries()
                entries = self._gets if request.method == "GET" else self._heads
            entries[request.client, target] = entry

    def record_failure(
        self, context: RequestContext, target: TargetResource | None, status: int
    ) -> None:
        """Record a request that was answered with an error, so that operators see why a pull failed."""
        request, reference = context.request, target.reference if target else None
        if request.headers.get("user-agent") == TEST_PULL_AGENT or _was_answered(context, status):
            return
        if target is None:
            # The login is wrong, the configuration does not allow the image, or its name is none. Clients ask
            # without a login first.
            is_question = status == 401 and "authorization" not in request.headers
            if "/manifests/" in request.path and not is_question:
                self._add_failure(context, describe_target(request.path)[:MAX_SHOWN_TARGET], status)
        elif target.kind not in ("manifest", "blob"):
            return
        elif isinstance(reference, Tag):
            # That an image has no signature is no failure.
            if not subject_of_tag(reference):
                self._add_failure(context, full_name(target.repository, reference), status)
        elif reference:
            self._record_failed_part(context, target, reference, status)

    def _record_failed_part(
        self, context: RequestContext, target: TargetResource, digest: Digest, status: int
    ) -> None:
        """Record that a manifest or blob, requested by digest, could not be served."""
        client, repository = context.request.client or "", target.repository
        if pull := self._find(client, repository, lambda _: True):
            pull.failed |= {digest}
            seconds = time.perf_counter() - pull.began
            self.recent.fail(pull.record, status, context.problem or GAVE_UP, seconds)
        elif named := self._named.get_with_age((client, repository, digest)):
            self._add_failure(context, full_name(repository, named[1][0]), status)
        elif target.kind == "manifest":
            self._add_failure(context, full_name(repository, digest), status)

    def _add_failure(self, context: RequestContext, image: str, status: int) -> None:
        seconds = time.perf_counter() - context.started_at
        self.recent.add_failure(context, image, status, seconds, context.problem or GAVE_UP)

    def settle(self) -> None:
        """Add the entries to the totals, and end the pulls that are too old."""
        self._settle_entries()
        now = self._clock()
        for key, pulls in list(self._open.items()):
            for pull in [pull for pull in pulls if not _is_open(pull, now)]:
                self._end(pull)
                pulls.remove(pull)
            if not pulls:
                del self._open[key]

    def _record_first(self, context: RequestContext, target: TargetResource) -> _Entry:
        """Record a request that may begin a pull, or that may be the first of its kind in one."""
        client, repository = context.request.client or "", target.repository
        is_get = context.request.method == "GET"
        if context.digest and context.cache_state in _UPSTREAM_STATES:
            self._fetched.set((repository.upstream, context.digest), None)
        pull, is_new = None, False
        if not is_get:
            self._note_name(context, target, client)
        elif target.kind == "manifest":
            pull, is_new = self._find_or_begin(context, target, client)
        else:
            pull = self._find_of_blob(client, repository, target)
        if pull:
            self._add_content(pull, context, target, is_new=is_new)
            if pull.failed and target.reference:
                pull.failed -= {target.reference}
                if not pull.failed:
                    self.recent.recover(pull.record)
            is_stale = context.cache_state == "stale" or pull.record.result == "stale"
            result = "stale" if is_stale else pull.result
            self.recent.update(pull.record, result, time.perf_counter() - pull.began)
        upstream = self.upstreams.get(repository.upstream)
        is_saved = context.cache_state in ("hit", "stale", "revalidated")
        return _Entry(
            pull.day if pull else self._tally.today(),
            repository,
            pull.image if pull else "",
            client,
            is_pull=is_new,
            is_limited=(
                is_saved
                and is_get
                and target.kind == "manifest"
                and upstream is not None
                and upstream.is_rate_limited(repository.name)
            ),
            record=pull.record if pull else None,
            sent=context.bytes_sent,
        )

    def _note_name(self, context: RequestContext, target: TargetResource, client: str) -> None:
        """Note which digest a HEAD has named for a tag."""
        if context.digest and isinstance(target.reference, Tag):
            key = (client, target.repository, context.digest)
            self._named.set(key, (target.reference, context.started_at))

    def _find_or_begin(
        self, context: RequestContext, target: TargetResource, client: str
    ) -> tuple[_Pull | None, bool]:
        """Return the pull that the GET of a manifest belongs to, and whether this request began it."""
        repository, reference, digest = target.repository, target.reference, context.digest
        if digest is None:
            return None, False
        if isinstance(reference, Tag):
            if subject := subject_of_tag(reference):
                return self._find(client, repository, lambda pull: pull.digest == subject), False
            pull = self._begin(context, repository, reference, client, digest, is_by_tag=True)
            return pull, True
        if found := self._find(client, repository, lambda pull: self._is_part(pull, digest)):
            return found, False
        key = (client, repository, digest)
        named = self._named.get_with_age(key)
        if named is None or named[0] >= PULL_WINDOW:
            return self._begin(context, repository, digest, client, digest, is_by_tag=False), True
        tag, began = named[1]
        pull = self._begin(context, repository, tag, client, digest, is_by_tag=False)
        pull.began = began
        self._named.set(key, (tag, time.perf_counter()))
        return pull, True

    def _begin(
        self,
        context: RequestContext,
        repository: Repository,
        reference: Tag | Digest,
        client: str,
        digest: Digest,
        *,
        is_by_tag: bool,
    ) -> _Pull:
        image = full_name(repository, reference)
        pull = _Pull(
            self._tally.today(),
            self._clock(),
            context.started_at,
            repository,
            image,
            client,
            digest,
            is_by_tag,
            self.recent.begin(context, image, str(digest)),
        )
        self._tally.note_pull(pull.image)
        key = (client, repository)
        pulls = self._open.setdefault(key, [])
        self._open.move_to_end(key)
        pulls.append(pull)
        if len(pulls) > MAX_PULLS_PER_CLIENT:
            self._end(pulls.pop(0))
        if len(self._open) > MAX_OPEN_PULLS:
            for ended in self._open.popitem(last=False)[1]:
                self._end(ended)
        return pull

    def _is_part(self, pull: _Pull, digest: Digest) -> bool:
        """Tell whether a manifest requested by digest belongs to a pull."""
        if pull.digest == digest:
            # Some clients request by digest what a tag has just named. By digest alone it is a new pull.
            is_first, pull.is_by_tag = pull.is_by_tag, False
            return is_first
        lookup = self._index.lookup
        return bool(
            lookup(_PARENT_SQL, bool, pull.digest, digest)
            or lookup(_SUBJECT_SQL, bool, digest, pull.digest)
        )

    def _find_of_blob(
        self, client: str, repository: Repository, target: TargetResource
    ) -> _Pull | None:
        pulls = self._open.get((client, repository), ())
        if len(pulls) <= 1 or not isinstance(target.reference, Digest):
            return self._find(client, repository, lambda _: True)
        parents = {*self._index.parents(repository, target.reference)}
        indexes = {one for parent in parents for one in self._index.parents(repository, parent)}
        found = self._find(client, repository, lambda pull: pull.digest in parents | indexes)
        return found or self._find(client, repository, lambda _: True)

    def _find(
        self, client: str, repository: Repository, matches: Callable[[_Pull], bool]
    ) -> _Pull | None:
        """Return the latest pull of the client that matches."""
        now = self._clock()
        pulls = reversed(self._open.get((client, repository), ()))
        return next((pull for pull in pulls if _is_open(pull, now) and matches(pull)), None)

    def _add_content(
        self, pull: _Pull, context: RequestContext, target: TargetResource, *, is_new: bool
    ) -> None:
        """Record where content of a pull came from, and correct its result."""
        before = pull.result
        if context.cache_state in _UPSTREAM_STATES or self._was_fetched_for(pull, context, target):
            pull.has_upstream = True
        else:
            pull.has_cached = True
        if is_new or pull.result != before:
            for counts in self._counts(pull):
                counts.count_pulls(pull.result, 1)
                if not is_new:
                    counts.count_pulls(before, -1)

    def _was_fetched_for(
        self, pull: _Pull, context: RequestContext, target: TargetResource
    ) -> bool:
        """Tell whether content that was a hit came from upstream after the pull began."""
        upstream = target.repository.upstream
        if target.kind == "manifest":
            fetched = context.digest and self._fetched.get_with_age((upstream, context.digest))
            age = fetched[0] if fetched else None
        else:
            digest = target.reference
            age = self._download_age(upstream, digest) if isinstance(digest, Digest) else None
        return age is not None and age <= time.perf_counter() - pull.began

    def _counts(self, of: _Pull | _Entry) -> Iterator[TrafficCounts]:
        """Yield the totals that a pull or a request counts for."""
        upstream, name = of.repository.upstream, of.repository.name
        yield self._tally.counts(of.day, "upstream", upstream)
        yield self._tally.counts(of.day, "repository", f"{upstream}/{name}")
        if of.image:
            yield self._tally.counts(of.day, "image", of.image)
        if of.client:
            yield self._tally.counts(of.day, "client", of.client)

    def _settle_entries(self) -> None:
        entries = [*self._gets.values(), *self._heads.values()]
        self._gets, self._heads = {}, {}
        for entry in entries:
            self._settle_entry(entry)

    def _settle_entry(self, entry: _Entry) -> None:
        repeated = entry.requests - 1 if entry.is_pull else 0
        for counts in self._counts(entry):
            counts.requests += entry.requests
            counts.sent += entry.sent
            counts.hits += repeated
            if entry.is_limited:
                counts.avoided += entry.requests
        if entry.record:
            self.recent.add_requests(entry.record, entry.requests, repeated, entry.sent)
        if repeated:
            self._tally.note_pull(entry.image)
            self._metrics.count_pulls(entry.repository.upstream, "hit", repeated)
        if entry.is_limited:
            self._metrics.count_avoided(entry.repository.upstream, entry.requests)

    def _end(self, pull: _Pull) -> None:
        self._metrics.count_pulls(pull.repository.upstream, pull.result, 1)


def _was_answered(context: RequestContext, status: int) -> bool:
    """Tell whether a client that disconnected had an answer before: it may not need the rest."""
    return status == 499 and context.cache_state != "none"


def _is_open(pull: _Pull, now: float) -> bool:
    """Tell whether requests may belong to a pull; none do after the clock was set back."""
    return 0 <= now - pull.at < PULL_WINDOW
