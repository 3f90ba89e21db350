"""Renders the Helm chart: the part of Go's templates, with Helm's functions, that the chart uses.

Helm itself is a Go program that no package registry of the tests has. Anything else than what is here is
an error, so that the chart keeps to it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import yaml

_ACTION = re.compile(r"\{\{(-?)\s*(.*?)\s*(-?)\}\}", re.DOTALL)
_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\$?\.?[\w.]+|\$|[().|,]|:=|-?\d+)')

Scope = dict[str, Any]


@dataclass
class _Node:
    """A piece of text, an action, or a block with its body and its `else`."""

    kind: str
    text: str
    body: list["_Node"]
    otherwise: list["_Node"]


def _split(text: str) -> Iterator[tuple[str, str]]:
    """Yield text and actions, with the blanks trimmed that `{{-` and `-}}` trim."""
    position = 0
    trims_next = False
    for match in _ACTION.finditer(text):
        trims_before, action, trims_after = match.groups()
        literal = text[position : match.start()]
        literal = literal.lstrip() if trims_next else literal
        yield "text", literal.rstrip() if trims_before else literal
        yield "action", action
        trims_next, position = bool(trims_after), match.end()
    yield "text", text[position:].lstrip() if trims_next else text[position:]


def _parse(pieces: Iterator[tuple[str, str]], end: tuple[str, ...] = ()) -> tuple[list[_Node], str]:
    nodes: list[_Node] = []
    for kind, text in pieces:
        word, _, rest = text.partition(" ")
        if kind == "text":
            nodes.append(_Node("text", text, [], []))
        elif word in end:
            return nodes, text
        elif word in ("if", "range", "with", "define"):
            body, last = _parse(pieces, ("end", "else"))
            otherwise: list[_Node] = []
            if last == "else":
                otherwise, last = _parse(pieces, ("end",))
            assert last == "end", f"{text}: {last}"
            nodes.append(_Node(word, rest, body, otherwise))
        else:
            nodes.append(_Node("action", text, [], []))
    assert not end, f"no {end} at the end"
    return nodes, ""


class Chart:
    """A chart in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metadata = yaml.safe_load((directory / "Chart.yaml").read_text())
        self.values = yaml.safe_load((directory / "values.yaml").read_text())
        self.schema = json.loads((directory / "values.schema.json").read_text())
        self._templates: dict[str, list[_Node]] = {}
        for path in sorted((directory / "templates").iterdir()):
            nodes, _ = _parse(_split(path.read_text()))
            self._templates[f"{self.metadata['name']}/templates/{path.name}"] = nodes
            for node in nodes:
                if node.kind == "define":
                    self._templates[json.loads(node.text)] = node.body

    def render(self, values: Mapping[str, Any] | None = None) -> dict[str, str]:
        """Return what `helm template cache --namespace images` makes of each template."""
        merged = _merge(self.values, values or {})
        jsonschema.validate(merged, self.schema)
        chart = {"AppVersion": self.metadata["appVersion"], "Name": self.metadata["name"]}
        root = {
            "Values": merged,
            "Chart": chart,
            "Release": {"Name": "cache", "Namespace": "images"},
            "Template": {"BasePath": f"{self.metadata['name']}/templates"},
            "Files": {"Get": lambda name: (self.directory / name).read_text()},
        }
        return {
            name.rpartition("/")[2]: self._run(nodes, {".": root, "$": root})
            for name, nodes in self._templates.items()
            if name.endswith((".yaml", ".txt"))
        }

    def documents(self, values: Mapping[str, Any] | None = None) -> list[Any]:
        """Return the objects that the chart makes of these values."""
        rendered = self.render(values)
        return [
            document
            for name, text in rendered.items()
            if name.endswith(".yaml")
            for document in yaml.safe_load_all(text)
            if document
        ]

    def _run(self, nodes: list[_Node], scope: Scope) -> str:
        return "".join(self._run_node(node, scope) for node in nodes)

    def _run_node(self, node: _Node, scope: Scope) -> str:
        if node.kind == "text":
            return node.text
        if node.kind == "action":
            value = self._evaluate(node.text, scope)
            return str(value).lower() if isinstance(value, bool) else str(value)
        if node.kind == "define":
            return ""
        if node.kind == "range":
            names, assignment, expression = node.text.rpartition(":=")
            items = self._evaluate(expression, scope)
            pairs = sorted(items.items()) if isinstance(items, Mapping) else [*enumerate(items)]
            variables = [name.strip() for name in names.split(",")] if assignment else []
            return "".join(
                self._run(
                    node.body, {**scope, ".": pair[1], **dict(zip(variables, pair, strict=False))}
                )
                for pair in pairs
            )
        value = self._evaluate(node.text, scope)
        if not value:
            return self._run(node.otherwise, scope)
        return self._run(node.body, {**scope, ".": value} if node.kind == "with" else scope)

    # Expressions.

    def _evaluate(self, text: str, scope: Scope) -> Any:
        tokens = _TOKEN.findall(text)
        assert "".join(tokens) == re.sub(r'\s+(?=(?:[^"]*"[^"]*")*[^"]*$)', "", text), text
        value, rest = self._pipeline(tokens, scope)
        assert not rest, text
        return value

    def _pipeline(self, tokens: list[str], scope: Scope) -> tuple[Any, list[str]]:
        value, tokens = self._command(tokens, scope, [])
        while tokens and tokens[0] == "|":
            value, tokens = self._command(tokens[1:], scope, [value])
        return value, tokens

    def _command(self, tokens: list[str], scope: Scope, piped: list[Any]) -> tuple[Any, list[str]]:
        head = tokens[0]
        if head[0] not in '$."(' and not head.lstrip("-").isdigit():
            function: Any = self._function(head, scope)
            tokens = tokens[1:]
        else:
            function, tokens = self._operand(tokens, scope)
            if not callable(function):
                assert not piped, head
                return function, tokens
        arguments = []
        while tokens and tokens[0] not in ("|", ")"):
            argument, tokens = self._operand(tokens, scope)
            arguments.append(argument)
        return function(*arguments, *piped), tokens

    def _operand(self, tokens: list[str], scope: Scope) -> tuple[Any, list[str]]:
        head, rest = tokens[0], tokens[1:]
        if head == "(":
            value, rest = self._pipeline(rest, scope)
            assert rest[0] == ")"
            return value, rest[1:]
        if head.startswith('"'):
            return json.loads(head), rest
        if head.lstrip("-").isdigit():
            return int(head), rest
        name, *path = head.split(".")
        value = scope[name or "."]
        for part in filter(None, path):
            value = value.get(part) if isinstance(value, Mapping) else getattr(value, part)
        return value, rest

    def _function(self, name: str, scope: Scope) -> Callable[..., Any]:
        if name == "include":
            return lambda template, dot: self._run(
                self._templates[template], {".": dot, "$": scope["$"]}
            )
        return _FUNCTIONS[name]


def _merge(defaults: Any, values: Any) -> Any:
    if not (isinstance(defaults, Mapping) and isinstance(values, Mapping)):
        return values
    keys = {**defaults, **values}
    return {
        key: _merge(defaults[key], values[key]) if key in defaults and key in values else keys[key]
        for key in keys
    }


def _indent(count: int, text: str) -> str:
    return "\n".join(" " * count + line for line in text.split("\n"))


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "and": lambda *values: next((one for one in values if not one), values[-1]),
    "default": lambda fallback, value: value or fallback,
    "eq": lambda first, second: first == second,
    "ne": lambda first, second: first != second,
    "nindent": lambda count, text: "\n" + _indent(count, text),
    "print": lambda *values: "".join(map(str, values)),
    "printf": lambda form, *values: form % values,
    "quote": lambda value: json.dumps(str(value)),
    "replace": lambda old, new, text: text.replace(old, new),
    "sha256sum": lambda text: hashlib.sha256(text.encode()).hexdigest(),
    "toJson": json.dumps,
    "toYaml": lambda value: yaml.safe_dump(value, default_flow_style=False).rstrip("\n"),
}
