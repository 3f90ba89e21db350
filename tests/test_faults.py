"""Every row of the fault tables has a test named after it, or a reason in the decisions."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
REASONS = TESTS.parent / "docs" / "decisions" / "faults.md"
# Upstream, malicious content, many clients at once, hostile clients, authentication, process.
TABLES = {
    "u": range(1, 35),
    "m": range(1, 16),
    "e": range(6, 12),
    "c": range(1, 25),
    "a": range(1, 13),
    "p": (*range(1, 17), 18, 19),
}
ROWS = [f"{table}{row:02}" for table, rows in TABLES.items() for row in rows]


@cache
def named_rows() -> set[str]:
    """Return the rows that test functions name: `test_u06_…` names U6, `test_c07_to_c11_…` five rows."""
    return {
        f"{match[1]}{row:02}"
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (match := re.match(r"test_([a-z])(\d\d)_(?:to_\1(\d\d)_)?", node.name))
        for row in range(int(match[2]), int(match[3] or match[2]) + 1)
    }


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_a_test_or_a_reason_why_it_cannot_apply(row):
    reason = rf"^- \*\*{row[0].upper()}{int(row[1:])}:\*\* \w"
    has_reason = re.search(reason, REASONS.read_text(encoding="utf-8"), re.MULTILINE)
    assert row in named_rows() or has_reason
