"""YAML and JSON documents as trees of nodes with line numbers. Pure.

The trees are built from the parser's events, not by PyYAML's composer. So size, depth and number
are bounded while a tree grows, nothing recurses, and no tag constructs an object. An alias is the
same node as its anchor: a caller that visits each node once is safe from alias bombs.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import yaml
from yaml import CSafeLoader

from proxy.preload.lists.result import ListProblem

# The largest charts give a few hundred thousand nodes in some megabytes of `helm template`.
MAX_NODES = 1_000_000
MAX_NESTING = 100
MAX_DOCUMENTS = 10_000
# Mappings that one lookup visits through merge keys (`<<: *base`).
MAX_MERGES = 100

_NULL_VALUES = {"", "~", "null", "Null", "NULL"}
_DOCUMENT_START = re.compile(r"---(?=\s|$)")
_YAML_DIRECTIVE = re.compile(r"%(?:YAML|TAG)\s")

# To YAML, `image: {{ … }}` has a mapping as its value, and `{{- if … }}` is invalid.
_TEMPLATE_LINE = re.compile(r"\s*\{\{.*\}\}\s*")
_TEMPLATE_VALUE = re.compile(r"(\s*(?:- +)*[\w./-]+: +|\s*(?:- +)+)(\{\{.*)")


@dataclass(slots=True, eq=False)
class ScalarNode:
    """A scalar as it is written, so `1.10` stays `1.10`; null is ""."""

    line: int
    text: str


@dataclass(slots=True, eq=False)
class SequenceNode:
    """A sequence."""

    line: int
    nodes: list["YamlNode"] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class MappingNode:
    """A mapping. Keys that are not scalars are dropped; the last of equal keys counts."""

    line: int
    fields: dict[str, "YamlNode"] = field(default_factory=dict)

    def get(self, key: str) -> "YamlNode | None":
        """Return the value of `key`, its own before one merged with `<<`."""
        queue: list[YamlNode] = [self]
        seen: set[int] = set()
        while queue and len(seen) < MAX_MERGES:
            node = queue.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(node, SequenceNode):
                queue += reversed(node.nodes[:MAX_MERGES])
            elif isinstance(node, MappingNode):
                if key in node.fields:
                    return node.fields[key]
                if "<<" in node.fields:
                    queue.append(node.fields["<<"])
        return None

    def get_text(self, key: str) -> str:
        """Return the value of `key` if it is a scalar, else ""."""
        value = self.get(key)
        return value.text if isinstance(value, ScalarNode) else ""

    def get_mapping(self, key: str) -> "MappingNode":
        """Return the value of `key` if it is a mapping, else an empty one."""
        value = self.get(key)
        return value if isinstance(value, MappingNode) else MappingNode(self.line)

    def get_items(self, key: str) -> "list[YamlNode]":
        """Return the items of `key` if its value is a sequence, else an empty list."""
        value = self.get(key)
        return value.nodes if isinstance(value, SequenceNode) else []

    def get_texts(self, key: str) -> list[str]:
        """Return the scalars among the items of `key`."""
        return [item.text for item in self.get_items(key) if isinstance(item, ScalarNode)]


YamlNode = ScalarNode | SequenceNode | MappingNode


class _InvalidDocumentError(Exception):
    """A document cannot be read."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def read_documents(lines: Sequence[str]) -> Iterator[YamlNode | ListProblem]:
    """Yield each document of a stream, or a problem in place of one that cannot be read."""
    composer = _Composer()
    for count, (first, text) in enumerate(_split_documents(lines)):
        if count == MAX_DOCUMENTS:
            yield ListProblem(first, f"more than {MAX_DOCUMENTS} documents: split the list")
            return
        try:
            yield from composer.read(first, text)
        except _InvalidDocumentError as error:
            yield ListProblem(error.line, f"the document at line {first} cannot be read: {error}")
        if composer.is_exhausted:
            yield ListProblem(first, f"more than {MAX_NODES} YAML values: split the list")
            return


def _split_documents(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield the number of the first line of each document, and its text.

    `---` at the beginning of a line is always a boundary (YAML 1.2.2, section 9.1.2).
    """
    starts = [number for number, line in enumerate(lines) if _DOCUMENT_START.match(line)]
    for start, end in zip([0, *starts], [*starts, len(lines)], strict=True):
        if start < end:
            yield start + 1, "\n".join(map(_sanitize_line, lines[start:end]))


def _sanitize_line(line: str) -> str:
    """Return the line with template expressions quoted, or blank if it is a directive."""
    if _YAML_DIRECTIVE.match(line) or _TEMPLATE_LINE.fullmatch(line):
        return ""
    if value := _TEMPLATE_VALUE.fullmatch(line):
        quoted = value[2].replace("'", "''")
        return f"{value[1]}'{quoted}'"
    return line


class _Composer:
    """Builds trees from the parser's events; `MAX_NODES` bounds all documents together."""

    def __init__(self) -> None:
        self._remaining_nodes = MAX_NODES

    @property
    def is_exhausted(self) -> bool:
        """Whether there were more than `MAX_NODES` nodes."""
        return self._remaining_nodes <= 0

    def read(self, first_line: int, text: str) -> Iterator[YamlNode]:
        """Yield the documents in `text`. Raises `_InvalidDocumentError`."""
        loader = CSafeLoader(text)
        try:
            while not self.is_exhausted and (event := loader.get_event()) is not None:
                if isinstance(event, yaml.DocumentStartEvent):
                    self._start_document(first_line)
                elif isinstance(event, yaml.DocumentEndEvent):
                    yield self._root.nodes[0]
                else:
                    self._handle_event(event)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            reason = getattr(error, "problem", None) or "a character that YAML forbids"
            # Something missing at the end is reported on the line after the last one.
            line = min(mark.line, text.count("\n")) if mark else 0
            raise _InvalidDocumentError(first_line + line, f"invalid YAML: {reason}") from error
        finally:
            loader.dispose()

    def _start_document(self, first_line: int) -> None:
        self._first_line = first_line
        self._anchors: dict[str, YamlNode] = {}
        self._root = SequenceNode(first_line)
        # The open collections, and for each the key that waits for its value.
        self._open_collections: list[SequenceNode | MappingNode] = [self._root]
        self._pending_keys: list[YamlNode | None] = [None]

    def _handle_event(self, event: yaml.Event) -> None:
        """Start or end the node of an event. Raises `_InvalidDocumentError`."""
        if isinstance(event, yaml.CollectionEndEvent):
            self._open_collections.pop()
            self._pending_keys.pop()
        elif isinstance(event, yaml.NodeEvent):
            self._remaining_nodes -= 1
            node = self._make_node(event)
            self._append_node(node)
            if isinstance(event, yaml.CollectionStartEvent):
                assert not isinstance(node, ScalarNode)
                self._open_collections.append(node)
                self._pending_keys.append(None)
                if len(self._open_collections) > MAX_NESTING:
                    raise _InvalidDocumentError(
                        node.line, f"it is nested more than {MAX_NESTING} levels deep"
                    )

    def _make_node(self, event: yaml.NodeEvent) -> YamlNode:
        line = self._first_line + (event.start_mark.line if event.start_mark else 0)
        anchor = event.anchor or ""
        if isinstance(event, yaml.AliasEvent):
            if anchor not in self._anchors:
                raise _InvalidDocumentError(line, f"*{anchor[:60]} refers to no earlier anchor")
            return self._anchors[anchor]
        node: YamlNode
        if isinstance(event, yaml.ScalarEvent):
            is_null = not event.style and event.value in _NULL_VALUES
            node = ScalarNode(line, "" if is_null else event.value)
        else:
            node = (
                SequenceNode(line)
                if isinstance(event, yaml.SequenceStartEvent)
                else MappingNode(line)
            )
        if anchor:
            self._anchors[anchor] = node
        return node

    def _append_node(self, node: YamlNode) -> None:
        """Add a node to the innermost open collection; a mapping gets keys and values in turn."""
        parent, key = self._open_collections[-1], self._pending_keys[-1]
        if isinstance(parent, SequenceNode):
            parent.nodes.append(node)
        elif key is None:
            self._pending_keys[-1] = node
        else:
            self._pending_keys[-1] = None
            if isinstance(key, ScalarNode):
                parent.fields[key.text] = node
