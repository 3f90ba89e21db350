"""Parse `Link` headers (RFC 8288 section 3). PURE.

Targets and quoted strings may contain commas and semicolons, names of parameters and relation types
match in any case, and a header may hold several links. What does not parse is skipped.
"""

import re
from collections.abc import Iterable, Iterator

# Characters of one header that are parsed; a link of a registry is much shorter.
MAX_LINK_LENGTH = 16 << 10

_TARGET = re.compile(r"<([^<>]*)>")
_QUOTED = r'"((?:[^"\\]|\\.)*)"'
_PARAMETER = re.compile(rf"\s*;\s*([^\s=;,\"]*)\s*(?:=\s*(?:{_QUOTED}|([^\s;,\"]*)))?[^;,\"]*")


def find_link(values: Iterable[str], relation: str) -> str | None:
    """Return the target of the first link with this relation type; None if there is none."""
    for value in values:
        for target, relations in _parse_links(value[:MAX_LINK_LENGTH]):
            if relation in relations.casefold().split():
                return target
    return None


def _parse_links(value: str) -> Iterator[tuple[str, str]]:
    """Yield the target of each link, and its relation types as they are written."""
    position = 0
    while link := _TARGET.search(value, position):
        relations: str | None = None
        position = link.end()
        while parameter := _PARAMETER.match(value, position):
            name, quoted, plain = parameter.groups()
            if name.casefold() == "rel" and relations is None:  # only the first counts
                relations = plain if quoted is None else quoted
            position = parameter.end()
        yield link[1].strip(), relations or ""
