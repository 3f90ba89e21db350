"""The Debian package in a small Debian of its own: built, installed, used, removed, purged."""

import re
from pathlib import Path

import pytest

from proxy import __version__
from tests.support.markdown import DOCUMENTS
from tests.system.debian import make_root
from tests.system.processes import open_to_pip, run

ROOT = Path(__file__).parents[2]
NEEDED = ("python3", "dash", "dpkg", "systemd", "init-system-helpers", "ca-certificates")
TOOLS = ("coreutils", "diffutils", "findutils", "grep", "sed", "perl-base")
PATH = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
CONFIG = "etc/pullcache/pullcache.toml"
STORE = "var/cache/pullcache"
# What the user is written into, who stays.
ACCOUNTS = {"passwd", "passwd-", "group", "group-", "shadow", "shadow-", "gshadow", "gshadow-"}
# What systemd would be told. It answers that every unit is enabled.
SYSTEMCTL = """\
#!/bin/sh
echo "$*" >>/told
case "$*" in *is-enabled*) echo enabled ;; esac
"""

pytestmark = pytest.mark.timeout(900)  # pip fetches what the package carries


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("deb")
    run(ROOT / "config" / "debian" / "build", output, env=open_to_pip(), timeout=600)
    (built,) = output.iterdir()
    return built


@pytest.fixture
def debian(place: Path) -> Path:
    """A root with all that the package depends on; no systemd runs there."""
    root = place / "root"
    make_root(root, *NEEDED, *TOOLS)
    return root


def dpkg(root: Path, *arguments: str | Path) -> str:
    """Run dpkg on a root; the scripts of packages run inside it."""
    return run("dpkg", f"--root={root}", *arguments, env=PATH, timeout=300)


def inside(root: Path, *argv: str) -> str:
    return run("chroot", root, *argv, env=PATH, timeout=120)


def files_in(root: Path) -> set[str]:
    """Return all that lies in a root, but for dpkg's own books."""
    found = (path.relative_to(root) for path in root.rglob("*"))
    return {str(path) for path in found if not path.is_relative_to("var/lib/dpkg")}


def enabled_in(root: Path) -> set[str]:
    return {path.name for path in root.glob("etc/systemd/system/*.wants/pullcache*")}


def told(root: Path) -> list[str]:
    """Return what systemd was told to start and stop since the last time."""
    log = root / "told"
    lines = [line.split() for line in log.read_text().splitlines()]
    log.unlink()
    said = [" ".join(word for word in line if not word.startswith("-")) for line in lines]
    return [line for line in said if line.startswith(("daemon-reload", "start", "restart", "stop"))]


def test_without_systemd_it_is_installed_used_removed_and_purged(package: Path, debian: Path):
    before = files_in(debian)
    dpkg(debian, "--install", package)
    assert inside(debian, "pullcache", "--version") == f"pullcache, version {__version__}\n"
    inside(debian, "pullcache", "config", "check", "--config", f"/{CONFIG}")
    assert enabled_in(debian) == {"pullcache.service", "pullcache.socket"}
    assert "pullcache:x:" in (debian / "etc" / "passwd").read_text()
    assert run("dpkg", f"--root={debian}", "--verify", "pullcache") == ""
    documents = debian / "usr" / "share" / "doc" / "pullcache"
    assert "has not chosen a licence" in (documents / "copyright").read_text()
    pages = {path.relative_to(ROOT) for path in DOCUMENTS}
    assert {path.relative_to(documents) for path in documents.rglob("*.md")} == pages
    (unit,) = re.findall(
        r"^Documentation=file:(.*)$",
        (debian / "usr/lib/systemd/system/pullcache.service").read_text(),
        re.MULTILINE,
    )
    assert (debian / unit.removeprefix("/")).exists()

    (debian / STORE / "blobs").mkdir(parents=True)
    (debian / CONFIG).write_text("offline = true\n")
    dpkg(debian, "--remove", "pullcache")
    assert {CONFIG, f"{STORE}/blobs"} <= files_in(debian)
    assert not (debian / "usr" / "lib" / "pullcache").exists()

    dpkg(debian, "--purge", "pullcache")
    left = files_in(debian) - before
    assert {Path(name).name for name in left} <= {*ACCOUNTS, ".pwd.lock"}
    assert before - files_in(debian) == set()


def test_a_running_systemd_starts_it_restarts_it_after_an_upgrade_and_stops_it(
    package: Path, debian: Path
):
    (debian / "run" / "systemd" / "system").mkdir(parents=True)
    systemctl = debian / "usr" / "bin" / "systemctl"
    systemctl.unlink()
    systemctl.write_text(SYSTEMCTL)
    systemctl.chmod(0o755)

    dpkg(debian, "--install", package)
    started = ["daemon-reload", "start pullcache.socket", "start pullcache.service"]
    assert told(debian) == started

    (debian / CONFIG).write_text("offline = true\n")
    dpkg(debian, "--force-confold", "--install", package)
    assert told(debian) == [*started[:2], "restart pullcache.service"]
    assert (debian / CONFIG).read_text() == "offline = true\n"

    dpkg(debian, "--purge", "pullcache")
    stopped = "stop pullcache.socket pullcache-admin.socket pullcache.service"
    assert told(debian) == [stopped, "daemon-reload"]
