"""Search: upstream's results, cached for some minutes; while upstream fails, stored images.

Each result can be pulled through this cache by its name; names that the configuration denies are
left out.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import msgspec

from proxy.cache.facts import FactsCache
from proxy.concurrency import RESPONSE_TIMEOUT, SingleFlight, enforce_deadline
from proxy.config import Config
from proxy.config.schema import DEFAULT_UPSTREAM
from proxy.errors import (
    InvalidReferenceError,
    NotFoundError,
    OfflineError,
    UpstreamError,
)
from proxy.log import get_logger
from proxy.lru import TTLCache
from proxy.metrics import CacheState
from proxy.names import OFFICIAL_PREFIX, NameParser, display_name, normalize_repository
from proxy.oci.reference import Repository, parse_image
from proxy.policy.facts import Badge
from proxy.storage.index import Index
from proxy.storage.list_queries import count_stored_tags, search_repositories
from proxy.upstream.client import Upstream
from proxy.upstream.search import SearchHit, SearchPage

# Seconds for which a page of results is fresh.
SEARCH_TTL = 300.0
# Cached pages, and their bytes.
MAX_CACHED_PAGES = 256
MAX_CACHED_PAGES_SIZE = 8 << 20

DEFAULT_LIMIT = 25
MAX_LIMIT = 100
MAX_PAGE = 100
MAX_TERMS_LENGTH = 255

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """One page of a search for `terms` at an upstream; made by `RepositorySearch.parse_query`."""

    upstream: str
    terms: str
    limit: int
    page: int
    badges: tuple[Badge, ...] = ()
    """Only repositories with one of these badges; empty for all."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Results, and whether upstream sent them or they were found in the store.

    `problem` says why upstream did not answer; it is empty otherwise.
    """

    page: SearchPage
    cache_state: CacheState
    source: Literal["upstream", "store"] = "upstream"
    problem: str = ""


class RepositorySearch:
    """Searches the upstreams and the store."""

    def __init__(
        self,
        *,
        config: Config,
        upstreams: Mapping[str, Upstream],
        index: Index,
        facts: FactsCache,
        group: asyncio.TaskGroup,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._names = NameParser(config.upstreams)
        self._upstreams = upstreams
        self._index = index
        self._facts = facts
        self._now = asyncio.get_running_loop().time
        # Encoded, because the objects take three times the memory.
        self._page_cache: TTLCache[SearchQuery, bytes] = TTLCache(
            MAX_CACHED_PAGES, clock, max_size=MAX_CACHED_PAGES_SIZE, size_of=len
        )
        self._fetches: SingleFlight[SearchQuery, SearchPage] = SingleFlight(group)

    def parse_query(
        self,
        text: str,
        *,
        upstream: str | None = None,
        limit: int = DEFAULT_LIMIT,
        page: int = 1,
        badges: tuple[Badge, ...] = (),
    ) -> SearchQuery:
        """Parse the text of a search; `limit` and `page` are clamped to their bounds.

        `ghcr.io/app` searches that upstream, if it is configured, for `app`; without a registry in
        `text`, `upstream` is searched, or Docker Hub. Raises `InvalidReferenceError`.
        """
        terms = " ".join(text.split())
        if len(terms) > MAX_TERMS_LENGTH or not terms.isprintable():
            raise InvalidReferenceError(
                f"search terms must be printable and at most {MAX_TERMS_LENGTH} characters long"
            )
        first, slash, rest = terms.partition("/")
        if slash and first in self._upstreams:
            upstream, terms = first, rest
        if upstream in (None, DEFAULT_UPSTREAM):
            # Docker Hub serves official images as library/<name>, but finds them by <name> only.
            upstream, terms = DEFAULT_UPSTREAM, terms.removeprefix(OFFICIAL_PREFIX)
        limit, page = min(max(limit, 1), MAX_LIMIT), min(max(page, 1), MAX_PAGE)
        return SearchQuery(upstream or DEFAULT_UPSTREAM, terms, limit, page, badges)

    async def search(self, query: SearchQuery) -> SearchResult:
        """Return upstream's results; stored images if it fails, has no search, or is offline.

        A query without terms lists the stored images. Raises `UpstreamError` if upstream fails and
        no stored image matches.
        """
        cached = self._page_cache.get_with_age(query)
        if cached and 0 <= cached[0] < SEARCH_TTL:
            return SearchResult(_decode_page(cached[1]), "hit")
        if not query.terms or not self._config.get_search_url(query.upstream):
            problem = "no search_url is set for it" if query.terms else ""
            return SearchResult(await self._search_stored(query), "hit", "store", problem)
        state: CacheState = "collapsed" if query in self._fetches else "miss"
        try:
            async with enforce_deadline(self._now() + RESPONSE_TIMEOUT, query.upstream):
                return SearchResult(
                    await self._fetches.run(query, partial(self._fetch_page, query)), state
                )
        except (UpstreamError, NotFoundError) as error:
            page = _decode_page(cached[1]) if cached else await self._search_stored(query)
            # An empty page is a right answer while offline or where upstream cannot search, but it
            # would hide a failure.
            may_be_empty = isinstance(error, OfflineError | NotFoundError)
            if not (cached or page.results or may_be_empty):
                raise
            log.warning("stale_served", search=query.terms, reason=str(error))
            problem = "this cache is offline" if isinstance(error, OfflineError) else str(error)
            return SearchResult(page, "stale", "upstream" if cached else "store", problem)

    async def count_stored(self, page: SearchPage) -> dict[str, int]:
        """Return how many tags of each repository of a page are in the store, by its name; none without any."""
        names = {
            self._names.to_repository(parse_image(hit.name))[0]: hit.name for hit in page.results
        }
        found = await self._index.read(partial(count_stored_tags, repositories=list(names)))
        return {names[repository]: count for repository, count in found.items()}

    async def _fetch_page(self, query: SearchQuery) -> SearchPage:
        answer = await self._ask_upstream(query)
        results = []
        # Some registries ignore `limit` and send everything.
        for hit in answer.results[: query.limit]:
            repository = normalize_repository(query.upstream, hit.name)
            if self._names.is_allowed(repository):
                known = self._add_known_facts(hit, repository)
                if not query.badges or known.badge in query.badges:
                    results.append(msgspec.structs.replace(known, name=display_name(repository)))
        page = SearchPage(results, answer.total)
        self._page_cache.set(query, msgspec.msgpack.encode(page))
        return page

    async def _ask_upstream(self, query: SearchQuery) -> SearchPage:
        """Ask Docker Hub's own search, which knows badges; while it fails, the registry's."""
        upstream = self._upstreams[query.upstream]
        if upstream.hub:
            try:
                return await upstream.hub.search(
                    query.terms, limit=query.limit, page=query.page, badges=query.badges
                )
            except OfflineError:
                raise
            except (UpstreamError, NotFoundError) as error:
                log.info("hub_search_failed", search=query.terms, reason=str(error))
        return await upstream.search(query.terms, limit=query.limit, page=query.page)

    def _add_known_facts(self, hit: SearchHit, repository: Repository) -> SearchHit:
        """Add what is known of the repository, if the search did not say it."""
        if hit.badge.is_fact:
            return hit
        facts = self._facts.get_known(repository)
        return msgspec.structs.replace(
            hit, badge=facts.badge, publisher=facts.publisher, is_archived=facts.is_archived
        )

    async def _search_stored(self, query: SearchQuery) -> SearchPage:
        """Return the stored repositories whose names contain all terms.

        A search of Docker Hub finds those of every upstream.
        """
        search = partial(
            search_repositories,
            terms=query.terms.casefold().split(),
            upstream=None if query.upstream == DEFAULT_UPSTREAM else query.upstream,
            offset=(query.page - 1) * query.limit,
            count=query.limit,
            is_allowed=self._names.is_allowed,
            unrestricted=self._names.unrestricted_upstreams,
            badges=[badge.value for badge in query.badges],
        )
        found, total = await self._index.read(search)
        hits = [self._add_known_facts(_stored_hit(one), one) for one in found]
        return SearchPage(hits, total)


def _decode_page(content: bytes) -> SearchPage:
    return msgspec.msgpack.decode(content, type=SearchPage)


def _stored_hit(repository: Repository) -> SearchHit:
    name = display_name(repository)
    # Only Docker Hub's official images have a name of one part.
    return SearchHit(name, "in this cache", is_official="/" not in name)
