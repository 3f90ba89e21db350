"""The lock files, checked against pyproject.toml and the installed packages."""

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
EXTRAS = ("fleet", "hiredis", "opentelemetry")
PIN = re.compile(r"^([a-z0-9-]+)==(\S+)", re.MULTILINE)


def requirements(project: dict[str, Any], group: str) -> list[Requirement]:
    """Return the requirements of a dependency group and of the groups that it includes."""
    found = []
    for entry in project["dependency-groups"][group]:
        if isinstance(entry, str):
            found.append(Requirement(entry))
        else:
            found += requirements(project, entry["include-group"])
    return found


# A pin with its marker, or a hash; no URLs and no options.
LOCK_LINE = re.compile(
    r"[a-z0-9.-]+==[0-9a-z.]+(?: ; [A-Za-z_0-9 .<>=!'()]+)?(?: \\)?"
    r"|    --hash=sha256:[0-9a-f]{64}(?: \\)?"
)


def test_every_requirement_is_locked_at_an_allowed_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = dict(PIN.findall(DEVELOPMENT.read_text()))
    texts = [*project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        texts += extra
    wanted = [Requirement(text) for text in texts]
    for requirement in wanted + requirements(project, "dev"):
        assert requirement.specifier.contains(pins[requirement.name]), str(requirement)


def hashes_by_pin(path: Path) -> dict[str, set[str]]:
    """Return the hashes of each pin of a lock file."""
    pins = re.split(r"^(?=\S)", path.read_text(), flags=re.MULTILINE)[1:]
    return {pin.split()[0]: set(re.findall(r"sha256:\w+", pin)) for pin in pins}


def transitive_requirements(name: str) -> set[str]:
    """Return all distributions that an installed one needs on this platform, with its extras."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for text in requires(waiting.pop()) or ():
            requirement = Requirement(text)
            wanted = not requirement.marker or any(
                requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS
            )
            if wanted and (one := canonicalize_name(requirement.name)) not in found:
                found.add(one)
                waiting.append(one)
    return found


def test_the_packaged_lock_has_what_the_program_needs_at_the_locked_versions():
    """If this fails, make both locks anew, as `tests/run` describes."""
    lock, packaged = hashes_by_pin(DEVELOPMENT), hashes_by_pin(RUNTIME)
    assert packaged.items() <= lock.items()
    assert {pin.partition("==")[0] for pin in packaged} >= transitive_requirements("pullcache")


def test_the_locks_contain_no_urls():
    for lock in (DEVELOPMENT, RUNTIME):
        for line in lock.read_text().splitlines():
            assert LOCK_LINE.fullmatch(line), line
