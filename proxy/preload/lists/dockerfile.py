"""The images that a Dockerfile builds on (Dockerfile reference). PURE.

They are those of `FROM`, of `COPY --from` and `RUN --mount=from`, and the frontend that `# syntax=`
names, for the builder pulls it like any other.
"""

import re
from collections.abc import Iterator, Sequence

from proxy.preload.lists.result import Found
from proxy.preload.lists.variables import VariableError, substitute

_DIRECTIVE = re.compile(r"#\s*(\w+)\s*=\s*(\S+)\s*")
_INSTRUCTION = re.compile(r"\s*([A-Za-z]+)\s+(.*)", re.DOTALL)
_HEREDOC = re.compile(r"(?:^|\s)\d*<<(-?)([\"']?)([A-Za-z_][\w.]*)\2(?=[\s;&|)>]|$)")
# `COPY --from=image` and `RUN --mount=type=bind,from=image,target=/x`.
_SOURCE = re.compile(r"(?:^|\s)--(?:mount=(?:[^\s,]*,)*?)?from=([^\s,]+)")
_ARG = re.compile(r"(?:^|\s)(\w+)=(\"[^\"]*\"|'[^']*'|\S*)")

_IS_DOCKERFILE = re.compile(r"\s*(?:FROM|ARG)\s", re.IGNORECASE)


def is_dockerfile(first: str) -> bool:
    """Tell by the first line that is no comment: nothing but ARG may stand before FROM."""
    return _IS_DOCKERFILE.match(first + "\n") is not None


def read_dockerfile(lines: Sequence[str], found: Found) -> None:
    """Read the images of all stages, also of those that a build may leave out."""
    found.format("Dockerfile")
    escape = "\\"
    number = 0
    while directive := _DIRECTIVE.fullmatch(lines[number]):
        number += 1
        if directive[1].lower() == "syntax":
            found.image(number, directive[2])
        elif directive[1].lower() == "escape" and directive[2] in {"\\", "`"}:
            escape = directive[2]
    stages = _Stages(found)
    for number, instruction in _instructions(lines, escape, found):
        if parts := _INSTRUCTION.fullmatch(instruction):
            stages.read(number, parts[1].upper(), parts[2])


def _instructions(lines: Sequence[str], escape: str, found: Found) -> Iterator[tuple[int, str]]:
    """Yield each instruction on one line, without here-documents, and the number of its first."""
    numbered = enumerate(lines, 1)
    for number, line in numbered:
        if _says_nothing(line):
            continue
        text = line.rstrip()
        parts = []
        while text.endswith(escape) and not text.endswith(escape * 2):
            parts.append(text[:-1])
            text = next((more.rstrip() for _, more in numbered if not _says_nothing(more)), "")
        instruction = "".join([*parts, text])
        if instruction.lstrip()[:4].upper().startswith(("RUN", "COPY", "ADD")):
            for dash, _, word in _HEREDOC.findall(instruction):
                if not any((more.lstrip("\t") if dash else more) == word for _, more in numbered):
                    found.problem(
                        number, f"no line ends the here-document {word[:60]}: the rest is not read"
                    )
        yield number, instruction


def _says_nothing(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


class _Stages:
    """What is known of the build at an instruction: the arguments and the stages before it."""

    def __init__(self, found: Found) -> None:
        self._found = found
        self._arguments: dict[str, str] = {}
        self._stages: set[str] = set()
        self._in_stage = False

    def read(self, line: int, name: str, rest: str) -> None:
        """Read one instruction; those that name no image are passed over."""
        words = rest.split()
        count = next((n for n, word in enumerate(words) if not word.startswith("--")), len(words))
        options = words[:count]
        if name == "FROM":
            self._in_stage = True
            self._from(line, options, words[count:])
        elif name == "ARG" and not self._in_stage:
            self._argument(rest)
        elif name in {"ADD", "COPY", "RUN"}:
            for source in _SOURCE.findall(" ".join(options)):
                self._image(line, source)

    def _from(self, line: int, options: list[str], words: list[str]) -> None:
        """Read `FROM [--platform=…] image [AS stage]`."""
        if not words:
            self._found.problem(line, "FROM names no image")
            return
        platforms: tuple[str, ...] = ()
        for option in options:
            if option.startswith("--platform="):
                platforms = self._platforms(option.removeprefix("--platform="))
        try:
            image = substitute(words[0].strip("\"'"), self._arguments)
        except VariableError as error:
            self._found.problem(line, str(error))
        else:
            self._image(line, image, platforms)
        if len(words) == 3 and words[1].lower() == "as":
            self._stages.add(words[2].lower())

    def _platforms(self, text: str) -> tuple[str, ...]:
        """Return the platform; none where the builder gives it, as with `$BUILDPLATFORM`."""
        try:
            return (substitute(text, self._arguments),)
        except VariableError:
            return ()

    def _argument(self, text: str) -> None:
        for name, value in _ARG.findall(text):
            try:
                self._arguments[name] = substitute(value.strip("\"'"), self._arguments)
            except VariableError:
                # Who uses it is told; that it is declared hurts nobody.
                self._arguments.pop(name, None)

    def _image(self, line: int, text: str, platforms: tuple[str, ...] = ()) -> None:
        """Add an image, unless it is an earlier stage, by name or number, or nothing at all."""
        if text != "scratch" and not text.isdecimal() and text.lower() not in self._stages:
            self._found.image(line, text, platforms)
