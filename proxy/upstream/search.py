"""Answers of Docker Hub's search, version 1 of the registry's API. PURE.

What is shown to a user was written by strangers, so only what was checked is taken: names that can be
pulled, text that prints, numbers that fit.
"""

import msgspec

from proxy.errors import InvalidNameError, UpstreamError
from proxy.oci.reference import parse_repository_name

MAX_DESCRIPTION = 300
# Clients count in 32 bits at least.
MAX_COUNT = (1 << 31) - 1


class SearchHit(msgspec.Struct, frozen=True):
    """A repository that fits the words. An official one is Docker's own (`library/`)."""

    name: str
    description: str = ""
    stars: int = 0
    is_official: bool = False


class SearchPage(msgspec.Struct, frozen=True):
    """A part of what was found; `total` is how many there are on all pages."""

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
    """Return what was found, without what has no name to pull by; or raise `UpstreamError`."""
    try:
        answer = msgspec.json.decode(content, type=_HubSearchResponse)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UpstreamError("upstream sent something that is no result of a search") from error
    results = [
        _to_search_hit(result) for result in answer.results or [] if _is_valid_name(result.name)
    ]
    return SearchPage(results, _clamp_count(answer.num_results, len(results)))


def _to_search_hit(result: _HubSearchResult) -> SearchHit:
    return SearchHit(
        result.name,
        _sanitize_text(result.description or ""),
        _clamp_count(result.star_count, 0),
        bool(result.is_official),
    )


def _is_valid_name(text: str) -> bool:
    try:
        parse_repository_name(text)
    except InvalidNameError:
        return False
    return True


def _sanitize_text(text: str) -> str:
    """Return `text` on one line, cut, and without what a terminal would take for a command."""
    clean = "".join(one if one.isprintable() else " " for one in text[: 4 * MAX_DESCRIPTION])
    return " ".join(clean.split())[:MAX_DESCRIPTION]


def _clamp_count(number: int | None, minimum: int) -> int:
    return min(max(number or 0, minimum), MAX_COUNT)
