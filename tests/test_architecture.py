"""Rules of the tree that a reader relies on: calls go down, decisions do no I/O."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_imports_point_downward_and_decisions_do_no_io():
    """The contracts stand in pyproject.toml, under `tool.importlinter`."""
    lint = Path(sys.executable).with_name("lint-imports")
    checked = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_command_line_starts_without_the_daemon():
    """`pullcache --help` must not wait for aiohttp."""
    script = "import sys, proxy.cli; sys.exit('aiohttp' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
