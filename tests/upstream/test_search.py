"""Search responses are validated field by field."""

import json
from contextlib import suppress

import pytest
from hypothesis import given, strategies as st

from proxy.errors import NotFoundError, UpstreamError, UpstreamUnauthorizedError
from proxy.oci.reference import parse_repository_name
from proxy.policy.facts import Badge
from proxy.upstream.responses import MAX_SEARCH_SIZE
from proxy.upstream.search import (
    MAX_COUNT,
    MAX_DESCRIPTION,
    SearchHit,
    SearchPage,
    parse_search_page,
)
from tests.fakes.faults import HTML, Fault
from tests.fakes.search import ListedRepository

NGINX = ListedRepository("nginx", "Official build of Nginx.", 21000, official=True)

RESULTS = st.fixed_dictionaries(
    {"name": st.text() | st.from_regex(r"[a-z]+(/[a-z]+)?", fullmatch=True)},
    optional={
        "description": st.none() | st.text(),
        "star_count": st.none() | st.integers(),
        "is_official": st.none() | st.booleans(),
    },
)


def search_response(*results: object, **fields: object) -> bytes:
    return json.dumps({"num_results": len(results), **fields, "results": results}).encode()


def test_a_result_has_name_description_stars_and_official_flag():
    result = {"name": "nginx", "description": "x", "star_count": 3, "is_official": True, "new": 1}
    assert parse_search_page(search_response(result)) == SearchPage(
        [SearchHit("nginx", "x", 3, is_official=True, badge=Badge.OFFICIAL)], 1
    )


def test_missing_and_null_fields_have_defaults():
    results = [{"name": "a"}, {"name": "b", "description": None, "star_count": None}]
    expected = SearchPage([SearchHit("a"), SearchHit("b")], 2)
    assert parse_search_page(search_response(*results)) == expected
    assert parse_search_page(search_response(*results, num_results=None)) == expected
    assert parse_search_page(b'{"results":null}') == SearchPage([], 0)


@pytest.mark.parametrize("name", ["", "A", "../x", "a b", "a\x1b[31m", "a" * 300, "x/", "\u202ea"])
def test_a_result_whose_name_cannot_be_pulled_is_dropped(name):
    assert parse_search_page(search_response({"name": name}, {"name": "me/app"})).results == [
        SearchHit("me/app")
    ]


def test_a_description_is_one_printable_line():
    text = "\x1b[31mred\x1b[0m\r\nsecond\u202e line\x00\u2028" + "x" * 1000
    (hit,) = parse_search_page(search_response({"name": "a", "description": text})).results
    assert hit.description.startswith("[31mred [0m second line xxx")
    assert hit.description.isprintable()
    assert len(hit.description) == MAX_DESCRIPTION


@pytest.mark.parametrize(("sent", "stars"), [(-5, 0), (10**12, MAX_COUNT), (7, 7)])
def test_numbers_are_clamped(sent, stars):
    page = parse_search_page(
        search_response({"name": "a", "star_count": sent}, num_results=sent * 10)
    )
    assert page.results[0].stars == stars
    assert 1 <= page.total <= MAX_COUNT


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"<html>",
        b'{"results":{}}',
        b'{"results":[{}]}',
        b'{"results":[{"name":1}]}',
        b'{"results":[{"name":"a","star_count":"many"}]}',
        b'{"results":[{"name":"\xff"}]}',
        b'{"results":' + b"[" * 100_000,
    ],
)
def test_an_invalid_response_is_an_upstream_error(content):
    with pytest.raises(UpstreamError):
        parse_search_page(content)


@given(st.lists(RESULTS), st.none() | st.integers())
def test_any_response_is_sanitized(results, total):
    page = parse_search_page(search_response(*results, num_results=total))
    for hit in page.results:
        assert parse_repository_name(hit.name) == hit.name
        assert hit.description.isprintable()
        assert 0 <= hit.stars <= MAX_COUNT
    assert len(page.results) <= page.total <= MAX_COUNT


@given(st.binary())
def test_any_bytes_are_a_result_or_an_upstream_error(content):
    with suppress(UpstreamError):
        parse_search_page(content)


async def test_search_terms_are_sent_unchanged(upstream, registry):
    registry.catalogue = [NGINX]
    page = await upstream.search("nginx", limit=5, page=2)
    assert page == SearchPage([], 1)
    terms = 'a b&n=9/é?#%00"'
    assert (await upstream.search(terms, limit=5, page=1)).results == []
    first, second = (seen.target for seen in registry.seen())
    assert first == "/v1/search?q=nginx&n=5&page=2"
    assert second == "/v1/search?q=a+b%26n%3D9%2F%C3%A9%3F%23%2500%22&n=5&page=1"


@pytest.mark.parametrize(
    "fault",
    [HTML, Fault(status=500), Fault(status=429), Fault(hang_up=True), Fault(cut_at=5)],
    ids=["html", "500", "429", "hang up", "cut"],
)
async def test_every_failure_is_an_upstream_error(upstream, registry, fault):
    registry.catalogue = [NGINX]
    registry.fail("/v1/search", fault, times=None)
    with pytest.raises(UpstreamError):
        await upstream.search("nginx", limit=25, page=1)


async def test_an_endless_response_is_read_only_up_to_the_limit(upstream, registry):
    registry.catalogue = [NGINX]
    body = search_response({"name": "a", "description": "x" * MAX_SEARCH_SIZE})
    registry.fail("/v1/search", Fault(body=body, send_length=False), times=None)
    with pytest.raises(UpstreamError, match="more than the allowed"):
        await upstream.search("nginx", limit=25, page=1)


async def test_a_registry_without_search_is_a_not_found_error(upstream, registry):
    with pytest.raises(NotFoundError):
        await upstream.search("nginx", limit=25, page=1)


async def test_a_challenged_search_gets_a_token_with_the_search_scope(upstream, registry):
    registry.catalogue = [NGINX]
    challenge = f'Bearer realm="{registry.url}/token",service="x"'
    refused = Fault(status=401, body=b"", headers={"WWW-Authenticate": challenge})
    registry.fail("/v1/search", refused, times=1)
    assert (await upstream.search("nginx", limit=25, page=1)).results[0].name == "nginx"
    (token,) = registry.seen("/token")
    assert "scope=registry:catalog:search" in token.target
    assert registry.seen("/v1/search")[1].headers["Authorization"].startswith("Bearer ")


async def test_a_denied_search_is_an_error(upstream, registry):
    registry.catalogue = [NGINX]
    registry.fail("/v1/search", Fault(status=401), times=None)
    with pytest.raises(UpstreamUnauthorizedError):
        await upstream.search("nginx", limit=25, page=1)
