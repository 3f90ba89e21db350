"""Docker Hub's API is read field by field: drift never becomes a fact."""

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from proxy.errors import UpstreamError
from proxy.oci.digest import Digest
from proxy.policy.facts import Badge
from proxy.upstream.hub.answers import find_repository, parse_push_times, parse_search
from proxy.upstream.search import MAX_COUNT, MAX_DESCRIPTION, SearchHit

# The shape that clients of /api/search/v4 read.
GRAFANA: dict[str, Any] = {
    "id": "grafana/grafana",
    "name": "grafana/grafana",
    "slug": "grafana/grafana",
    "type": "image",
    "publisher": {"id": "grafana", "name": "Grafana Labs"},
    "created_at": "2016-04-13T10:00:00Z",
    "updated_at": "2026-11-20T10:00:00Z",
    "short_description": "The official Grafana docker container",
    "badge": "verified_publisher",
    "star_count": 3421,
    "pull_count": "1B+",
    "raw_pull_count": 1234567890,
    "operating_systems": [{"name": "linux", "label": "Linux"}],
    "architectures": [{"name": "amd64", "label": "x86-64"}],
    "logo_url": {"large": None, "small": None},
    "extension_reviewed": False,
    "categories": [{"slug": "monitoring", "name": "Monitoring"}],
    "archived": False,
    "media_types": ["application/vnd.docker.container.image.v1+json"],
}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def parse_one(**changes: Any) -> SearchHit:
    document = {"total": 1, "results": [{**GRAFANA, **changes}]}
    (hit,) = parse_search(json.dumps(document).encode()).results
    return hit


def test_a_result_has_badge_publisher_stars_and_pulls():
    assert parse_one() == SearchHit(
        "grafana/grafana",
        "The official Grafana docker container",
        3421,
        is_official=False,
        badge=Badge.VERIFIED_PUBLISHER,
        publisher="Grafana Labs",
        pulls=1234567890,
    )


@pytest.mark.parametrize("name", ["nginx", "library/nginx"])
def test_an_official_image_is_known_with_and_without_its_namespace(name: str):
    hit = parse_one(name=name, badge="official")
    assert (hit.name, hit.is_official, hit.badge) == ("nginx", True, Badge.OFFICIAL)


@pytest.mark.parametrize(
    ("badge", "expected"),
    [
        ("open_source", Badge.SPONSORED),
        ("none", Badge.COMMUNITY),
        ("", Badge.COMMUNITY),
        (None, Badge.COMMUNITY),
        ("brand_new", Badge.NO_ANSWER),
        (7, Badge.NO_ANSWER),
        ({"name": "official"}, Badge.NO_ANSWER),
    ],
)
def test_a_badge_counts_only_if_it_is_known(badge: Any, expected: Badge):
    assert parse_one(badge=badge).badge is expected


def test_a_result_without_the_field_badge_is_not_called_community():
    document = {"results": [{"name": "acme/x"}]}
    (hit,) = parse_search(json.dumps(document).encode()).results
    assert hit.badge is Badge.NO_ANSWER


@pytest.mark.parametrize(
    ("raw", "text", "pulls"),
    [
        (None, "1B+", 10**9),
        (None, "1.5K", 1000),
        ("12", None, 12),
        (None, "many", 0),
        (True, None, 0),
        (-5, None, 0),
        (1e300, None, 0),
    ],
)
def test_pulls_are_a_number_or_text(raw: Any, text: Any, pulls: int):
    assert parse_one(raw_pull_count=raw, pull_count=text).pulls == pulls


@pytest.mark.parametrize(
    "changes", [{"type": "extension"}, {"badge": "dhi"}, {"name": "../x"}, {"name": 3, "id": None}]
)
def test_what_cannot_be_pulled_is_left_out(changes: dict[str, Any]):
    document = {"results": [{**GRAFANA, **changes}, "text", None]}
    assert parse_search(json.dumps(document).encode()).results == []


def test_texts_are_one_printable_line_of_bounded_length():
    hit = parse_one(
        short_description="\x1b[31mred\n" + "x" * 1000, publisher={"name": "A\x07\u202eB"}
    )
    assert hit.description.isprintable()
    assert len(hit.description) == MAX_DESCRIPTION
    assert hit.publisher == "A B"


def test_only_the_exact_repository_is_found():
    page = parse_search(json.dumps({"results": [GRAFANA]}).encode())
    assert find_repository(page, "grafana/grafana")
    assert find_repository(page, "grafana/graf") is None
    nginx = parse_search(json.dumps({"results": [{**GRAFANA, "name": "nginx"}]}).encode())
    assert find_repository(nginx, "library/nginx")


@pytest.mark.parametrize(
    "content",
    [b"", b"<!DOCTYPE html><title>Just a moment...</title>", b"[]", b"{}", b'{"results":null}'],
)
def test_a_page_that_is_not_a_search_is_an_error(content: bytes):
    with pytest.raises(UpstreamError):
        parse_search(content)


@given(document=ANY_JSON, badge=ANY_JSON, stars=ANY_JSON, publisher=ANY_JSON, total=ANY_JSON)
def test_any_json_is_read_or_refused(
    document: Any, badge: Any, stars: Any, publisher: Any, total: Any
):
    result = {"name": "acme/x", "badge": badge, "star_count": stars, "publisher": publisher}
    for content in (document, {"results": document}, {"results": [result], "total": total}):
        try:
            page = parse_search(json.dumps(content).encode())
        except UpstreamError:
            continue
        assert 0 <= page.total <= MAX_COUNT
        assert all(0 <= hit.stars <= MAX_COUNT for hit in page.results)


D1, D2 = (Digest.from_content(one) for one in (b"1", b"2"))
TAG = {
    "name": "12",
    "digest": str(D1),
    "tag_last_pushed": "2026-11-28T10:00:00.123456Z",
    "images": [
        {"architecture": "amd64", "digest": str(D2), "last_pushed": "2026-11-28T09:00:00Z"},
        {"architecture": "unknown", "os": "unknown", "digest": None, "last_pushed": None},
    ],
}
TEN = 1_795_860_000.0


def test_push_times_are_those_of_the_tag_and_its_platforms():
    assert parse_push_times(json.dumps(TAG).encode()) == {D1: TEN, D2: TEN - 3600}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-28T12:00:00+02:00", {D1: TEN}),
        ("2026-11-28T08:30:00-01:30", {D1: TEN}),
        ("0001-01-01T00:00:00Z", {}),
        ("2026-13-01T00:00:00Z", {}),
        ("yesterday", {}),
        (1795860000, {}),
        (None, {}),
    ],
)
def test_a_time_counts_only_if_it_is_rfc_3339(text: Any, expected: dict[Digest, float]):
    document = {"digest": str(D1), "tag_last_pushed": text, "images": None}
    assert parse_push_times(json.dumps(document).encode()) == expected


@given(document=ANY_JSON, digest=ANY_JSON, time=ANY_JSON, images=ANY_JSON)
def test_any_json_about_a_tag_is_read_or_refused(
    document: Any, digest: Any, time: Any, images: Any
):
    tag = {"digest": digest, "tag_last_pushed": time, "images": images}
    for content in (document, tag):
        try:
            parse_push_times(json.dumps(content).encode())
        except UpstreamError:
            continue
