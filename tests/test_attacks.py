"""Every attack that the documentation lists has a test, and every attack that is known is listed."""

import ast
import re

from tests.support.markdown import ROOT, read, sections

ATTACKS = [
    *("C1", "C2"),
    *(f"H{number}" for number in range(1, 6)),
    *(f"M{number}" for number in range(1, 10)),
    *(f"L{number}" for number in range(1, 18)),
]
ITEM = re.compile(r"- \*\*([CHML]\d+):\*\* (.+?) \*Tests?:\* (`\w+`(?:, `\w+`)*)")


def items() -> list[re.Match[str]]:
    """Return the items of the section, each with its id, its text and the names of its tests."""
    text = sections(read("docs/security.md"), 2)["Attacks"]
    found = [" ".join(one.split()) for one in re.findall(r"^- .*(?:\n  .+)*", text, re.MULTILINE)]
    matches = [ITEM.fullmatch(one) for one in found]
    assert None not in matches, "write each as - **H3:** attack. What stops it. *Test:* `test_name`"
    return [match for match in matches if match]


def test_the_documentation_lists_each_attack_once_and_in_order():
    assert [item[1] for item in items()] == ATTACKS


def test_each_attack_has_a_test_that_exists():
    tests = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    named = {name: item[1] for item in items() for name in re.findall(r"`(\w+)`", item[3])}
    assert {row: name for name, row in named.items() if name not in tests} == {}
