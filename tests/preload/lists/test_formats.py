"""Whatever the list is: its format is known by its content, nothing raises, and work is bounded."""

from itertools import pairwise

import pytest
from hypothesis import example, given, strategies as st

from proxy.preload.lists import ImageList, parse_list
from proxy.preload.lists.formats import MAX_CHARACTERS, MAX_LINES
from proxy.preload.lists.result import MAX_PROBLEMS
from proxy.preload.lists.yaml_documents import MAX_DOCUMENTS, MAX_MERGES, MAX_NESTING, MAX_NODES
from tests.preload.lists.test_compose import COMPOSE
from tests.preload.lists.test_dockerfile import DOCKERFILE
from tests.preload.lists.test_kubernetes import HAULER, HELM
from tests.preload.lists.test_plain import KUBEADM, MIXED
from tests.preload.lists.test_sync_tools import REGSYNC, SKOPEO
from tests.support.image_lists import images, notes, only, problems

LISTS = [COMPOSE, DOCKERFILE, HAULER, HELM, KUBEADM, MIXED, REGSYNC, SKOPEO]
POD = "apiVersion: v1\nkind: Pod\n"


def is_sound(found: ImageList, text: str) -> bool:
    """Tell whether lines are lines of the text, and messages fit where they are shown."""
    count = text.count("\n") + text.count("\r") + 1
    assert all(1 <= entry.line <= count for entry in found.entries)
    assert all(one.line <= two.line for one, two in pairwise(found.problems))
    for problem in found.problems:
        assert 1 <= problem.line <= count
        assert len(problem.message) < 200
        assert "\n" not in problem.message
    return bool(found.entries or found.problems)


@pytest.mark.parametrize("text", LISTS)
def test_lines_are_right_whatever_ends_them_and_stands_before(text):
    moved = parse_list("\ufeff# first\r\n" + text.replace("\n", "\r\n"))
    # The directives of a Dockerfile stand at its top, or are comments.
    expected = [
        (entry.line + 1, entry.reference)
        for entry in parse_list(text).entries
        if "docker/dockerfile" not in entry.reference
    ]
    assert [(entry.line, entry.reference) for entry in moved.entries] == expected


@pytest.mark.parametrize(
    "text",
    ["image: {repository: nginx}", "just: text", "--- text", "services: []", "{}", "- {a: b}"],
)
def test_yaml_that_is_no_list_says_what_would_be(text):
    line, message = only(problems(text))
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
def test_a_document_that_cannot_be_read_is_named_and_the_next_is_read(text, line):
    stream = f"{text}\n---\n{POD}spec: {{containers: [{{image: nginx}}]}}\n"
    assert [reference for _, reference in images(stream)] == ["nginx"]
    found = only(problems(stream))
    assert found[0] == line
    assert "cannot be read" in found[1]


def test_a_list_without_images_says_so():
    assert problems("---\n# nothing\n---\n") == [(1, "the list names no image")]
    assert problems(f"{POD}spec: {{}}\n") == [(1, "the list names no image")]


def test_a_text_that_is_too_large_is_refused_whole():
    assert "MiB of text" in only(problems("#" * (MAX_CHARACTERS + 1)))[1]
    assert "lines" in only(problems("a\n" * (MAX_LINES + 1)))[1]


def test_only_so_many_problems_are_said_and_the_others_counted():
    found = parse_list("!\n" * (MAX_PROBLEMS + 7))
    assert len(found.problems) == MAX_PROBLEMS + 1
    assert found.problems[-1].message == "7 more problems not shown"


def test_documents_and_their_values_are_bounded_over_the_whole_stream():
    assert "documents" in only(problems("---\n" * (MAX_DOCUMENTS + 5)))[1]
    half = f"---\n{{a: [{'a,' * (MAX_NODES // 2)}]}}\n"
    line, message = problems(half * 3)[-1]
    assert line == 3
    assert "values" in message


def test_a_bomb_of_aliases_is_as_small_as_its_text():
    levels = "".join(f"x{n + 1}: &x{n + 1} [{f'*x{n}, ' * 9}]\n" for n in range(90))
    text = f"{POD}x0: &x0 {{image: nginx}}\n{levels}loop: &loop {{a: *loop, b: [*loop]}}\n"
    assert images(text) == [(3, "nginx")]


def test_merges_are_followed_only_so_far():
    chain = "".join(f"x{n + 1}: &x{n + 1} {{<<: [*x{n}, *x{n}]}}\n" for n in range(MAX_MERGES))
    services = f"services:\n  a: {{<<: *x{MAX_MERGES}}}\n  b: {{<<: *x9}}\n"
    text = f"x0: &x0 {{image: nginx}}\n{chain}{services}"
    assert images(text) == [(1, "nginx")]
    assert only(notes(text))[1].startswith("'a' has neither image nor build")


WORDS = [
    "nginx",
    "alpine:3",
    "a/b@sha256:0",
    "image: ",
    "services:",
    "apiVersion: v1",
    "kind: Pod",
    "spec:",
]
WORDS += [
    "containers:",
    "sync:",
    "registries:",
    "images:",
    "FROM ",
    "ARG A=1",
    "COPY --from=",
    "RUN <<E",
]
WORDS += [
    "${A:-b}",
    "{{x}}",
    "$",
    "&a ",
    "*a",
    "!t ",
    "<<: ",
    "- ",
    "---",
    "...",
    "platform=",
    "? ",
]
WORDS += [*">{}[]:,#%'\"\\`=@\t\0\x85\u2028\ud800\ufeff"]
pieces = st.sampled_from(WORDS)
soups = st.lists(st.tuples(pieces, st.sampled_from(["", " ", "\n", "\n  ", "\r\n"]))).map(
    lambda parts: "".join(piece + end for piece, end in parts)
)


@given(st.text())
@example("services: {a: {image: \ud800}}")
def test_no_text_makes_it_raise(text):
    assert is_sound(parse_list(text), text)


@given(soups)
def test_no_mixture_of_what_the_formats_are_made_of_makes_it_raise(text):
    assert is_sound(parse_list(text), text)


@given(st.sampled_from(LISTS), st.data())
def test_no_damage_to_a_list_makes_it_raise(text, data):
    position = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 20))
    damaged = text[:position] + data.draw(soups) + text[position + cut :]
    assert is_sound(parse_list(damaged), damaged)


@given(st.lists(st.from_regex(r"[a-z]{1,5}:[0-9]{1,3}", fullmatch=True), min_size=1, unique=True))
def test_every_format_gives_the_same_images_in_the_same_order(names):
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
        found = parse_list(text)
        assert [entry.reference for entry in found.entries] == names
        lines = text.splitlines()
        assert all(entry.reference in lines[entry.line - 1] for entry in found.entries)
