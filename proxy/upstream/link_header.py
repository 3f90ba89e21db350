"""Parse `Link` headers (RFC 8288 section 3), and what clients follow in spite of it. Pure.

Targets and quoted strings may contain commas and semicolons, names of parameters and relation types
match in any case, and a header may hold several links. A link without a relation type counts if no
other has the right one, and a lone URL may lack its angle brackets. What does not parse is skipped.
"""

import re
from collections.abc import Iterable, Iterator

# Characters of one header that are parsed; a link of a registry is much shorter.
MAX_LINK_LENGTH = 16 << 10

_TARGET = re.compile(r"<([^<>]*)>")
_QUOTED = r'"((?:[^"\\]|\\.)*)"'
_PARAMETER = re.compile(rf"\s*;\s*([^\s=;,\"]*)\s*(?:=\s*(?:{_QUOTED}|([^\s;,\"]*)))?[^;,\"]*")


_BARE_TARGET = re.compile(r"\s*((?:https?://|/|\?)[^\s;<>]*)(.*)", re.DOTALL)


def find_link(values: Iterable[str], relation: str) -> str | None:
    """Return the target of the first link with this relation type; None if there is none."""
    unrelated = None
    for value in values:
        for target, relations in _parse_links(value[:MAX_LINK_LENGTH]):
            if relations is None:
                unrelated = target if unrelated is None else unrelated
            elif relation in relations.replace("'", " ").casefold().split():
                return target
    return unrelated


def _parse_links(value: str) -> Iterator[tuple[str, str | None]]:
    """Yield the target of each link, and its relation types as they are written, None if absent."""
    if bare := _BARE_TARGET.fullmatch(value):
        value = f"<{bare[1]}>{bare[2]}"
    position = 0
    while link := _TARGET.search(value, position):
        relations: str | None = None
        position = link.end()
        while parameter := _PARAMETER.match(value, position):
            name, quoted, plain = parameter.groups()
            if name.casefold() == "rel" and relations is None:  # only the first counts
                relations = (plain or "") if quoted is None else quoted
            position = parameter.end()
        yield link[1].strip(), relations
