"""Tables and fields on terminals of any width: nothing is broken within a word."""

import re

import pytest

from proxy.cli.display.text import shorten, wrap
from tests.fakes.images import blobs_of, push_manifest
from tests.support.admin_api import NATIVE, pull_parts
from tests.support.commands import run_on_terminal

LONG_NAME = "team-with-a-long-name/application-with-a-long-name"
HISTORY = [{"created_by": "RUN apt-get update && apt-get install -y curl # buildkit"}]


@pytest.fixture
async def images(registry, program):
    for name in ("library/nginx", "me/app", LONG_NAME):
        pushed = push_manifest(
            registry, name, [name.encode()], tag="v1", platform=NATIVE, history=HISTORY
        )
        await pull_parts(program, name, "v1", *blobs_of(registry, name, pushed))
    return program


def plain(shown: str) -> list[str]:
    """Return the lines without the codes of the terminal."""
    return [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in shown.splitlines()]


@pytest.mark.parametrize("columns", [60, 72, 80, 100])
async def test_the_table_of_images_leaves_out_columns(images, columns):
    lines = plain(await run_on_terminal(images, "images", "nginx", columns=columns))
    assert max(map(len, lines)) <= columns
    assert lines[0].split()[0] == "IMAGE"
    assert lines[0].split()[-1] == "STATUS"
    assert lines[1].startswith("nginx:v1 ")
    assert len(lines) == 2


async def test_a_row_that_does_not_fit_is_a_few_lines(images):
    lines = plain(await run_on_terminal(images, "images", "team", columns=50))
    assert lines[:2] == ["IMAGE", f"{LONG_NAME}:v1"]
    assert lines[2].startswith("  platforms ")
    assert max(map(len, lines[2:])) <= 50
    assert not any(line.startswith(("  B", "  kB", "  MB")) for line in lines)


async def test_a_row_of_a_few_lines_has_no_empty_values(images):
    shown = await run_on_terminal(images, "check-offline", f"{LONG_NAME}:v1", columns=60)
    assert "missing" not in shown
    assert "status complete" in shown


async def test_no_trunc_shows_every_column(images):
    lines = plain(await run_on_terminal(images, "images", "--no-trunc", columns=50))
    assert lines[0].split() == [
        *("IMAGE", "PLATFORMS", "SIZE", "UNIQUE", "CACHED", "PULLED", "TRUST", "STATUS")
    ]


async def test_digests_of_inspect_are_short_on_a_terminal(images):
    lines = plain(await run_on_terminal(images, "inspect", "nginx:v1", columns=60))
    assert max(map(len, lines)) <= 60
    assert not re.search(r"[0-9a-f]{13}", "\n".join(lines))
    (command,) = [line for line in lines if "apt-get" in line]
    assert command.endswith("…")
    complete = "\n".join(
        plain(await run_on_terminal(images, "inspect", "nginx:v1", "--no-trunc", columns=60))
    )
    assert len(re.findall(r"sha256:[0-9a-f]{64}", complete)) >= 2


async def test_the_status_and_errors_are_broken_between_words(images):
    lines = plain(await run_on_terminal(images, "status", columns=60))
    assert [line for line in lines if len(line) > 60 and str(images.root) not in line] == []
    lines = plain(await run_on_terminal(images, "inspect", "typo:v9", columns=60, exit_code=1))
    assert " ".join(lines) == (
        "pullcache: typo:v9 is not in the store; pullcache images lists stored images"
    )
    assert max(map(len, lines)) <= 60


@pytest.mark.parametrize(
    ("text", "length", "short"),
    [
        ("one two three", 13, "one two three"),
        ("one two three", 12, "one two…"),
        ("one two three", 8, "one two…"),
        ("one two three", 7, "one…"),
        ("unbreakable", 6, "unbre…"),
    ],
)
def test_a_text_is_shortened_between_words(text, length, short):
    assert shorten(text, length) == short
    assert len(shorten(text, length)) <= length


def test_a_word_that_is_longer_than_the_line_stays_whole():
    assert wrap("see https://example.test/a-long-path now", 12, indent="  ").splitlines() == [
        "see",
        "  https://example.test/a-long-path",
        "  now",
    ]
