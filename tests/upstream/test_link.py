"""`Link` headers are parsed as RFC 8288 says, and what clients follow in spite of it is followed."""

import pytest
from hypothesis import given, strategies as st

from proxy.upstream.link_header import MAX_LINK_LENGTH, find_link


@pytest.mark.parametrize(
    ("header", "target"),
    [
        ('</a>; rel="next"', "/a"),
        ("</a>;rel=next", "/a"),
        ("</a>\t;\tREL\t=\tNext", "/a"),
        ('</a>; rel="prev  next"', "/a"),
        ('</a>; title="say \\"next\\", <b>; rel=next"; rel=next', "/a"),
        ('</a,b;c>; rel="next"', "/a,b;c"),
        ("< /a >; rel=next", "/a"),
        ("<>; rel=next", ""),
        ('</a>; rel=prev, </b>; rel="next", </c>; rel=next', "/b"),
        ("</a>; rel=prev; rel=next", None),
        ("</a>; title=next", "/a"),
        ("</a>; nextrel=next; rel", None),
        ("</a>; rel='next'", "/a"),
        ('</a>; rel="nextpage"', None),
        ("</a>; rel*=next", "/a"),
        ('</a>; rel="next', None),
        ('</a>; title="x"y; rel=next', "/a"),
        ("</a>", "/a"),
        ("</a>, </b>; rel=next", "/b"),
        ("</a>; rel=last, </b>", "/b"),
        ("/a?b=c,d; rel=next", "/a?b=c,d"),
        ("?b=c; rel=prev", None),
        ("https://registry.example/a", "https://registry.example/a"),
        ("a; rel=next", None),
        ("", None),
        ("<" * 30_000 + "; rel=next", None),
        ("</a>" + ";" * 30_000, "/a"),
        ("</a>; x=" + "y" * MAX_LINK_LENGTH + "; rel=next", "/a"),
    ],
)
def test_the_target_of_a_relation_is_found(header, target):
    assert find_link([header], "next") == target


def test_a_link_may_be_in_any_of_several_headers():
    assert find_link(["</a>; rel=prev", "", "</b>; rel=next"], "next") == "/b"
    assert find_link([], "next") is None


@given(st.text(alphabet='<>;,="\\ relnxt/*', max_size=60))
def test_no_header_raises(header):
    find_link([header], "next")
