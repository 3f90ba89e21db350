"""The lists of images that people already have, read by what is in them. PURE.

`parse_list` never raises, however wrong the text is: a bad entry is named by its line, and the rest goes on.
"""

import re

from proxy.preload.lists.compose import is_compose, read_compose
from proxy.preload.lists.dockerfile import is_dockerfile, read_dockerfile
from proxy.preload.lists.documents import (
    MappingNode,
    ScalarNode,
    SequenceNode,
    YamlNode,
    read_documents,
)
from proxy.preload.lists.kubernetes import is_kubernetes, read_kubernetes
from proxy.preload.lists.lock import is_lock, read_lock
from proxy.preload.lists.plain import read_plain
from proxy.preload.lists.result import ImageList, ListEntry, ListProblem, ParseResult
from proxy.preload.lists.sync_tools import (
    is_regsync,
    is_skopeo,
    is_zot,
    read_regsync,
    read_skopeo,
    read_zot,
)

__all__ = ["MAX_CHARACTERS", "MAX_LINES", "ImageList", "ListEntry", "ListProblem", "parse_list"]

# The output of `helm template` for whole platforms stays below; MAX_TEXT is in characters.
MAX_CHARACTERS = 8 * 2**20
MAX_LINES = 500_000

# How a document of YAML or JSON may begin; a plain list has images from the first line on.
_YAML_START = re.compile(
    r"---|%YAML\s|\s*[{\[]|\s*-(?:\s|$)|\s*(?:\"[^\"]*\"|'[^']*'|[^\s#\"']+)\s*:(?:\s|$)"
)

_MAPPING_FORMATS = (
    (is_lock, read_lock),
    (is_kubernetes, read_kubernetes),
    (is_compose, read_compose),
    (is_regsync, read_regsync),
    (is_zot, read_zot),
    (is_skopeo, read_skopeo),
)
_UNKNOWN_FORMAT = (
    "this YAML is none of: docker compose, Kubernetes, skopeo sync, regsync, hauler, zot, "
    "a list of images; for a chart give the output of helm template"
)

# What YAML takes for the end of a line and editors do not, and what no text should hold.
_CHARACTER_REPLACEMENTS = dict.fromkeys(map(ord, "\x85\u2028\u2029"), " ") | {0xFEFF: None}


def parse_list(text: str) -> ImageList:
    """Return the images that `text` names, in whichever format; lines are counted from 1."""
    found = ParseResult()
    lines = _split_lines(text[: MAX_CHARACTERS + 1])
    if len(text) > MAX_CHARACTERS or len(lines) > MAX_LINES:
        found.add_problem(
            1,
            f"more than {MAX_CHARACTERS // 2**20} MiB of text, or {MAX_LINES} lines: split the list",
        )
    else:
        _read_lines(lines, found)
    return found.to_image_list()


def _read_lines(lines: list[str], result: ParseResult) -> None:
    """Read the lines as what the first one that is no comment says they are."""
    first = next((line for line in lines if line.strip() and line.lstrip()[0] != "#"), "")
    if is_dockerfile(first):
        read_dockerfile(lines, result)
    elif _YAML_START.match(first):
        for document in read_documents(_blank_helm_report(lines, first)):
            if isinstance(document, ListProblem):
                result.add_problem(document.line, document.message)
            else:
                _read_document(document, result)
    elif first:
        read_plain(lines, result)
    if result.is_empty:
        result.add_problem(1, "the list names no image")


def _split_lines(text: str) -> list[str]:
    """Return the lines as an editor counts them."""
    # Half of a surrogate pair is no character, and YAML's parser could not take it.
    sound = text.encode("utf-8", "replace").decode()
    return (
        sound.translate(_CHARACTER_REPLACEMENTS)
        .replace("\r\n", "\n")
        .replace("\r", "\n")
        .split("\n")
    )


def _blank_helm_report(lines: list[str], first_line: str) -> list[str]:
    """Blank what `helm install --dry-run` says around the manifests."""
    if not first_line.startswith("NAME:") or "MANIFEST:" not in lines:
        return lines
    begin = lines.index("HOOKS:" if "HOOKS:" in lines else "MANIFEST:")
    end = lines.index("NOTES:") if "NOTES:" in lines else len(lines)
    headings = {"HOOKS:", "MANIFEST:"}
    return [
        line if begin < number < end and line not in headings else ""
        for number, line in enumerate(lines)
    ]


def _read_document(document: YamlNode, result: ParseResult) -> None:
    """Read a document with the first reader that knows it."""
    if isinstance(document, SequenceNode):
        result.add_format("YAML list")
        for node in document.nodes:
            if isinstance(node, ScalarNode):
                result.add_image(node.line, node.text)
            else:
                result.add_problem(node.line, _UNKNOWN_FORMAT)
    elif isinstance(document, MappingNode):
        read = next((read for is_it, read in _MAPPING_FORMATS if is_it(document)), _reject_unknown)
        read(document, result)
    elif document.text:
        _reject_unknown(document, result)


def _reject_unknown(document: YamlNode, result: ParseResult) -> None:
    result.add_problem(document.line, _UNKNOWN_FORMAT)
