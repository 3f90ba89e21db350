"""The lock against what it locks."""

import re
import tomllib
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "config" / "requirements"
DEVELOPMENT, RUNTIME = LOCKS / "development.txt", LOCKS / "runtime.txt"
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
    pins = dict(PIN.findall(DEVELOPMENT.read_text()))
    texts = [*project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        texts += extra
    wanted = [Requirement(text) for text in texts]
    for requirement in wanted + requirements(project, "dev"):
        assert requirement.specifier.contains(pins[requirement.name]), str(requirement)


def blocks(path: Path) -> dict[str, set[str]]:
    """Return the hashes of each pin of a lock."""
    pins = re.split(r"^(?=\S)", path.read_text(), flags=re.MULTILINE)[1:]
    return {pin.split()[0]: set(re.findall(r"sha256:\w+", pin)) for pin in pins}


def needed(name: str) -> set[str]:
    """Return all that a distribution with its extra needs here, by what the installed ones say."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for text in requires(waiting.pop()) or ():
            requirement = Requirement(text)
            wanted = not requirement.marker or requirement.marker.evaluate(
                {"extra": "opentelemetry"}
            )
            if wanted and (one := canonicalize_name(requirement.name)) not in found:
                found.add(one)
                waiting.append(one)
    return found


def test_what_is_packaged_is_what_the_program_needs_as_it_is_locked():
    """If not: tests/run says how both locks are made."""
    lock, packaged = blocks(DEVELOPMENT), blocks(RUNTIME)
    assert packaged.items() <= lock.items()
    assert {pin.partition("==")[0] for pin in packaged} >= needed("pullcache")


def test_the_lock_names_no_place_to_download_from():
    for lock in (DEVELOPMENT, RUNTIME):
        for line in lock.read_text().splitlines():
            assert LOCK_LINE.fullmatch(line), line
