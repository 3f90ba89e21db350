"""The lock against what it locks."""

import re
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([a-z0-9-]+)==(\S+)", re.MULTILINE)


def requirements(project: dict[str, Any], group: str) -> list[Requirement]:
    """Return what a dependency group asks for, and the groups that it includes."""
    found = []
    for entry in project["dependency-groups"][group]:
        if isinstance(entry, str):
            found.append(Requirement(entry))
        else:
            found += requirements(project, entry["include-group"])
    return found


# A pin with its marker, or a hash: nothing else, so no address and no option.
LOCK_LINE = re.compile(
    r"[a-z0-9.-]+==[0-9a-z.]+(?: ; [A-Za-z_0-9 .<>=!'()]+)?(?: \\)?"
    r"|    --hash=sha256:[0-9a-f]{64}(?: \\)?"
)


def test_every_requirement_is_locked_at_a_version_it_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = dict(PIN.findall((ROOT / "requirements.txt").read_text()))
    wanted = [Requirement(text) for text in project["project"]["dependencies"]]
    for requirement in wanted + requirements(project, "dev"):
        assert requirement.specifier.contains(pins[requirement.name]), str(requirement)


def test_the_lock_names_no_place_to_download_from():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert LOCK_LINE.fullmatch(line), line
