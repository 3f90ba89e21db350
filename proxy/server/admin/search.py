"""`/api/v1/search`: what could be pulled, by the words of its name and description."""

from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta

from proxy.cache.search import DEFAULT_LIMIT, MAX_LIMIT, MAX_PAGE, RepositorySearch
from proxy.server.admin.api import AdminRequest, RequestModel, Route
from proxy.upstream.search import SearchHit


class SearchRequest(RequestModel, frozen=True):
    """What is searched for, and which part of the results is wanted."""

    text: str
    limit: Annotated[int, Meta(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT
    page: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 1


class SearchResponse(msgspec.Struct, frozen=True):
    """What was found: a page of it, how much there is in all, and whose answer it is."""

    upstream: str
    words: str
    source: str
    problem: str
    total: int
    results: list[SearchHit]


def routes(search: RepositorySearch) -> list[Route]:
    """Return the route."""
    return [Route("GET", "/api/v1/search", partial(_search, search))]


async def _search(search: RepositorySearch, request: AdminRequest) -> SearchResponse:
    wanted = request.parse_query(SearchRequest)
    query = search.parse_query(wanted.text, limit=wanted.limit, page=wanted.page)
    answer = await search.search(query)
    return SearchResponse(
        upstream=query.upstream,
        words=query.terms,
        source=answer.source,
        problem=answer.problem,
        total=answer.page.total,
        results=answer.page.results,
    )
