"""The documents themselves, and the limits, messages and log events in them against the code."""

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache

import pytest

from proxy.config.load import RESTART_ONLY_KEYS
from tests.support.markdown import (
    DOCS,
    DOCUMENTS,
    ROOT,
    anchor,
    headings,
    items,
    links,
    read,
    rows,
    sections,
)

MAX_LINE_LENGTH = 120
MAX_README_LINES = 120
LEVELS = {"Errors": "error", "Warnings": "warning", "Information": "info", "Debugging": "debug"}

_UNITS = {
    "": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "%": 0.01,
    "s": 1,
    "min": 60,
    "h": 3600,
    "d": 86_400,
}
_PLACEHOLDER = "…"


@cache
def trees() -> dict[str, ast.Module]:
    """Return the modules of the program, parsed."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
            path.read_text(encoding="utf-8")
        )
        for path in sorted((ROOT / "proxy").rglob("*.py"))
    }


def nodes() -> Iterator[ast.AST]:
    for tree in trees().values():
        yield from ast.walk(tree)


@cache
def literals() -> str:
    """Return the strings of the program, one a line; a value inside one becomes a placeholder."""
    found = []
    for node in nodes():
        if isinstance(node, ast.JoinedStr):
            parts = (
                part.value if isinstance(part, ast.Constant) else _PLACEHOLDER
                for part in node.values
            )
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


def logged_events() -> set[tuple[str, str]]:
    """Return the events that the program logs, each with its level."""
    found = {("request", "info"), ("peer_request", "info")}
    for node in nodes():
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="log"), attr=level), args=[event, *_]
            ) if level in ("debug", "info", "warning", "error", "exception"):
                shown = "error" if level == "exception" else level
                names = [one.value for one in ast.walk(event) if isinstance(one, ast.Constant)]
                found |= {(str(name), shown) for name in names}
    return found


# The documents as such.


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_of_a_document_is_too_long(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > MAX_LINE_LENGTH] == []


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_that_exist(path):
    dead = []
    for target in links(path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, fragment = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists():
            dead.append(target)
        elif fragment:
            titles = headings(file.read_text(encoding="utf-8"))
            if fragment not in {anchor(title) for _, title in titles}:
                dead.append(target)
    assert dead == []


def test_every_document_is_reachable_from_the_index():
    reached = set()
    queue = [DOCS / "README.md"]
    while queue:
        path = queue.pop()
        if path in reached:
            continue
        reached.add(path)
        targets = (target.partition("#")[0] for target in links(path.read_text(encoding="utf-8")))
        queue += [
            (path.parent / target).resolve()
            for target in targets
            if target.endswith(".md") and "://" not in target
        ]
    # The front page leads to the index, not the other way round.
    assert {path for path in DOCUMENTS if path not in reached} <= {ROOT / "README.md"}


def test_the_readme_leads_to_the_index():
    assert "docs/README.md" in links(read("README.md"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_that_a_document_names_exists(path):
    if path.name == "CHANGELOG.md":
        return
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"`((?:\.ci|config|docs|proxy|systemd|tests)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


# Limits.

LIMITS = rows(read("docs/limits.md"), "limit", "value", "constant")


@pytest.mark.parametrize(("value", "constant"), [row[-2:] for row in LIMITS])
def test_a_documented_limit_is_that_of_the_code(value, constant):
    module, _, name = constant.strip("`").rpartition(".")
    number, _, unit = value.partition(" ")
    actual = getattr(importlib.import_module(f"proxy.{module}"), name)
    assert float(number) * _UNITS[unit] == pytest.approx(actual)


def test_every_maximum_in_the_code_is_documented():
    documented = {row[-1].strip("`") for row in LIMITS}
    found = {
        f"{module.removeprefix('proxy.')}.{target.id}"
        for module, tree in trees().items()
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.startswith("MAX_")
    }
    assert found
    assert sorted(found - documented) == []


# The log, and what needs a restart.


def test_every_log_event_is_documented_with_its_level_and_no_other():
    documented = {
        (name, LEVELS[title])
        for title, section in sections(read("docs/log-events.md"), 2).items()
        for names, _ in items(section)
        for name in names
    }
    assert documented == logged_events()


def test_the_keys_that_need_a_restart_are_those_of_the_code():
    (named,) = re.findall(r"`restart_required`:\s(.+?)\.\s", read("docs/operations.md"), re.DOTALL)
    keys = {f"{section}.{key}" for section, keys in RESTART_ONLY_KEYS.items() for key in keys}
    assert set(re.findall(r"`([a-z_.]+)`", named)) == keys


# Messages.

MESSAGES = [
    message
    for names, _ in items(sections(read("docs/troubleshooting.md"), 2)["What pullcache says"])
    for message in names
]


def test_the_troubleshooting_page_lists_messages():
    assert len(MESSAGES) > 60


@pytest.mark.parametrize("message", MESSAGES)
def test_an_explained_message_is_one_of_the_program(message):
    pattern = "[^\n]*".join(map(re.escape, message.split(_PLACEHOLDER)))
    assert re.search(pattern, literals())


# Decisions.


def test_the_index_of_decisions_lists_each_heading_of_each_page_with_its_date():
    listed = {
        links(f"{title}\n")[0]: re.findall(r"^- \d{4}-\d\d-\d\d: (.+)$", body, re.MULTILINE)
        for title, body in sections(read("docs/decisions/README.md"), 2).items()
    }
    decided = {
        path.name: [
            title for level, title in headings(path.read_text(encoding="utf-8")) if level == 2
        ]
        for path in (DOCS / "decisions").glob("*.md")
        if path.name != "README.md"
    }
    assert listed == decided
