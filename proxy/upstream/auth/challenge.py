"""Parse `WWW-Authenticate` (RFC 9110 section 11.6.1, RFC 6750 section 3). Pure.

A value may contain several challenges, and quoted strings may contain commas, so splitting at
commas would be wrong. Text that does not parse is skipped: the parser never raises.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Characters of a value that are parsed; the challenges of registries are much shorter.
MAX_HEADER_LENGTH = 8192

_TCHARS = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# The commas: lists may have empty elements (RFC 9110 section 5.6.1.2).
_PARAMETER = re.compile(
    rf'[\s,]*({_TCHARS})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TCHARS}[^\s,]*))\s*(?=,|$)'
)
_TOKEN68 = re.compile(r"\s+[A-Za-z0-9._~+/-]+=*\s*(?=,|$)")
_SCHEME = re.compile(rf"[\s,]*({_TCHARS})(?=[\s,]|$)")
_ESCAPED = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge, with the scheme and the names of parameters in lower case."""

    scheme: str
    parameters: Mapping[str, str]


def parse(values: Iterable[str]) -> list[Challenge]:
    """Return the challenges in the given `WWW-Authenticate` values, in order."""
    return [challenge for value in values for challenge in _parse_value(value[:MAX_HEADER_LENGTH])]


def _parse_value(value: str) -> list[Challenge]:
    challenges: list[Challenge] = []
    position = 0
    while scheme := _SCHEME.match(value, position):
        parameters: dict[str, str] = {}
        position = scheme.end()
        if token68 := _TOKEN68.match(value, position):
            position = token68.end()
        while parameter := _PARAMETER.match(value, position):
            name, quoted, plain = parameter.groups()
            text = plain if quoted is None else _ESCAPED.sub(r"\1", quoted)
            parameters.setdefault(name.lower(), text)
            position = parameter.end()
        challenges.append(Challenge(scheme[1].lower(), parameters))
    return challenges
