"""What the Markdown files say, against the code: where links lead, limits, messages, lines of the log."""

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from proxy.config.load import RESTART_ONLY_KEYS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FILES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("config/**/*.md")),
    *sorted(DOCS.glob("*.md")),
]
OPERATIONS = (DOCS / "operations.md").read_text(encoding="utf-8")
TROUBLESHOOTING = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")

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


def anchors(path: Path) -> set[str]:
    """Return the fragments that name the file's headings, as GitHub makes them."""
    text = re.sub(
        r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tables(text: str, *header: str) -> list[list[str]]:
    """Return the rows of all tables with these heads."""
    head = re.escape(f"| {' | '.join(header)} |")
    bodies = re.findall(rf"^{head}\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = "".join(bodies).splitlines()
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


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
    """Return the texts of the program, one a line; a value within one is a placeholder."""
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


def events() -> set[tuple[str, str]]:
    """Return what the program logs: the event and its level."""
    found = {("request", "info")}
    for node in nodes():
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="log"), attr=level), args=[event, *_]
            ) if level in ("debug", "info", "warning", "error", "exception"):
                shown = "error" if level == "exception" else level
                said = [one.value for one in ast.walk(event) if isinstance(one, ast.Constant)]
                found |= {(str(one), shown) for one in said}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(path):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


def test_there_are_links_between_the_documents():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [one.name for one in DOCS.glob("*.md") if f"(docs/{one.name}" not in text] == []


LIMITS = tables(OPERATIONS, "limit", "value", "constant")


@pytest.mark.parametrize(("value", "constant"), [row[-2:] for row in LIMITS])
def test_a_limit_that_is_written_down_is_that_of_the_code(value, constant):
    module, _, name = constant.strip("`").rpartition(".")
    number, _, unit = value.partition(" ")
    actual = getattr(importlib.import_module(f"proxy.{module}"), name)
    assert float(number) * _UNITS[unit] == pytest.approx(actual)


def test_every_largest_value_of_the_code_is_written_down():
    written = {row[-1].strip("`") for row in LIMITS}
    found = {
        f"{module.removeprefix('proxy.')}.{target.id}"
        for module, tree in trees().items()
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.startswith("MAX_")
    }
    assert found
    assert sorted(found - written) == []


def test_every_line_of_the_log_is_explained_and_no_other():
    rows = tables(OPERATIONS, "event", "level", "means")
    explained = {(event, row[1]) for row in rows for event in re.findall(r"`(\w+)`", row[0])}
    assert explained == events()


def test_the_keys_that_take_a_restart_are_those_of_the_code():
    (named,) = re.findall(r"`restart_required`: (.+?)\.\s", OPERATIONS, re.DOTALL)
    keys = {f"{section}.{key}" for section, keys in RESTART_ONLY_KEYS.items() for key in keys}
    assert set(re.findall(r"`([a-z_.]+)`", named)) == keys


MESSAGES = [
    message
    for row in tables(TROUBLESHOOTING, "pullcache says", "means", "helps")
    for message in re.findall(r"`([^`]+)`", row[0])
]


def test_there_are_messages_to_look_for():
    assert len(MESSAGES) > 30


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_explained_is_one_of_the_program(message):
    pattern = "[^\n]*".join(map(re.escape, message.split(_PLACEHOLDER)))
    assert re.search(pattern, literals())
