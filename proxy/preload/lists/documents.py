"""YAML and JSON as trees that know their lines. PURE.

The trees are built from the parser's events and not by the library's composer: so depth, size and number
are bounded while they grow, nothing recurses, and no tag constructs anything. An alias is the node
itself; who walks a tree looks at each node once, and a bomb of aliases is as small as its text.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import yaml
from yaml import CSafeLoader

from proxy.preload.lists.result import ListProblem

# `helm template` of the largest charts is some megabytes with a few hundred thousand nodes.
MAX_NODES = 1_000_000
MAX_NESTING = 100
MAX_DOCUMENTS = 10_000
# `<<: *base` of a base that merges another: how many mappings one look-up sees.
MAX_MERGES = 100

_NULL_VALUES = {"", "~", "null", "Null", "NULL"}
_DOCUMENT_START = re.compile(r"---(?=\s|$)")
_YAML_DIRECTIVE = re.compile(r"%(?:YAML|TAG)\s")

# `image: {{ … }}` is another mapping to YAML, and `{{- if … }}` nothing at all.
_TEMPLATE_LINE = re.compile(r"\s*\{\{.*\}\}\s*")
_TEMPLATE_VALUE = re.compile(r"(\s*(?:- +)*[\w./-]+: +|\s*(?:- +)+)(\{\{.*)")


@dataclass(slots=True, eq=False)
class ScalarNode:
    """Text as it is written; null is "". `1.10` stays `1.10`."""

    line: int
    text: str


@dataclass(slots=True, eq=False)
class SequenceNode:
    """A sequence."""

    line: int
    nodes: list["YamlNode"] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class MappingNode:
    """A mapping, without the keys that are no scalars; of a key that stands twice, the last."""

    line: int
    fields: dict[str, "YamlNode"] = field(default_factory=dict)

    def get(self, key: str) -> "YamlNode | None":
        """Return the value of `key`, also one that is merged with `<<`; what is written here wins."""
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
        """Return the value of `key` if it is a sequence, else nothing."""
        value = self.get(key)
        return value.nodes if isinstance(value, SequenceNode) else []


YamlNode = ScalarNode | SequenceNode | MappingNode


class _InvalidDocumentError(Exception):
    """A document that cannot be read."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def read_documents(lines: Sequence[str]) -> Iterator[YamlNode | ListProblem]:
    """Yield each document of a stream; what cannot be read is a problem, and the rest goes on."""
    composer = _Composer()
    for count, (first, text) in enumerate(_split_documents(lines)):
        if count == MAX_DOCUMENTS:
            yield ListProblem(first, f"more than {MAX_DOCUMENTS} documents: split the list")
            return
        try:
            yield from composer.read(first, text)
        except _InvalidDocumentError as error:
            yield ListProblem(error.line, f"the document from line {first} is not read: {error}")
        if composer.is_exhausted:
            yield ListProblem(first, f"more than {MAX_NODES} values of YAML: split the list")
            return


def _split_documents(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield the number of the first line of each document, and its text.

    `---` at the beginning of a line is a boundary wherever it stands (YAML 1.2.2, section 9.1.2).
    """
    starts = [number for number, line in enumerate(lines) if _DOCUMENT_START.match(line)]
    for start, end in zip([0, *starts], [*starts, len(lines)], strict=True):
        if start < end:
            yield start + 1, "\n".join(map(_sanitize_line, lines[start:end]))


def _sanitize_line(line: str) -> str:
    """Return a line as YAML can read it, though it is of a template or a directive."""
    if _YAML_DIRECTIVE.match(line) or _TEMPLATE_LINE.fullmatch(line):
        return ""
    if value := _TEMPLATE_VALUE.fullmatch(line):
        quoted = value[2].replace("'", "''")
        return f"{value[1]}'{quoted}'"
    return line


class _Composer:
    """Makes trees of the parser's events."""

    def __init__(self) -> None:
        self._remaining_nodes = MAX_NODES

    @property
    def is_exhausted(self) -> bool:
        """Whether there were more nodes than anybody has."""
        return self._remaining_nodes <= 0

    def read(self, first_line: int, text: str) -> Iterator[YamlNode]:
        """Yield the documents in `text`, which begins at line `first`; raise `_BrokenError`."""
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
            # What is missing at the end is missed on the line after the last.
            line = min(mark.line, text.count("\n")) if mark else 0
            raise _InvalidDocumentError(first_line + line, f"not YAML, {reason}") from error
        finally:
            loader.dispose()

    def _start_document(self, first_line: int) -> None:
        """Begin a document."""
        self._first_line = first_line
        self._anchors: dict[str, YamlNode] = {}
        self._root = SequenceNode(first_line)
        # The open collections, and of each the key that waits for its value.
        self._open_collections: list[SequenceNode | MappingNode] = [self._root]
        self._pending_keys: list[YamlNode | None] = [None]

    def _handle_event(self, event: yaml.Event) -> None:
        """Add what `event` begins or ends; raise `_BrokenError` if that is too deep or means nothing."""
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
                        node.line, f"it is nested more than {MAX_NESTING} deep"
                    )

    def _make_node(self, event: yaml.NodeEvent) -> YamlNode:
        line = self._first_line + (event.start_mark.line if event.start_mark else 0)
        anchor = event.anchor or ""
        if isinstance(event, yaml.AliasEvent):
            if anchor not in self._anchors:
                raise _InvalidDocumentError(line, f"*{anchor[:60]} names no anchor before it")
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
        """Put a node into the innermost open collection: its key first, then its value."""
        parent, key = self._open_collections[-1], self._pending_keys[-1]
        if isinstance(parent, SequenceNode):
            parent.nodes.append(node)
        elif key is None:
            self._pending_keys[-1] = node
        else:
            self._pending_keys[-1] = None
            if isinstance(key, ScalarNode):
                parent.fields[key.text] = node
