"""Names, tags and references are parsed by the grammar of the distribution specification."""

import pytest
from hypothesis import given, strategies as st

from proxy.errors import (
    InvalidDigestError,
    InvalidNameError,
    InvalidReferenceError,
    InvalidTagError,
)
from proxy.oci.digest import Digest
from proxy.oci.reference import (
    MAX_NAME_LENGTH,
    ImageName,
    Tag,
    parse_image,
    parse_reference,
    parse_repository_name,
    parse_tag,
)

words = st.text("abz019", min_size=1, max_size=5)
separators = st.one_of(st.sampled_from([".", "_", "__"]), st.text("-", min_size=1, max_size=4))


@st.composite
def names(draw):
    components = []
    for _ in range(draw(st.integers(1, 4))):
        component = draw(words)
        for _ in range(draw(st.integers(0, 3))):
            component += draw(separators) + draw(words)
        components.append(component)
    return "/".join(components)


@given(names())
def test_every_name_of_the_grammar_parses(name):
    assert parse_repository_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "a/",
        "/a",
        "a//b",
        "A",
        "library/Nginx",
        "a..b",
        "a.-b",
        "a___b",
        "_a",
        "a_",
        "-a",
        "a-",
        ".",
        "..",
        "a/../b",
        "a/./b",
        "a\\b",
        "a%2fb",
        "a\0b",
        "a\n",
        "a;b",
        "a:b",
        "a b",
        "\u24d0",
        "\u2025",
        "\uff0e\uff0e/etc",
        "x" * (MAX_NAME_LENGTH + 1),
    ],
)
def test_an_invalid_name_is_rejected(name):
    with pytest.raises(InvalidNameError, match="is not a repository name"):
        parse_repository_name(name)


def test_a_name_may_have_255_characters():
    assert parse_repository_name("x" * MAX_NAME_LENGTH) == "x" * MAX_NAME_LENGTH


@given(st.text())
def test_a_name_that_parses_cannot_escape_from_a_directory(text):
    try:
        name = parse_repository_name(text)
    except InvalidNameError:
        return
    assert not {"", ".", ".."} & set(name.split("/"))
    assert name.isascii()


@given(st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}", fullmatch=True))
def test_every_tag_of_the_grammar_parses(text):
    tag = parse_tag(text)
    assert isinstance(tag, Tag)
    assert tag == text
    assert parse_reference(text) == tag


@pytest.mark.parametrize(
    "tag", ["", "-x", ".x", "x" * 129, "a/b", "a b", "caf\u00e9", "\U0001f433", "a\n", "a%20", "\0"]
)
def test_an_invalid_tag_is_rejected(tag):
    with pytest.raises(InvalidTagError, match="is not a tag"):
        parse_tag(tag)
    with pytest.raises(InvalidTagError):
        parse_reference(tag)


def test_a_reference_with_a_colon_is_a_digest():
    digest = Digest.from_content(b"")
    assert parse_reference(str(digest)) == digest
    assert not isinstance(parse_reference("v1"), Digest)
    with pytest.raises(InvalidDigestError):
        parse_reference("latest:1")


class TestImageNames:
    """Image names are parsed as docker parses them."""

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("nginx", ("", "nginx", None)),
            ("nginx:1.25", ("", "nginx", "1.25")),
            ("me/app", ("", "me/app", None)),
            ("docker.io/library/nginx:latest", ("docker.io", "library/nginx", "latest")),
            ("GHCR.io/me/app", ("ghcr.io", "me/app", None)),
            ("localhost/x", ("localhost", "x", None)),
            ("localhost:5000/x:1", ("localhost:5000", "x", "1")),
            ("localhost:5000", ("", "localhost", "5000")),
            ("[::1]:5000/x", ("[::1]:5000", "x", None)),
            ("intern/a/b:c", ("", "intern/a/b", "c")),
        ],
    )
    def test_a_name_consists_of_host_path_and_tag(self, text, parts):
        assert parse_image(text) == ImageName(*parts)

    def test_a_digest_may_follow_a_tag(self):
        digest = Digest.from_content(b"")
        assert parse_image(f"x@{digest}") == ImageName("", "x", None, digest)
        assert parse_image(f"x:1@{digest}") == ImageName("", "x", Tag("1"), digest)

    @pytest.mark.parametrize(
        "text",
        [
            *(
                "",
                "/x",
                "x/",
                "x:",
                ":1",
                "x:1:2",
                "x@",
                "@",
                "x y",
                "X",
                "Me/x",
                "a.b/",
                "a b.c/x",
            ),
            *("..//x", "a.b:/x", "a.b:port/x", "http://a.b/x", "x@sha256:1", "-a.b/x", "x:1/y:z w"),
        ],
    )
    def test_an_invalid_image_name_is_rejected(self, text):
        with pytest.raises(InvalidReferenceError) as caught:
            parse_image(text)
        assert len(str(caught.value)) <= 200

    @given(st.text())
    def test_arbitrary_text_raises_no_other_error(self, text):
        try:
            image = parse_image(text)
        except InvalidReferenceError:
            return
        assert parse_repository_name(image.path) == image.path
