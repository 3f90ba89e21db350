"""What `parse_list` finds in a text, in forms short enough to compare."""

from textwrap import dedent

from proxy.preload.lists import parse_list
from proxy.preload.lists.result import ProblemKind


def images(text: str) -> list[tuple[int, str]]:
    """Return line and reference of each image, in order."""
    return [(entry.line, entry.reference) for entry in parse_list(dedent(text)).entries]


def platforms(text: str) -> dict[str, tuple[str, ...]]:
    """Return the platforms of each reference."""
    return {entry.reference: entry.platforms for entry in parse_list(dedent(text)).entries}


def errors(text: str) -> list[tuple[int, str]]:
    """Return line and message of each error."""
    return _problems(text, "error")


def notes(text: str) -> list[tuple[int, str]]:
    """Return line and message of each note."""
    return _problems(text, "note")


def only(items: list[tuple[int, str]]) -> tuple[int, str]:
    """Return the only item of a list."""
    (item,) = items
    return item


def _problems(text: str, kind: ProblemKind) -> list[tuple[int, str]]:
    return [
        (problem.line, problem.message)
        for problem in parse_list(dedent(text)).problems
        if problem.kind == kind
    ]
