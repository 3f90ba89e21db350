"""The images a command works on: named as arguments or in image lists (`-f`)."""

from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from proxy.cli.display.text import escape_unprintable

if TYPE_CHECKING:
    from proxy.preload.lists import ListEntry

_Command = TypeVar("_Command", bound=Callable[..., Any])


def list_options(command: _Command) -> _Command:
    """Add the argument `[IMAGE]...` and the options `-f/--file` and `--platform`."""
    images = click.argument("images", metavar="[IMAGE]...", nargs=-1)
    files = click.option(
        "-f",
        "--file",
        "files",
        multiple=True,
        metavar="FILE",
        type=click.File(encoding="utf-8", errors="replace"),
        help="Image list: plain text, compose, Kubernetes, skopeo, regsync, hauler, Dockerfile "
        "or lock file; - for stdin. May be repeated.",
    )
    platforms = click.option(
        "--platform",
        "platforms",
        multiple=True,
        metavar="OS/ARCH",
        help='Platform, or "all". May be repeated. [default: from the list, or this machine\'s]',
    )
    return images(files(platforms(command)))


def collect_images(
    images: Sequence[str], files: Sequence[IO[str]], platforms: Sequence[str]
) -> tuple[list[dict[str, Any]], int]:
    """Return the images as the admin API takes them, and the number of invalid list entries.

    `platforms` overrides the platforms that a list names. Raises `click.UsageError` without images.
    """
    requested: list[dict[str, Any]] = [{"image": image, "platforms": platforms} for image in images]
    invalid = 0
    for file in files:
        entries, errors = read_image_list(file)
        requested += [
            {"image": entry.reference, "platforms": platforms or entry.platforms}
            for entry in entries
        ]
        invalid += errors
    if not requested and not invalid:
        raise click.UsageError("pass images, or an image list with -f")
    return requested, invalid


def read_image_list(file: IO[str]) -> "tuple[Sequence[ListEntry], int]":
    """Return the entries of a list and the number of invalid ones.

    Problems are printed to stderr with file name and line.
    """
    from proxy.preload.lists import MAX_CHARACTERS, parse_list  # noqa: PLC0415 - imports PyYAML

    result = parse_list(file.read(MAX_CHARACTERS + 1))
    name = escape_unprintable(getattr(file, "name", "-"))
    for problem in result.problems:
        click.echo(f"{name}:{problem.line}: {escape_unprintable(problem.message)}", err=True)
    return result.entries, sum(problem.kind == "error" for problem in result.problems)
