"""The lists of images that people already have, read by what is in them. PURE.

`parse_list` never raises, however wrong the text is: a bad entry is named by its line, and the rest goes on.
"""

import re

from proxy.preload.lists.compose import is_compose, read_compose
from proxy.preload.lists.dockerfile import is_dockerfile, read_dockerfile
from proxy.preload.lists.documents import Items, Mapping, Node, Scalar, read_documents
from proxy.preload.lists.kubernetes import is_kubernetes, read_kubernetes
from proxy.preload.lists.lock import is_lock, read_lock
from proxy.preload.lists.plain import read_plain
from proxy.preload.lists.result import Entry, Found, ImageList, Problem
from proxy.preload.lists.sync_tools import (
    is_regsync,
    is_skopeo,
    is_zot,
    read_regsync,
    read_skopeo,
    read_zot,
)

__all__ = ["MAX_LINES", "MAX_TEXT", "Entry", "ImageList", "Problem", "parse_list"]

# The output of `helm template` for whole platforms stays below; MAX_TEXT is in characters.
MAX_TEXT = 8 * 2**20
MAX_LINES = 500_000

# How a document of YAML or JSON may begin; a plain list has images from the first line on.
_YAML = re.compile(
    r"---|%YAML\s|\s*[{\[]|\s*-(?:\s|$)|\s*(?:\"[^\"]*\"|'[^']*'|[^\s#\"']+)\s*:(?:\s|$)"
)

_MAPPINGS = (
    (is_lock, read_lock),
    (is_kubernetes, read_kubernetes),
    (is_compose, read_compose),
    (is_regsync, read_regsync),
    (is_zot, read_zot),
    (is_skopeo, read_skopeo),
)
_UNKNOWN = (
    "this YAML is none of: docker compose, Kubernetes, skopeo sync, regsync, hauler, zot, "
    "a list of images; for a chart give the output of helm template"
)

# What YAML takes for the end of a line and editors do not, and what no text should hold.
_SPACES = dict.fromkeys(map(ord, "\x85\u2028\u2029"), " ") | {0xFEFF: None}


def parse_list(text: str) -> ImageList:
    """Return the images that `text` names, in whichever format; lines are counted from 1."""
    found = Found()
    lines = _lines(text[: MAX_TEXT + 1])
    if len(text) > MAX_TEXT or len(lines) > MAX_LINES:
        found.problem(
            1, f"more than {MAX_TEXT // 2**20} MiB of text, or {MAX_LINES} lines: split the list"
        )
    else:
        _read(lines, found)
    return found.result()


def _read(lines: list[str], found: Found) -> None:
    """Read the lines as what the first one that is no comment says they are."""
    first = next((line for line in lines if line.strip() and line.lstrip()[0] != "#"), "")
    if is_dockerfile(first):
        read_dockerfile(lines, found)
    elif _YAML.match(first):
        for document in read_documents(_without_report(lines, first)):
            if isinstance(document, Problem):
                found.problem(document.line, document.message)
            else:
                _read_document(document, found)
    elif first:
        read_plain(lines, found)
    if found.is_empty:
        found.problem(1, "the list names no image")


def _lines(text: str) -> list[str]:
    """Return the lines as an editor counts them."""
    # Half of a surrogate pair is no character, and YAML's parser could not take it.
    sound = text.encode("utf-8", "replace").decode()
    return sound.translate(_SPACES).replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _without_report(lines: list[str], first: str) -> list[str]:
    """Blank what `helm install --dry-run` says around the manifests."""
    if not first.startswith("NAME:") or "MANIFEST:" not in lines:
        return lines
    begin = lines.index("HOOKS:" if "HOOKS:" in lines else "MANIFEST:")
    end = lines.index("NOTES:") if "NOTES:" in lines else len(lines)
    headings = {"HOOKS:", "MANIFEST:"}
    return [
        line if begin < number < end and line not in headings else ""
        for number, line in enumerate(lines)
    ]


def _read_document(document: Node, found: Found) -> None:
    """Read a document with the first reader that knows it."""
    if isinstance(document, Items):
        found.format("YAML list")
        for node in document.nodes:
            if isinstance(node, Scalar):
                found.image(node.line, node.text)
            else:
                found.problem(node.line, _UNKNOWN)
    elif isinstance(document, Mapping):
        read = next((read for is_it, read in _MAPPINGS if is_it(document)), _read_unknown)
        read(document, found)
    elif document.text:
        _read_unknown(document, found)


def _read_unknown(document: Node, found: Found) -> None:
    found.problem(document.line, _UNKNOWN)
