"""What may be asked, how long an answer is fresh, what a client takes."""

import pytest
from hypothesis import given, strategies as st

from proxy.cache.freshness import Freshness, accepts, compute_freshness, tag_ttl
from proxy.errors import DeniedError
from proxy.names import check_allowed
from proxy.oci.manifest import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST


@pytest.mark.parametrize(
    ("name", "allow", "deny", "allowed"),
    [
        ("library/nginx", ["*"], [], True),
        ("a/b/c", ["*"], [], True),
        ("library/nginx", ["library/*"], [], True),
        ("me/nginx", ["library/*"], [], False),
        ("me/nginx", ["library/*", "me/*"], [], True),
        ("library/nginx", ["*"], ["library/*"], False),
        ("library/nginx", ["*"], ["*/nginx"], False),
        ("library/nginx", [], [], False),
        ("library/nginx", ["Library/*"], [], False),
    ],
)
def test_a_repository_is_allowed_by_a_glob_and_denied_by_another(name, allow, deny, allowed):
    if allowed:
        check_allowed(name, allow=allow, deny=deny)
    else:
        with pytest.raises(DeniedError, match=name):
            check_allowed(name, allow=allow, deny=deny)


def test_the_first_glob_that_matches_a_tag_sets_its_ttl():
    rules = {"latest": 60.0, "v*": 3600.0, "*-rc*": 5.0}
    assert tag_ttl("latest", rules, 600.0) == 60.0
    assert tag_ttl("v1-rc1", rules, 600.0) == 3600.0
    assert tag_ttl("x-rc1", rules, 600.0) == 5.0
    assert tag_ttl("Latest", rules, 600.0) == 600.0
    assert tag_ttl("latest", {}, 600.0) == 600.0


@pytest.mark.parametrize(
    ("age", "expected"),
    [
        (0, Freshness.FRESH),
        (9.9, Freshness.FRESH),
        (10, Freshness.STALE_WHILE_REVALIDATE),
        (14.9, Freshness.STALE_WHILE_REVALIDATE),
        (15, Freshness.STALE_IF_ERROR),
        (109.9, Freshness.STALE_IF_ERROR),
        (110, Freshness.EXPIRED),
        (-1, Freshness.STALE_IF_ERROR),
    ],
)
def test_an_answer_ages(age, expected):
    assert compute_freshness(age, ttl=10, stale_while_revalidate=5, stale_if_error=100) is expected


spans = st.floats(0, 1e9)


@given(st.floats(0, 1e10), st.floats(0, 1e10), spans, spans)
def test_an_answer_never_becomes_younger(age, more, ttl, stale):
    order = list(Freshness)
    younger = compute_freshness(age, ttl=ttl, stale_while_revalidate=0, stale_if_error=stale)
    older = compute_freshness(age + more, ttl=ttl, stale_while_revalidate=0, stale_if_error=stale)
    assert order.index(younger) <= order.index(older)


@given(st.floats(-1e10, -1e-6), spans, spans)
def test_a_clock_turned_back_makes_nothing_fresh(age, ttl, stale):
    assert (
        compute_freshness(age, ttl=ttl, stale_while_revalidate=60, stale_if_error=stale)
        is Freshness.STALE_IF_ERROR
    )


@pytest.mark.parametrize(
    ("accept", "taken"),
    [
        ([], True),
        ([""], True),
        (["*/*"], True),
        (["application/*"], True),
        ([OCI_INDEX], True),
        ([OCI_INDEX.upper()], True),
        ([f"{DOCKER_MANIFEST}, {OCI_INDEX};q=0.5"], True),
        ([DOCKER_MANIFEST, OCI_INDEX], True),
        ([f"{DOCKER_MANIFEST},*/*"], True),
        ([f" {OCI_INDEX} ; charset=utf-8 "], True),
        ([DOCKER_MANIFEST], False),
        ([OCI_MANIFEST, DOCKER_MANIFEST], False),
        (["text/html"], False),
        ([OCI_INDEX + "x"], False),
        (["*/*;q=0"], False),
        ([f"{OCI_INDEX};q=0.000"], False),
        ([f"{OCI_INDEX}; q=0"], False),
        (["x" * 8000], False),
    ],
)
def test_a_client_takes_what_its_accept_lines_name(accept, taken):
    assert accepts(accept, OCI_INDEX) is taken


@given(st.lists(st.text()))
def test_no_accept_line_makes_the_judgement_raise(accept):
    accepts(accept, OCI_INDEX)
