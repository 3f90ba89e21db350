"""`WWW-Authenticate`, parsed (RFC 9110 section 11.6.1, RFC 6750 section 3). PURE.

Header values may hold several challenges, and quoted values may hold commas, so splitting on
commas is wrong. What does not parse is skipped: the parser never raises.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_TCHARS = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# A list may have empty elements (RFC 9110 section 5.6.1.2).
_PARAMETER = re.compile(
    rf'[\s,]*({_TCHARS})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TCHARS}[^\s,]*))\s*(?=,|$)'
)
_TOKEN68 = re.compile(r"\s+[A-Za-z0-9._~+/-]+=*\s*(?=,|$)")
_SCHEME = re.compile(rf"[\s,]*({_TCHARS})(?=[\s,]|$)")
_ESCAPED = re.compile(r"\\(.)")

# A registry's challenge is short; a parser that is fed more by a stranger has better things to do.
MAX_HEADER_LENGTH = 8192


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge: the scheme in lower case, the parameters by lower-case name."""

    scheme: str
    parameters: Mapping[str, str]


def parse(values: Iterable[str]) -> list[Challenge]:
    """Return the challenges in the `WWW-Authenticate` header values, in their order."""
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
