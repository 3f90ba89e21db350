"""What a list says, short enough to compare."""

from textwrap import dedent

from proxy.preload.lists import ListProblem, parse_list


def images(text: str) -> list[tuple[int, str]]:
    """Return line and reference of each image, in their order."""
    return [(entry.line, entry.reference) for entry in parse_list(dedent(text)).entries]


def platforms(text: str) -> dict[str, tuple[str, ...]]:
    """Return the platforms of each reference."""
    return {entry.reference: entry.platforms for entry in parse_list(dedent(text)).entries}


def problems(text: str) -> list[tuple[int, str]]:
    """Return line and message of what is wrong with the list."""
    return _of("error", text)


def notes(text: str) -> list[tuple[int, str]]:
    """Return line and message of what is said besides."""
    return _of("note", text)


def _of(kind: str, text: str) -> list[tuple[int, str]]:
    found: tuple[ListProblem, ...] = parse_list(dedent(text)).problems
    return [(problem.line, problem.message) for problem in found if problem.kind == kind]


def only(found: list[tuple[int, str]]) -> tuple[int, str]:
    """Return the one there is."""
    (one,) = found
    return one
