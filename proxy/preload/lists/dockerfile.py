"""Dockerfiles, with the images that a build pulls (Dockerfile reference). Pure.

These are the images of `FROM`, `COPY --from` and `RUN --mount=from`, and the frontend that
`# syntax=` names.
"""

import re
from collections.abc import Iterator, Sequence

from proxy.preload.lists.result import ParseResult
from proxy.preload.lists.variables import VariableError, substitute

_DIRECTIVE = re.compile(r"#\s*(\w+)\s*=\s*(\S+)\s*")
_INSTRUCTION = re.compile(r"\s*([A-Za-z]+)\s+(.*)", re.DOTALL)
_HEREDOC = re.compile(r"(?:^|\s)\d*<<(-?)([\"']?)([A-Za-z_][\w.]*)\2(?=[\s;&|)>]|$)")
# `COPY --from=image` and `RUN --mount=type=bind,from=image,target=/x`.
_FROM_OPTION = re.compile(r"(?:^|\s)--(?:mount=(?:[^\s,]*,)*?)?from=([^\s,]+)")
_ARG = re.compile(r"(?:^|\s)(\w+)=(\"[^\"]*\"|'[^']*'|\S*)")

_FIRST_INSTRUCTION = re.compile(r"\s*(?:FROM|ARG)\s", re.IGNORECASE)


def is_dockerfile(first_line: str) -> bool:
    """Tell by the first line after comments: only ARG may precede FROM."""
    return _FIRST_INSTRUCTION.match(first_line + "\n") is not None


def read_dockerfile(lines: Sequence[str], result: ParseResult) -> None:
    """Read the images of all stages, including those that a build may skip."""
    result.add_format("Dockerfile")
    escape = "\\"
    number = 0
    while directive := _DIRECTIVE.fullmatch(lines[number]):
        number += 1
        if directive[1].lower() == "syntax":
            result.add_image(number, directive[2])
        elif directive[1].lower() == "escape" and directive[2] in {"\\", "`"}:
            escape = directive[2]
    state = _BuildState(result)
    for number, instruction in _join_instructions(lines, escape, result):
        if parts := _INSTRUCTION.fullmatch(instruction):
            state.read(number, parts[1].upper(), parts[2])


def _join_instructions(
    lines: Sequence[str], escape: str, result: ParseResult
) -> Iterator[tuple[int, str]]:
    """Yield each instruction with the number of its first line.

    Continuation lines are joined, here-documents are skipped.
    """
    numbered = enumerate(lines, 1)
    for number, line in numbered:
        if _is_blank_or_comment(line):
            continue
        text = line.rstrip()
        parts = []
        while text.endswith(escape) and not text.endswith(escape * 2):
            parts.append(text[:-1])
            text = next(
                (more.rstrip() for _, more in numbered if not _is_blank_or_comment(more)), ""
            )
        instruction = "".join([*parts, text])
        if instruction.lstrip()[:4].upper().startswith(("RUN", "COPY", "ADD")):
            for dash, _, word in _HEREDOC.findall(instruction):
                if not any((more.lstrip("\t") if dash else more) == word for _, more in numbered):
                    result.add_problem(
                        number, f"the here-document {word[:60]} has no end: the rest is not read"
                    )
        yield number, instruction


def _is_blank_or_comment(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


class _BuildState:
    """The build before an instruction: its arguments and the names of its stages."""

    def __init__(self, result: ParseResult) -> None:
        self._result = result
        self._arguments: dict[str, str] = {}
        self._stage_names: set[str] = set()
        self._is_in_stage = False

    def read(self, line: int, name: str, rest: str) -> None:
        """Read one instruction; ignore those that name no image."""
        words = rest.split()
        count = next((n for n, word in enumerate(words) if not word.startswith("--")), len(words))
        options = words[:count]
        if name == "FROM":
            self._is_in_stage = True
            self._read_from(line, options, words[count:])
        elif name == "ARG" and not self._is_in_stage:
            self._read_arg(rest)
        elif name in {"ADD", "COPY", "RUN"}:
            for source in _FROM_OPTION.findall(" ".join(options)):
                self._add_image(line, source)

    def _read_from(self, line: int, options: list[str], words: list[str]) -> None:
        """Read `FROM [--platform=…] image [AS stage]`."""
        if not words:
            self._result.add_problem(line, "FROM names no image")
            return
        platforms: tuple[str, ...] = ()
        for option in options:
            if option.startswith("--platform="):
                platforms = self._parse_platform(option.removeprefix("--platform="))
        try:
            image = substitute(words[0].strip("\"'"), self._arguments)
        except VariableError as error:
            self._result.add_problem(line, str(error))
        else:
            self._add_image(line, image, platforms)
        if len(words) == 3 and words[1].lower() == "as":
            self._stage_names.add(words[2].lower())

    def _parse_platform(self, text: str) -> tuple[str, ...]:
        """Return the platform, or none if only the builder knows it, as with `$BUILDPLATFORM`."""
        try:
            return (substitute(text, self._arguments),)
        except VariableError:
            return ()

    def _read_arg(self, text: str) -> None:
        for name, value in _ARG.findall(text):
            try:
                self._arguments[name] = substitute(value.strip("\"'"), self._arguments)
            except VariableError:
                # A problem only where the argument is used.
                self._arguments.pop(name, None)

    def _add_image(self, line: int, text: str, platforms: tuple[str, ...] = ()) -> None:
        """Add an image, unless it is `scratch` or an earlier stage, by name or number."""
        if text != "scratch" and not text.isdecimal() and text.lower() not in self._stage_names:
            self._result.add_image(line, text, platforms)
