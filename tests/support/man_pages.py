"""The man pages of all commands, from their help texts. `config/man` has them.

To generate them anew: .venv/bin/python -m tests.support.man_pages
"""

import re
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import click
from click_man.core import write_man_pages  # type: ignore[import-untyped]

from proxy import __version__
from proxy.cli import main

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "config" / "man"
# The date of the pages is that of the last release, so that the same help texts give the same pages.
_RELEASE = re.compile(r"^## [0-9.]+ - ([0-9-]+)$", re.MULTILINE)
_HEADING = re.compile(r'\.TH "[^"]*" (.*) "[^"]*"')


def iter_commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from iter_commands(inner)


def to_roff(text: str) -> str:
    """Return a help text as roff: what click does not wrap (after \\b) is not filled."""
    lines: list[str] = []
    is_filled = True
    for line in text.split("\n"):
        if line.strip() == "\b":
            lines.append(".nf")
            is_filled = False
        elif not line.strip() and not is_filled:
            lines += [".fi", ""]
            is_filled = True
        else:
            shown = line.replace("\\", "\\e").replace("-", "\\-")
            lines.append(f"\\&{shown}" if shown.lstrip().startswith((".", "'")) else shown)
    return "\n".join(lines if is_filled else [*lines, ".fi"])


def write_pages(directory: Path) -> None:
    """Write the pages. The texts of the commands are changed only meanwhile."""
    (date,) = _RELEASE.findall((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))[:1]
    commands = [*iter_commands(main)]
    before = [(one.help, one.short_help) for one in commands]
    try:
        for one in commands:
            one.short_help = one.get_short_help_str(1000).replace("-", "\\-")
            one.help = to_roff(cleandoc(one.help or ""))
        write_man_pages(
            "pullcache", main, version=__version__, target_dir=str(directory), date=date
        )
    finally:
        for one, (help_text, short_help) in zip(commands, before, strict=True):
            one.help, one.short_help = help_text, short_help
    for path in directory.glob("*.1"):
        heading, newline, text = path.read_text(encoding="utf-8").partition("\n")
        path.write_text(_name_page(heading, path.stem) + newline + text, encoding="utf-8")


def _name_page(heading: str, name: str) -> str:
    """Return the heading with the name of the page as one word, and no name of a manual beside it.

    On a narrow terminal, three names would overlap.
    """
    return _HEADING.sub(lambda found: f'.TH "{name.upper()}" {found[1]} ""', heading)


if __name__ == "__main__":
    for path in PAGES.glob("*.1"):
        path.unlink()
    PAGES.mkdir(exist_ok=True)
    write_pages(PAGES)
