"""`/api/v1/search`: search for repositories that can be pulled."""

from functools import partial
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from proxy.cache.search import DEFAULT_LIMIT, MAX_LIMIT, MAX_PAGE, RepositorySearch
from proxy.policy.facts import Badge
from proxy.server.admin.api import AdminRequest, RequestModel, Route
from proxy.upstream.search import SearchHit

# A sponsored project is vetted for being open source, not for who publishes it.
_BADGES_BY_TRUST = {
    "": (),
    "official": (Badge.OFFICIAL,),
    "trusted": (Badge.OFFICIAL, Badge.VERIFIED_PUBLISHER),
}


class SearchRequest(RequestModel, frozen=True):
    """The search terms, the page of the results, and which badges they must have."""

    text: str
    limit: Annotated[int, Meta(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT
    page: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 1
    trust: Literal["", "official", "trusted"] = ""


class SearchResponse(msgspec.Struct, frozen=True):
    """One page of results, from upstream or the store; `problem` is why upstream failed.

    `stored` counts the tags in the store by the name of the result.
    """

    upstream: str
    words: str
    source: str
    problem: str
    total: int
    results: list[SearchHit]
    stored: dict[str, int]


def routes(search: RepositorySearch) -> list[Route]:
    """Return the route."""
    return [Route("GET", "/api/v1/search", partial(_search, search))]


async def _search(search: RepositorySearch, request: AdminRequest) -> SearchResponse:
    parameters = request.parse_query(SearchRequest)
    query = search.parse_query(
        parameters.text,
        limit=parameters.limit,
        page=parameters.page,
        badges=_BADGES_BY_TRUST[parameters.trust],
    )
    result = await search.search(query)
    return SearchResponse(
        upstream=query.upstream,
        words=query.terms,
        source=result.source,
        problem=result.problem,
        total=result.page.total,
        results=result.page.results,
        stored=await search.count_stored(result.page),
    )
