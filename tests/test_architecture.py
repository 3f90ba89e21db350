"""Rules of the source tree: imports point downward, class names are unique."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_imports_follow_the_contracts():
    """The contracts are in pyproject.toml, under `tool.importlinter`."""
    lint = Path(sys.executable).with_name("lint-imports")
    checked = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_command_line_starts_without_the_daemon():
    """`pullcache --help` must not wait for the import of aiohttp."""
    script = "import sys, proxy.cli; sys.exit('aiohttp' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_no_two_classes_have_the_same_name():
    names = Counter(
        name
        for directory in ("proxy", "tests")
        for path in (ROOT / directory).rglob("*.py")
        for name in re.findall(r"^ *class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert [name for name, count in names.items() if count > 1] == []
