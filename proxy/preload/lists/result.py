"""What a list of images holds. PURE."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from proxy.errors import InvalidReferenceError
from proxy.oci.reference import parse_image

# A list of something else is wrong in every line: nobody reads more than these.
MAX_PROBLEMS = 1000
# Characters; what cannot be printed is longer when it is quoted.
MAX_MESSAGE_LENGTH = 199
# Host, name, tag and digest together are shorter, whatever their algorithm.
MAX_REFERENCE_LENGTH = 1024

_PLATFORM = re.compile(r"all|[a-z0-9]+/[a-z0-9_]+(?:/[a-z0-9.]+)?")

# A note is no fault of the list: there is nothing to pull, or what is there is no image.
ProblemKind = Literal["error", "note"]


@dataclass(frozen=True, slots=True)
class ListEntry:
    """An image as the list writes it; `platforms` is empty where the list names none; "all" is every one."""

    line: int
    reference: str
    platforms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ListProblem:
    """What could not be read, why, and what helps."""

    line: int
    message: str
    kind: ProblemKind = "error"


@dataclass(frozen=True, slots=True)
class ImageList:
    """The images in the order of the list, each once, and the problems in the order of the lines.

    `format` names the formats that were found, more than one with a comma; "" if there was nothing to tell by.
    """

    format: str
    entries: tuple[ListEntry, ...]
    problems: tuple[ListProblem, ...]


class ParseResult:
    """Collects what the readers of the formats find."""

    def __init__(self) -> None:
        self._formats: dict[str, None] = {}
        self._entries: dict[tuple[str, tuple[str, ...]], ListEntry] = {}
        self._problems: list[ListProblem] = []
        self._omitted_count = 0

    @property
    def is_empty(self) -> bool:
        """Whether there was neither an image nor anything to say."""
        return not self._entries and not self._problems

    def add_format(self, name: str) -> None:
        """Note the format of what comes; a stream of documents may have several."""
        self._formats[name] = None

    def add_image(
        self, line: int, text: str, platforms: Iterable[str] = (), *, kind: ProblemKind = "error"
    ) -> None:
        """Add an image, unless it is there already; `kind` is the problem's if it is none."""
        reference = text.strip()
        wanted = tuple(dict.fromkeys(platforms))
        if complaint := _validate(reference, wanted):
            self.add_problem(line, complaint, kind)
        else:
            self._entries.setdefault((reference, wanted), ListEntry(line, reference, wanted))

    def add_problem(self, line: int, message: str, kind: ProblemKind = "error") -> None:
        """Add a problem; beyond `MAX_PROBLEMS` they are only counted."""
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(ListProblem(line, message[:MAX_MESSAGE_LENGTH], kind))
        else:
            self._omitted_count += 1

    def to_image_list(self) -> ImageList:
        """Return what was found."""
        problems = sorted(self._problems, key=lambda problem: problem.line)
        if self._omitted_count:
            problems.append(
                ListProblem(problems[-1].line, f"and {self._omitted_count} more problems")
            )
        return ImageList(", ".join(self._formats), tuple(self._entries.values()), tuple(problems))


def _validate(reference: str, platforms: tuple[str, ...]) -> str:
    """Return what is wrong with an image, "" if nothing is."""
    if "{{" in reference or "}}" in reference:
        return f"{reference[:60]!r} is a template: render it first, as with helm template"
    if len(reference) > MAX_REFERENCE_LENGTH:
        return (
            f"{reference[:60]!r}… is no image: it is longer than {MAX_REFERENCE_LENGTH} characters"
        )
    for platform in platforms:
        if _PLATFORM.fullmatch(platform) is None:
            return f"{platform[:60]!r} is not a platform: write it as linux/arm64 or linux/arm/v7"
    try:
        parse_image(reference)
    except InvalidReferenceError as error:
        return str(error)
    return ""
