"""Formats are recognised by content, no text makes `parse_list` raise, and its work is bounded."""

from itertools import pairwise

import pytest
from hypothesis import example, given, strategies as st

from proxy.preload.lists import ImageList, parse_list, yaml_documents
from proxy.preload.lists.formats import MAX_CHARACTERS, MAX_LINES
from proxy.preload.lists.result import MAX_PROBLEMS
from proxy.preload.lists.yaml_documents import MAX_MERGES, MAX_NESTING
from tests.preload.lists.test_compose import COMPOSE
from tests.preload.lists.test_dockerfile import DOCKERFILE
from tests.preload.lists.test_kubernetes import HAULER, HELM
from tests.preload.lists.test_plain import KUBEADM, MIXED
from tests.preload.lists.test_sync_tools import REGSYNC, SKOPEO
from tests.support.image_lists import errors, images, notes, only

LISTS = [COMPOSE, DOCKERFILE, HAULER, HELM, KUBEADM, MIXED, REGSYNC, SKOPEO]
POD = "apiVersion: v1\nkind: Pod\n"


def assert_valid(image_list: ImageList, text: str) -> None:
    """Check that there is a result, with lines of the text, and messages short enough to show."""
    count = text.count("\n") + text.count("\r") + 1
    assert image_list.entries or image_list.problems
    assert all(1 <= entry.line <= count for entry in image_list.entries)
    assert all(one.line <= two.line for one, two in pairwise(image_list.problems))
    for problem in image_list.problems:
        assert 1 <= problem.line <= count
        assert len(problem.message) < 200
        assert "\n" not in problem.message


@pytest.mark.parametrize("text", LISTS)
def test_line_numbers_are_right_with_any_line_ends_and_a_leading_comment(text):
    changed = parse_list("\ufeff# first\r\n" + text.replace("\n", "\r\n"))
    # Below the first line, the directives of a Dockerfile are comments.
    expected = [
        (entry.line + 1, entry.reference)
        for entry in parse_list(text).entries
        if "docker/dockerfile" not in entry.reference
    ]
    assert [(entry.line, entry.reference) for entry in changed.entries] == expected


@pytest.mark.parametrize(
    "text",
    ["image: {repository: nginx}", "just: text", "--- text", "services: []", "{}", "- {a: b}"],
)
def test_yaml_in_no_known_format_is_an_error_that_names_the_formats(text):
    line, message = only(errors(text))
    assert line == 1
    assert "docker compose, Kubernetes, skopeo sync" in message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: b: c", 1),
        ("a: 1\nb: {", 2),
        ("a:\n\t- b", 2),
        ("a: 1\nb: *nothing", 2),
        ("a: \0", 1),
        (f"{POD}a: {'[' * MAX_NESTING}{']' * MAX_NESTING}", 3),
    ],
)
def test_an_unreadable_document_is_an_error_and_the_next_is_read(text, line):
    stream = f"{text}\n---\n{POD}spec: {{containers: [{{image: nginx}}]}}\n"
    assert [reference for _, reference in images(stream)] == ["nginx"]
    error_line, message = only(errors(stream))
    assert error_line == line
    assert "cannot be read" in message


def test_a_list_without_images_is_an_error():
    assert errors("---\n# nothing\n---\n") == [(1, "the list contains no images")]
    assert errors(f"{POD}spec: {{}}\n") == [(1, "the list contains no images")]


def test_a_text_that_is_too_large_is_an_error():
    assert "MiB of text" in only(errors("#" * (MAX_CHARACTERS + 1)))[1]
    assert "lines" in only(errors("a\n" * (MAX_LINES + 1)))[1]


def test_problems_beyond_the_limit_are_counted():
    problems = parse_list("!\n" * (MAX_PROBLEMS + 7)).problems
    assert len(problems) == MAX_PROBLEMS + 1
    assert problems[-1].message == "7 more problems not shown"


def test_documents_and_values_are_limited_over_the_whole_stream(monkeypatch):
    monkeypatch.setattr(yaml_documents, "MAX_DOCUMENTS", 100)
    monkeypatch.setattr(yaml_documents, "MAX_NODES", 1000)
    assert "documents" in only(errors("---\n" * 105))[1]
    half = f"---\n{{a: [{'a,' * 500}]}}\n"
    line, message = errors(half * 3)[-1]
    assert line == 3
    assert "values" in message


def test_an_alias_bomb_is_read_as_fast_as_its_text():
    levels = "".join(f"x{n + 1}: &x{n + 1} [{f'*x{n}, ' * 9}]\n" for n in range(90))
    text = f"{POD}x0: &x0 {{image: nginx}}\n{levels}loop: &loop {{a: *loop, b: [*loop]}}\n"
    assert images(text) == [(3, "nginx")]


def test_merge_keys_are_followed_up_to_a_limit():
    chain = "".join(f"x{n + 1}: &x{n + 1} {{<<: [*x{n}, *x{n}]}}\n" for n in range(MAX_MERGES))
    services = f"services:\n  a: {{<<: *x{MAX_MERGES}}}\n  b: {{<<: *x9}}\n"
    text = f"x0: &x0 {{image: nginx}}\n{chain}{services}"
    assert images(text) == [(1, "nginx")]
    assert only(notes(text))[1].startswith("'a' has neither image nor build")


# Tokens of all formats, mixed at random by the tests below.
TOKENS = [
    *("nginx", "alpine:3", "a/b@sha256:0", "platform=", "{{x}}", "${A:-b}", "$"),
    *("image: ", "images:", "services:", "sync:", "registries:"),
    *("apiVersion: v1", "kind: Pod", "spec:", "containers:"),
    *("FROM ", "ARG A=1", "COPY --from=", "RUN <<E"),
    *("&a ", "*a", "!t ", "<<: ", "- ", "? ", "---", "..."),
    *">{}[]:,#%'\"\\`=@\t\0\x85\u2028\ud800\ufeff",
]
SEPARATORS = ["", " ", "\n", "\n  ", "\r\n"]
mixtures = st.lists(st.tuples(st.sampled_from(TOKENS), st.sampled_from(SEPARATORS))).map(
    lambda pairs: "".join(token + separator for token, separator in pairs)
)


@given(st.text())
@example("services: {a: {image: \ud800}}")
def test_no_text_raises(text):
    assert_valid(parse_list(text), text)


@given(mixtures)
def test_no_mixture_of_tokens_of_the_formats_raises(text):
    assert_valid(parse_list(text), text)


@given(st.sampled_from(LISTS), st.data())
def test_no_damage_to_a_list_raises(text, data):
    position = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 20))
    damaged = text[:position] + data.draw(mixtures) + text[position + cut :]
    assert_valid(parse_list(damaged), damaged)


@given(st.lists(st.from_regex(r"[a-z]{1,5}:[0-9]{1,3}", fullmatch=True), min_size=1, unique=True))
def test_every_format_gives_equal_images_in_equal_order(names):
    services = "".join(f"  s{n}: {{image: '{name}'}}\n" for n, name in enumerate(names))
    containers = "".join(f"  - image: {name}\n" for name in names)
    texts = [
        "\n".join(names),
        "".join(f"- {name}\n" for name in names),
        f"services:\n{services}",
        f"{POD}containers:\n{containers}",
        "".join(f"FROM {name}\n" for name in names),
        "sync:\n" + "".join(f"- {{type: image, source: '{name}'}}\n" for name in names),
    ]
    for text in texts:
        entries = parse_list(text).entries
        assert [entry.reference for entry in entries] == names
        lines = text.splitlines()
        assert all(entry.reference in lines[entry.line - 1] for entry in entries)
