"""Search: what upstream finds, kept for minutes; while it fails, what is cached.

What is searched for here is what can be pulled from here: names are given as a client would pull
them, and those that the configuration denies are left out.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import msgspec

from proxy.concurrency import RESPONSE_TIMEOUT, SingleFlight, enforce_deadline
from proxy.config import Config
from proxy.config.schema import DEFAULT_UPSTREAM
from proxy.errors import (
    DeniedError,
    InvalidReferenceError,
    NotFoundError,
    OfflineError,
    UpstreamError,
)
from proxy.log import get_logger
from proxy.lru import TTLCache
from proxy.metrics import CacheState
from proxy.names import check_allowed
from proxy.oci.reference import Repository
from proxy.storage.index import Index
from proxy.upstream.client import Upstream
from proxy.upstream.search import SearchHit, SearchPage

# How long an answer is given again, in seconds. Stars can wait.
SEARCH_TTL = 300.0
# Answers that are remembered; a hundred results each, so 256 of them are 25 MB at worst.
MAX_CACHED_PAGES = 256

DEFAULT_LIMIT = 25
MAX_LIMIT = 100
MAX_PAGE = 100
MAX_TERMS_LENGTH = 255

OFFICIAL_PREFIX = "library/"

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """One page of what fits `words` at `upstream`; made by `Search.query`."""

    upstream: str
    terms: str
    limit: int
    page: int


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What was found, and where that came from: upstream's answer, or the names of what is stored.

    `problem` says why upstream gave no answer to words that were for it; else it is empty.
    """

    page: SearchPage
    cache_state: CacheState
    source: Literal["upstream", "store"] = "upstream"
    problem: str = ""


class RepositorySearch:
    """Searches all upstreams."""

    def __init__(
        self,
        *,
        config: Config,
        upstreams: Mapping[str, Upstream],
        index: Index,
        group: asyncio.TaskGroup,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._upstreams = upstreams
        self._index = index
        self._now = asyncio.get_running_loop().time
        self._page_cache: TTLCache[SearchQuery, SearchPage] = TTLCache(MAX_CACHED_PAGES, clock)
        self._fetches: SingleFlight[SearchQuery, SearchPage] = SingleFlight(group)

    def parse_query(
        self, text: str, *, upstream: str | None = None, limit: int = DEFAULT_LIMIT, page: int = 1
    ) -> SearchQuery:
        """Return what a user means by `text`, with its numbers brought into their bounds.

        `ghcr.io/app` is `app` at that upstream, if there is one; without a registry the words are
        for `upstream`, or Docker Hub. Raises `InvalidReferenceError`.
        """
        words = " ".join(text.split())
        if len(words) > MAX_TERMS_LENGTH or not words.isprintable():
            raise InvalidReferenceError(
                f"words to search for are printable, and at most {MAX_TERMS_LENGTH} characters"
            )
        first, slash, rest = words.partition("/")
        if slash and first in self._upstreams:
            upstream, words = first, rest
        if upstream in (None, DEFAULT_UPSTREAM):
            # Docker Hub knows official images by two parts, and finds them by one.
            upstream, words = DEFAULT_UPSTREAM, words.removeprefix(OFFICIAL_PREFIX)
        limit, page = min(max(limit, 1), MAX_LIMIT), min(max(page, 1), MAX_PAGE)
        return SearchQuery(upstream or DEFAULT_UPSTREAM, words, limit, page)

    async def search(self, query: SearchQuery) -> SearchResult:
        """Return what upstream finds; what is cached, if it fails, has no search, or may not be asked.

        Without words: what is cached. Raises `UpstreamError` if upstream fails and nothing fits.
        """
        kept = self._page_cache.get_with_age(query)
        if kept and 0 <= kept[0] < SEARCH_TTL:
            return SearchResult(kept[1], "hit")
        if not query.terms or not self._config.get_search_url(query.upstream):
            problem = "no search_url is set for it" if query.terms else ""
            return SearchResult(self._search_stored(query), "hit", "store", problem)
        state: CacheState = "collapsed" if query in self._fetches else "miss"
        try:
            async with enforce_deadline(self._now() + RESPONSE_TIMEOUT, query.upstream):
                return SearchResult(
                    await self._fetches.run(query, partial(self._fetch_page, query)), state
                )
        except (UpstreamError, NotFoundError) as error:
            page = kept[1] if kept else self._search_stored(query)
            # "Nothing" is the truth where upstream has nothing to say. Where it fails, it is not.
            is_final = isinstance(error, OfflineError | NotFoundError)
            if not (kept or page.results or is_final):
                raise
            log.warning("stale_served", search=query.terms, reason=str(error))
            problem = "this cache is offline" if isinstance(error, OfflineError) else str(error)
            return SearchResult(page, "stale", "upstream" if kept else "store", problem)

    async def _fetch_page(self, query: SearchQuery) -> SearchPage:
        upstream = self._upstreams[query.upstream]
        found = await upstream.search(query.terms, limit=query.limit, page=query.page)
        # Some registries send all that they have, whatever they are asked for.
        results = [
            msgspec.structs.replace(one, name=_pull_name(Repository(query.upstream, one.name)))
            for one in found.results[: query.limit]
            if self._is_allowed(Repository(query.upstream, one.name))
        ]
        page = SearchPage(results, found.total)
        self._page_cache.set(query, page)
        return page

    def _search_stored(self, query: SearchQuery) -> SearchPage:
        """Return the cached repositories whose names hold all the words; of any upstream for Docker Hub's."""
        words = query.terms.casefold().split()
        found = sorted(
            (
                _stored_hit(repository)
                for repository in self._index.repositories()
                if query.upstream in (DEFAULT_UPSTREAM, repository.upstream)
                and all(word in _pull_name(repository) for word in words)
                and self._is_allowed(repository)
            ),
            key=lambda one: (not one.is_official, one.name),
        )
        start = (query.page - 1) * query.limit
        return SearchPage(found[start : start + query.limit], len(found))

    def _is_allowed(self, repository: Repository) -> bool:
        rules = self._config.upstreams.get(repository.upstream)
        if rules is None:
            # It was pulled when the configuration still had its upstream.
            return False
        name = repository.name
        if repository.upstream == DEFAULT_UPSTREAM and "/" not in name:
            name = f"{OFFICIAL_PREFIX}{name}"
        try:
            check_allowed(name, allow=rules.allow, deny=rules.deny)
        except DeniedError:
            return False
        return True


def _pull_name(repository: Repository) -> str:
    """Return the shortest name by which the repository is pulled from here."""
    if repository.upstream == DEFAULT_UPSTREAM:
        return repository.name.removeprefix(OFFICIAL_PREFIX)
    return f"{repository.upstream}/{repository.name}"


def _stored_hit(repository: Repository) -> SearchHit:
    is_official = repository.upstream == DEFAULT_UPSTREAM and repository.name.startswith(
        OFFICIAL_PREFIX
    )
    return SearchHit(_pull_name(repository), "in this cache", is_official=is_official)
