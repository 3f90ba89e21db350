"""Rules of the tree that a reader relies on: small files, calls that go down, pure decisions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "proxy").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# The decisions: what they are given is all they know (pyproject, "Decisions do no I/O").
PURE = [
    "oci/*.py",
    "cache/lists/*.py",
    "cache/naming.py",
    "cache/policy.py",
    "server/ranges.py",
    "upstream/breaker.py",
    "upstream/challenge.py",
    "upstream/proxies.py",
    "upstream/quota.py",
    "upstream/retry.py",
    "upstream/search.py",
]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name)
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_requests_flow_down_and_decisions_do_no_io():
    lint = Path(sys.executable).with_name("lint-imports")
    checked = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_pure_modules_are_pure():
    forbidden = {"aiohttp", "asyncio", "os", "pathlib", "random", "socket", "sqlite3", "time"}
    for pattern in PURE:
        for path in (ROOT / "proxy").glob(pattern):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            named = {
                alias.name.partition(".")[0]
                for node in nodes
                if isinstance(node, ast.Import)
                for alias in node.names
            }
            named |= {
                (node.module or "").partition(".")[0]
                for node in nodes
                if isinstance(node, ast.ImportFrom)
            }
            assert not named & forbidden, path


def test_the_command_line_starts_without_the_daemon():
    """`pullcache --help` must not wait for aiohttp."""
    script = "import sys, proxy.cli; sys.exit('aiohttp' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
