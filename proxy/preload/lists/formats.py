"""`parse_list`: recognises the format of an image list and reads it. Pure.

It never raises, whatever the text is: a bad entry becomes a problem with its line, and reading goes
on. To add a format, write a module with `is_<format>` and `read_<format>`, and add them to a table
here.
"""

import re

from proxy.preload.lists.compose import is_compose, read_compose
from proxy.preload.lists.dockerfile import is_dockerfile, read_dockerfile
from proxy.preload.lists.kubernetes import is_kubernetes, read_kubernetes
from proxy.preload.lists.lock import is_lock, read_lock
from proxy.preload.lists.plain import read_plain
from proxy.preload.lists.result import ImageList, ListProblem, ParseResult
from proxy.preload.lists.sync_tools import (
    is_regsync,
    is_skopeo,
    is_zot,
    read_regsync,
    read_skopeo,
    read_zot,
)
from proxy.preload.lists.yaml_documents import (
    MappingNode,
    ScalarNode,
    SequenceNode,
    YamlNode,
    read_documents,
)

# In characters: more than `helm template` prints for whole platforms.
MAX_CHARACTERS = 8 * 2**20
MAX_LINES = 500_000

# Formats in YAML or JSON whose document is a mapping; the first that matches reads it.
_MAPPING_FORMATS = (
    (is_lock, read_lock),
    (is_kubernetes, read_kubernetes),
    (is_compose, read_compose),
    (is_regsync, read_regsync),
    (is_zot, read_zot),
    (is_skopeo, read_skopeo),
)
_UNKNOWN_FORMAT = (
    "this YAML is none of: docker compose, Kubernetes, skopeo sync, regsync, hauler, "
    "a lock file, a list of images; for a chart pass the output of helm template"
)

# The first line of a YAML or JSON document, as opposed to that of a plain list.
_YAML_START = re.compile(
    r"---|%YAML\s|\s*[{\[]|\s*-(?:\s|$)|\s*(?:\"[^\"]*\"|'[^']*'|[^\s#\"']+)\s*:(?:\s|$)"
)

# Line separators of YAML that editors do not count as such, and the byte order mark.
_CHARACTER_REPLACEMENTS = dict.fromkeys(map(ord, "\x85\u2028\u2029"), " ") | {0xFEFF: None}


def parse_list(text: str) -> ImageList:
    """Return the images in `text`, in any of the formats; lines are counted from 1."""
    result = ParseResult()
    lines = _split_lines(text[: MAX_CHARACTERS + 1])
    if len(text) > MAX_CHARACTERS or len(lines) > MAX_LINES:
        size = f"more than {MAX_CHARACTERS // 2**20} MiB of text, or {MAX_LINES} lines"
        result.add_problem(1, f"{size}: split the list")
    else:
        _read_lines(lines, result)
    return result.to_image_list()


def _read_lines(lines: list[str], result: ParseResult) -> None:
    """Read the lines in the format that the first one after comments shows."""
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
        result.add_problem(1, "the list contains no images")


def _split_lines(text: str) -> list[str]:
    """Return the lines as an editor counts them."""
    # The YAML parser fails on lone surrogates.
    valid = text.encode("utf-8", "replace").decode()
    return (
        valid.translate(_CHARACTER_REPLACEMENTS)
        .replace("\r\n", "\n")
        .replace("\r", "\n")
        .split("\n")
    )


def _blank_helm_report(lines: list[str], first_line: str) -> list[str]:
    """Blank the lines that `helm install --dry-run` prints around the manifests."""
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
    """Read a YAML document: a list of images, or one of the mapping formats."""
    if isinstance(document, SequenceNode):
        result.add_format("YAML list")
        for node in document.nodes:
            if isinstance(node, ScalarNode):
                result.add_image(node.line, node.text)
            else:
                result.add_problem(node.line, _UNKNOWN_FORMAT)
    elif isinstance(document, MappingNode):
        for is_format, read_format in _MAPPING_FORMATS:
            if is_format(document):
                read_format(document, result)
                return
        result.add_problem(document.line, _UNKNOWN_FORMAT)
    elif document.text:
        result.add_problem(document.line, _UNKNOWN_FORMAT)
