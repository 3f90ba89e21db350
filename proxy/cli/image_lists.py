"""The images that a command is about: named one by one, or in lists of any kind."""

from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from proxy.cli.display.text import escape_unprintable

if TYPE_CHECKING:
    from proxy.preload.lists import ListEntry

_Command = TypeVar("_Command", bound=Callable[..., Any])


def list_options(command: _Command) -> _Command:
    """Give a command `IMAGE...`, `-f/--file` and `--platform`."""
    images = click.argument("images", metavar="IMAGE...", nargs=-1)
    files = click.option(
        "-f",
        "--file",
        "files",
        multiple=True,
        type=click.File(encoding="utf-8", errors="replace"),
        help="A list of images: plain, compose, Kubernetes, skopeo, regsync, hauler, a Dockerfile, a lock; "
        "- is stdin.",
    )
    platforms = click.option(
        "--platform",
        "platforms",
        multiple=True,
        metavar="OS/ARCH",
        help="May be repeated; \"all\" is every platform of an image. [default: the list's, or this machine's]",
    )
    return images(files(platforms(command)))


def collect_images(
    images: Sequence[str], files: Sequence[IO[str]], platforms: Sequence[str]
) -> tuple[list[dict[str, Any]], int]:
    """Return the images with their platforms, and how many entries of the lists say nothing.

    A platform that is given counts more than a list's.
    """
    wanted: list[dict[str, Any]] = [{"image": image, "platforms": platforms} for image in images]
    wrong = 0
    for file in files:
        entries, problems = read_image_list(file)
        wanted += [
            {"image": entry.reference, "platforms": platforms or entry.platforms}
            for entry in entries
        ]
        wrong += problems
    if not wanted and not wrong:
        raise click.UsageError("name images, or a list of them with -f")
    return wanted, wrong


def read_image_list(file: IO[str]) -> "tuple[Sequence[ListEntry], int]":
    """Return what a list names, and how many of its entries are wrong, which stderr is told with their lines."""
    from proxy.preload.lists import MAX_CHARACTERS, parse_list  # noqa: PLC0415 - brings a parser of YAML

    found = parse_list(file.read(MAX_CHARACTERS + 1))
    name = getattr(file, "name", "-")
    for problem in found.problems:
        click.echo(
            f"{escape_unprintable(name)}:{problem.line}: {escape_unprintable(problem.message)}",
            err=True,
        )
    return found.entries, sum(problem.kind == "error" for problem in found.problems)
