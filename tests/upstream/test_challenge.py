"""Challenges are parsed, never assumed; no input makes the parser raise."""

import time

import pytest
from hypothesis import given, strategies as st

from proxy.upstream.auth.challenge import Challenge, parse

HUB = (
    'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",'
    'scope="repository:library/nginx:pull"'
)


def test_the_challenge_of_docker_hub_is_parsed():
    assert parse([HUB]) == [
        Challenge(
            "bearer",
            {
                "realm": "https://auth.docker.io/token",
                "service": "registry.docker.io",
                "scope": "repository:library/nginx:pull",
            },
        )
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([""], []),
        ([" , ,"], []),
        (['Basic realm="x"'], [("basic", {"realm": "x"})]),
        (["BEARER REALM=x"], [("bearer", {"realm": "x"})]),
        (["Negotiate"], [("negotiate", {})]),
        (["Negotiate, Basic realm=x"], [("negotiate", {}), ("basic", {"realm": "x"})]),
        (
            ['Basic realm="a", Bearer realm="b",scope="c:d:pull,push"'],
            [("basic", {"realm": "a"}), ("bearer", {"realm": "b", "scope": "c:d:pull,push"})],
        ),
        (
            ['Basic realm="a"', 'Bearer realm="b"'],
            [("basic", {"realm": "a"}), ("bearer", {"realm": "b"})],
        ),
        ([r'Bearer realm="say \"hi\", \\"'], [("bearer", {"realm": 'say "hi", \\'})]),
        (['Bearer realm = "x" , service = "y"'], [("bearer", {"realm": "x", "service": "y"})]),
        (['Bearer realm="x",,service="y"'], [("bearer", {"realm": "x", "service": "y"})]),
        (['Bearer realm=""'], [("bearer", {"realm": ""})]),
        (
            ["Bearer realm=https://r/t?a=b,x=y"],
            [("bearer", {"realm": "https://r/t?a=b", "x": "y"})],
        ),
        (['Bearer realm="1",Realm="2"'], [("bearer", {"realm": "1"})]),
        (['Bearer error="insufficient_scope"'], [("bearer", {"error": "insufficient_scope"})]),
    ],
)
def test_challenges_are_parsed_in_all_forms_that_registries_send(values, expected):
    assert [(each.scheme, dict(each.parameters)) for each in parse(values)] == expected


def test_a_token68_does_not_hide_a_later_bearer_challenge():
    schemes = [each.scheme for each in parse([f"Negotiate YIIfake==, {HUB}"])]
    assert schemes[0] == "negotiate"
    assert schemes[-1] == "bearer"


tokens = st.text("abcXYZ019!#$%&'*+.^_`|~-", min_size=1, max_size=8)
texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)
challenges = st.builds(
    Challenge,
    tokens.map(str.lower),
    st.dictionaries(tokens.map(str.lower), texts, max_size=4),
)


def format_challenge(challenge: Challenge) -> str:
    quoted = (
        '{}="{}"'.format(name, value.replace("\\", r"\\").replace('"', r"\""))
        for name, value in challenge.parameters.items()
    )
    return f"{challenge.scheme} {','.join(quoted)}".rstrip()


@given(st.lists(challenges, max_size=4))
def test_formatted_challenges_are_parsed_back_from_one_header_or_several(expected):
    assert parse([format_challenge(each) for each in expected]) == expected
    assert parse([", ".join(format_challenge(each) for each in expected)]) == expected


@given(st.lists(st.text()))
def test_the_parser_never_raises(values):
    for challenge in parse(values):
        assert challenge.scheme == challenge.scheme.lower() != ""


@given(st.lists(st.sampled_from([*'ab=",\\ \t\0', HUB]), max_size=40).map("".join))
def test_the_parser_never_raises_on_almost_valid_input(value):
    parse([value])


@pytest.mark.parametrize(
    "value", ["a" * 10_000_000, "a=" * 100_000, 'a="' * 100_000, " " * 100_000, "a, " * 100_000]
)
def test_a_long_challenge_takes_little_time(value):
    start = time.process_time()
    parse([value])
    assert time.process_time() - start < 0.5
