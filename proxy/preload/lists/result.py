"""The result of parsing an image list: its images and its problems. Pure."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from proxy.errors import InvalidReferenceError
from proxy.oci.reference import parse_image

# A file that is not an image list has a problem in every line; this many are enough to read.
MAX_PROBLEMS = 1000
# In characters. Quoting unprintable characters makes a message longer than its text.
MAX_MESSAGE_LENGTH = 199
# In characters: more than host, name, tag and digest have together.
MAX_REFERENCE_LENGTH = 1024

_PLATFORM = re.compile(r"all|[a-z0-9]+/[a-z0-9_]+(?:/[a-z0-9.]+)?")

# An error makes a command fail. A note reports an entry that has nothing to pull.
ProblemKind = Literal["error", "note"]


@dataclass(frozen=True, slots=True)
class ListEntry:
    """An image as the list writes it.

    `platforms` is empty if the list names none for it; "all" stands for every one.
    """

    line: int
    reference: str
    platforms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ListProblem:
    """An entry that is not an image: the reason, and what to do."""

    line: int
    message: str
    kind: ProblemKind = "error"


@dataclass(frozen=True, slots=True)
class ImageList:
    """The images in the order of the list, without duplicates, and the problems by line.

    `format` is the name of the format, several separated by commas, or "" for an empty list.
    """

    format: str
    entries: tuple[ListEntry, ...]
    problems: tuple[ListProblem, ...]


class ParseResult:
    """Collects what the reader of a format finds."""

    def __init__(self) -> None:
        self._formats: dict[str, None] = {}
        self._entries: dict[tuple[str, tuple[str, ...]], ListEntry] = {}
        self._problems: list[ListProblem] = []
        self._omitted_count = 0

    @property
    def is_empty(self) -> bool:
        """Whether neither an image nor a problem was found."""
        return not self._entries and not self._problems

    def add_format(self, name: str) -> None:
        """Add the name of a format; a stream of documents may have several."""
        self._formats[name] = None

    def add_image(
        self, line: int, text: str, platforms: Iterable[str] = (), *, kind: ProblemKind = "error"
    ) -> None:
        """Add an image unless it was added before; if it is invalid, add a problem of this kind."""
        reference = text.strip()
        unique_platforms = tuple(dict.fromkeys(platforms))
        if message := _validate(reference, unique_platforms):
            self.add_problem(line, message, kind)
        else:
            entry = ListEntry(line, reference, unique_platforms)
            self._entries.setdefault((reference, unique_platforms), entry)

    def add_problem(self, line: int, message: str, kind: ProblemKind = "error") -> None:
        """Add a problem; beyond `MAX_PROBLEMS` they are only counted."""
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(ListProblem(line, message[:MAX_MESSAGE_LENGTH], kind))
        else:
            self._omitted_count += 1

    def to_image_list(self) -> ImageList:
        """Return the collected images and problems."""
        problems = sorted(self._problems, key=lambda problem: problem.line)
        if self._omitted_count:
            problems.append(
                ListProblem(problems[-1].line, f"{self._omitted_count} more problems not shown")
            )
        return ImageList(", ".join(self._formats), tuple(self._entries.values()), tuple(problems))


def _validate(reference: str, platforms: tuple[str, ...]) -> str:
    """Return what is wrong with an image; "" if it is valid."""
    if "{{" in reference or "}}" in reference:
        return f"{reference[:60]!r} is a template: render it first, for example with helm template"
    if len(reference) > MAX_REFERENCE_LENGTH:
        return (
            f"{reference[:60]!r}… is not an image: "
            f"it is longer than {MAX_REFERENCE_LENGTH} characters"
        )
    for platform in platforms:
        if _PLATFORM.fullmatch(platform) is None:
            return f"{platform[:60]!r} is not a platform: write it as linux/arm64 or linux/arm/v7"
    try:
        parse_image(reference)
    except InvalidReferenceError as error:
        return str(error)
    return ""
