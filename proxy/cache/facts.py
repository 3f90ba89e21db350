"""Facts about repositories: asked of Docker Hub, kept in the index, and good while it is away.

Only public repositories are asked about, because a question tells Docker Hub the name. A repository
that was pulled is asked about once a day, in the background; one that a policy judges for the first
time, at once.
"""

import asyncio
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping
from functools import partial

from proxy.concurrency import SingleFlight
from proxy.errors import ProxyError, RateLimitedError, StorageError, UpstreamTimeoutError
from proxy.log import get_logger
from proxy.lru import TTLCache
from proxy.names import policy_name
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository, Tag
from proxy.policy.facts import DOCKER_HUB, Badge, RepositoryFacts, is_official
from proxy.storage.records.policies import PolicyRecords
from proxy.upstream.client import Upstream
from proxy.upstream.offline import OfflineSwitch

# Seconds after which a repository that is pulled is asked about again.
FACTS_TTL = 86_400.0
# Seconds for which an answer that is no fact is kept: not listed, no answer, not public.
RETRY_INTERVAL = 600.0
# Questions within a minute; Docker Hub allows an address 180. Half of them are for pulls that wait.
MAX_QUESTIONS_PER_MINUTE = 30
MAX_BACKGROUND_QUESTIONS_PER_MINUTE = MAX_QUESTIONS_PER_MINUTE // 2
# Repositories that wait to be asked about; further ones are asked about at their next pull.
MAX_WAITING = 1_000
# Answers that are no facts, and repositories known to be public, that are remembered.
MAX_REMEMBERED = 10_000
# Seconds that a pull waits for an answer.
QUESTION_TIMEOUT = 6.0

log = get_logger(__name__)


class FactsCache:
    """Knows the facts about repositories and when their tags were pushed."""

    def __init__(
        self,
        *,
        upstreams: Mapping[str, Upstream],
        records: PolicyRecords,
        offline: OfflineSwitch,
        group: asyncio.TaskGroup,
        clock: Callable[[], float],
    ) -> None:
        self._upstreams = upstreams
        self._records = records
        self._offline = offline
        self._group = group
        self._clock = clock
        self._now = asyncio.get_running_loop().time
        self._questions: SingleFlight[Repository, RepositoryFacts] = SingleFlight(group)
        self._no_facts: TTLCache[Repository, Badge] = TTLCache(MAX_REMEMBERED, clock)
        self._public: TTLCache[Repository, bool] = TTLCache(MAX_REMEMBERED, clock)
        self._waiting: dict[Repository, Digest] = {}
        self._worker: asyncio.Task[None] | None = None
        # When the questions of the last minute were asked, and when those that wait will be, in order.
        self._asked_at: list[float] = []
        self._push_times: TTLCache[tuple[Repository, Tag, Digest], float | None]
        self._push_times = TTLCache(MAX_REMEMBERED, clock)

    @property
    def is_offline(self) -> bool:
        """Whether nothing can be asked, because the cache is offline."""
        return bool(self._offline)

    def has_facts(self, repository: Repository) -> bool:
        """Tell whether facts about the repository can be had from Docker Hub."""
        return self._upstreams[repository.upstream].hub is not None

    def get_known(self, repository: Repository) -> RepositoryFacts:
        """Return what is known without asking; `official` is a fact of the name."""
        stored = self._records.facts(repository)
        if is_official(policy_name(repository)):
            return stored or RepositoryFacts(Badge.OFFICIAL, source="its name")
        if stored:
            return stored
        recent = self._no_facts.get_with_age(repository)
        return RepositoryFacts(recent[1] if recent else Badge.NOT_ASKED)

    async def get(self, repository: Repository, digest: Digest) -> RepositoryFacts:
        """Return the facts; ask for them if they are unknown or older than a day.

        `digest` is a manifest of the repository, by which the cache checks that it is public. If no newer
        facts can be had, the known ones are returned, however old they are.
        """
        known = self.get_known(repository)
        if not self._is_due(repository, known):
            return known
        try:
            async with asyncio.timeout(QUESTION_TIMEOUT):
                return await self._questions.run(repository, partial(self._ask, repository, digest))
        except (TimeoutError, ProxyError):
            return self.get_known(repository)

    def note_pull(self, repository: Repository, digest: Digest) -> None:
        """Ask about a repository that was pulled, in the background, if that is due."""
        if (
            repository not in self._waiting
            and len(self._waiting) < MAX_WAITING
            and self._is_due(repository, self.get_known(repository))
        ):
            self._waiting[repository] = digest
            if self._worker is None or self._worker.done():
                self._worker = self._group.create_task(self._ask_waiting())

    async def get_push_time(self, repository: Repository, tag: Tag, digest: Digest) -> float | None:
        """Return when Docker Hub says that this content of the tag was pushed, in Unix seconds.

        None if it says nothing about it, or cannot be asked about the repository. Raises
        `UpstreamError` if it could not be asked now.
        """
        key = (repository, tag, digest)
        known = self._push_times.get_with_age(key)
        if known and 0 <= known[0] < RETRY_INTERVAL:
            return known[1]
        hub = self._upstreams[repository.upstream].hub
        if hub is None or self._offline:
            return None
        pushed_at: float | None = None
        try:
            async with asyncio.timeout(QUESTION_TIMEOUT):
                if await self._is_public(repository, digest):
                    await self._wait_for_turn(MAX_QUESTIONS_PER_MINUTE)
                    pushed_at = (await hub.fetch_push_times(repository.name, tag)).get(digest)
        except TimeoutError as error:
            raise UpstreamTimeoutError(
                f"Docker Hub did not say within {QUESTION_TIMEOUT:g} s when the tag was pushed"
            ) from error
        self._push_times.set(key, pushed_at)
        return pushed_at

    def _is_due(self, repository: Repository, known: RepositoryFacts) -> bool:
        if not self.has_facts(repository) or self._offline:
            return False
        recent = self._no_facts.get_with_age(repository)
        if recent and 0 <= recent[0] < RETRY_INTERVAL:
            return False
        # What a bundle says is checked as soon as Docker Hub can be asked.
        is_own = known.source == DOCKER_HUB
        return not (is_own and 0 <= self._clock() - known.asked_at < FACTS_TTL)

    async def _ask_waiting(self) -> None:
        while self._waiting:
            repository, digest = next(iter(self._waiting.items()))
            try:
                limit = MAX_BACKGROUND_QUESTIONS_PER_MINUTE
                await self._questions.run(repository, partial(self._ask, repository, digest, limit))
            except ProxyError as error:
                log.info("facts_unavailable", repository=repository.name, reason=str(error))
            finally:
                del self._waiting[repository]

    async def _ask(
        self, repository: Repository, digest: Digest, limit: int = MAX_QUESTIONS_PER_MINUTE
    ) -> RepositoryFacts:
        """Ask Docker Hub, and keep its answer. Raises `NotFoundError` and `UpstreamError`.

        At most `limit` questions are asked within a minute.
        """
        hub = self._upstreams[repository.upstream].hub
        try:
            if not (hub and await self._is_public(repository, digest)):
                self._no_facts.set(repository, Badge.PRIVATE)
                return self.get_known(repository)
            await self._wait_for_turn(limit)
            hit = await hub.find_repository(repository.name)
        except ProxyError:
            self._no_facts.set(repository, Badge.NO_ANSWER)
            raise
        if hit is None or not hit.badge.is_fact:
            self._no_facts.set(repository, hit.badge if hit else Badge.NOT_LISTED)
            return self.get_known(repository)
        facts = RepositoryFacts(
            hit.badge,
            hit.publisher,
            hit.description,
            hit.stars,
            hit.pulls,
            hit.is_archived,
            asked_at=self._clock(),
        )
        self._no_facts.discard(repository)
        try:
            await self._records.set_facts([(repository, facts)])
        except StorageError as error:
            log.warning("index_write_failed", reason=str(error))
        return facts

    async def _is_public(self, repository: Repository, digest: Digest) -> bool:
        """Tell whether anyone may pull from the repository. Raises `UpstreamError`."""
        known = self._public.get_with_age(repository)
        if known and 0 <= known[0] < FACTS_TTL:
            return known[1]
        hub = self._upstreams[repository.upstream].hub
        is_public = hub is not None and await hub.is_public(repository.name, digest)
        self._public.set(repository, is_public)
        return is_public

    async def _wait_for_turn(self, limit: int) -> None:
        """Wait until less than `limit` questions were asked within a minute.

        Raises `RateLimitedError` if too many are waiting.
        """
        now, asked_at = self._now(), self._asked_at
        del asked_at[: bisect_left(asked_at, now - 60.0)]
        if len(asked_at) >= limit + MAX_WAITING:
            raise RateLimitedError("too many repositories wait to be asked about at Docker Hub")
        at = max(now, asked_at[-limit] + 60.0) if len(asked_at) >= limit else now
        insort(asked_at, at)
        try:
            await asyncio.sleep(at - now)
        except asyncio.CancelledError:
            asked_at.remove(at)
            raise
