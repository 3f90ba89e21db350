"""The man pages and completions that packages install, against the commands."""

import shlex
import subprocess
from pathlib import Path

import pytest

from proxy.cli import main
from tests.support.commands import run
from tests.support.man_pages import PAGES, iter_commands, write_pages

COMPLETIONS = Path(__file__).parents[1] / "config" / "completions"


def test_the_man_pages_are_those_of_the_commands(tmp_path):
    """To generate them anew: .venv/bin/python -m tests.support.man_pages."""
    write_pages(tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert {path.name: path.read_text() for path in PAGES.iterdir()} == written
    assert len(written) > 25


@pytest.mark.parametrize("path", sorted(PAGES.iterdir()), ids=lambda path: path.stem)
def test_a_man_page_has_sections_and_an_example(path):
    text = path.read_text()
    assert ".SH NAME\n" in text
    assert ".SH DESCRIPTION\n" in text
    assert "\nExamples:\n  " in text
    assert "..." not in text.partition(".SH COMMANDS")[2]
    assert "\b" not in text
    macros = {line.split()[0] for line in text.splitlines() if line.startswith((".", "'"))}
    assert macros <= {".TH", ".SH", ".PP", ".B", ".TP", ".nf", ".fi"}


def test_no_help_text_shows_a_backslash_and_b():
    """In a raw docstring, click's mark is two characters: click prints them and wraps the examples."""
    texts = {one.name: f"{one.help}{one.epilog}" for one in iter_commands(main)}
    assert [name for name, text in texts.items() if "\\b" in text] == []


@pytest.mark.parametrize("path", sorted(PAGES.iterdir()), ids=lambda path: path.stem)
def test_the_heading_of_a_man_page_fits_into_60_columns(path):
    title, *_, manual = shlex.split(path.read_text().splitlines()[0].removeprefix(".TH "))
    assert title == path.stem.upper()
    assert len(2 * f"{title}(1)") + len(manual) <= 60


@pytest.mark.system
@pytest.mark.parametrize("path", sorted(PAGES.iterdir()), ids=lambda path: path.stem)
def test_groff_has_no_complaint_about_a_man_page(path):
    command = ["groff", "-man", "-ww", "-Tutf8", "-K", "utf8", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completions_are_those_of_the_command(shell):
    """To generate one anew: pullcache completion bash > config/completions/pullcache.bash."""
    assert (COMPLETIONS / f"pullcache.{shell}").read_text() == run("completion", shell).stdout
