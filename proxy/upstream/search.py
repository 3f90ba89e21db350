"""Parse responses of Docker Hub's search (registry API version 1). Pure.

Anyone can write what is displayed to users here, so every field is validated: names must be
pullable, text printable, numbers within range.
"""

import msgspec

from proxy.errors import InvalidNameError, UpstreamError
from proxy.oci.reference import parse_repository_name
from proxy.policy.facts import Badge

MAX_DESCRIPTION = 300
# Clients may use 32-bit integers.
MAX_COUNT = (1 << 31) - 1


class SearchHit(msgspec.Struct, frozen=True):
    """A repository that matches the search. Official ones are Docker's own (`library/`).

    `pulls` is 0 if upstream does not say.
    """

    name: str
    description: str = ""
    stars: int = 0
    is_official: bool = False
    badge: Badge = Badge.NOT_ASKED
    publisher: str = ""
    pulls: int = 0
    is_archived: bool = False


class SearchPage(msgspec.Struct, frozen=True):
    """One page of a search; `total` counts the results of all pages."""

    results: list[SearchHit]
    total: int


class _HubSearchResult(msgspec.Struct):
    name: str
    description: str | None = None
    star_count: int | None = None
    is_official: bool | None = None


class _HubSearchResponse(msgspec.Struct):
    results: list[_HubSearchResult] | None
    num_results: int | None = None


def parse_search_page(content: bytes) -> SearchPage:
    """Return the results, without those whose name cannot be pulled. Raises `UpstreamError`."""
    try:
        response = msgspec.json.decode(content, type=_HubSearchResponse)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UpstreamError("upstream sent an invalid search response") from error
    results = [
        _to_search_hit(result) for result in response.results or [] if is_valid_name(result.name)
    ]
    return SearchPage(results, clamp_count(response.num_results, len(results)))


def _to_search_hit(result: _HubSearchResult) -> SearchHit:
    return SearchHit(
        result.name,
        sanitize_text(result.description or ""),
        clamp_count(result.star_count, 0),
        bool(result.is_official),
        Badge.OFFICIAL if result.is_official else Badge.NOT_ASKED,
    )


def is_valid_name(text: str) -> bool:
    """Tell whether a repository of this name can be pulled."""
    try:
        parse_repository_name(text)
    except InvalidNameError:
        return False
    return True


def sanitize_text(text: str) -> str:
    """Return `text` on one line, truncated, and without control characters of terminals."""
    clean = "".join(char if char.isprintable() else " " for char in text[: 4 * MAX_DESCRIPTION])
    return " ".join(clean.split())[:MAX_DESCRIPTION]


def clamp_count(number: int | None, minimum: int) -> int:
    """Return the number, at least `minimum` and at most `MAX_COUNT`."""
    return min(max(number or 0, minimum), MAX_COUNT)
