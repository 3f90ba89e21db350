"""The Debian package: built, then installed, used, removed and purged in a small Debian root."""

import re
from pathlib import Path

import pytest

from proxy import __version__
from tests.support.markdown import DOCUMENTS
from tests.system.debian import make_root
from tests.system.processes import network_environment, run

ROOT = Path(__file__).parents[2]
DEPENDENCIES = ("python3", "dash", "dpkg", "systemd", "init-system-helpers", "ca-certificates")
TOOLS = ("coreutils", "diffutils", "findutils", "grep", "sed", "perl-base")
PATH = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
CONFIG = "etc/pullcache/pullcache.toml"
STORE = "var/cache/pullcache"
# The files that a new user changes. A purge keeps the user.
ACCOUNTS = {"passwd", "passwd-", "group", "group-", "shadow", "shadow-", "gshadow", "gshadow-"}
# A systemctl that logs its arguments and reports every unit as enabled.
SYSTEMCTL = """\
#!/bin/sh
echo "$*" >>/systemctl.log
case "$*" in *is-enabled*) echo enabled ;; esac
"""

pytestmark = pytest.mark.timeout(900)  # pip downloads the packages that are packaged


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("deb")
    run(ROOT / "config" / "debian" / "build", output, env=network_environment(), timeout=600)
    (built,) = output.iterdir()
    return built


@pytest.fixture
def debian(directory: Path) -> Path:
    """A root with the package's dependencies, in which systemd does not run."""
    root = directory / "root"
    make_root(root, *DEPENDENCIES, *TOOLS)
    return root


def dpkg(root: Path, *arguments: str | Path) -> str:
    """Run dpkg on a root; it runs the packages' scripts inside the root."""
    return run("dpkg", f"--root={root}", *arguments, env=PATH, timeout=300)


def run_inside(root: Path, *argv: str) -> str:
    return run("chroot", root, *argv, env=PATH, timeout=120)


def files_in(root: Path) -> set[str]:
    """Return all paths in a root but those of dpkg's database."""
    paths = (path.relative_to(root) for path in root.rglob("*"))
    return {str(path) for path in paths if not path.is_relative_to("var/lib/dpkg")}


def enabled_units(root: Path) -> set[str]:
    return {path.name for path in root.glob("etc/systemd/system/*.wants/pullcache*")}


def take_systemctl_log(root: Path) -> list[str]:
    """Return the reloads, starts, restarts and stops that systemctl has logged, and clear its log."""
    log = root / "systemctl.log"
    lines = [line.split() for line in log.read_text().splitlines()]
    log.unlink()
    commands = [" ".join(word for word in line if not word.startswith("-")) for line in lines]
    actions = ("daemon-reload", "start", "restart", "stop")
    return [command for command in commands if command.startswith(actions)]


def test_without_systemd_the_package_is_installed_used_removed_and_purged(
    package: Path, debian: Path
):
    before = files_in(debian)
    dpkg(debian, "--install", package)
    assert run_inside(debian, "pullcache", "--version") == f"pullcache, version {__version__}\n"
    run_inside(debian, "pullcache", "config", "check", "--config", f"/{CONFIG}")
    assert enabled_units(debian) == {"pullcache.service", "pullcache.socket"}
    assert "pullcache:x:" in (debian / "etc" / "passwd").read_text()
    assert run("dpkg", f"--root={debian}", "--verify", "pullcache") == ""
    documents = debian / "usr" / "share" / "doc" / "pullcache"
    assert "has not chosen a licence" in (documents / "copyright").read_text()
    assert (documents / "changelog.gz").exists()
    for example in ("nginx/pullcache.conf", "haproxy/haproxy.cfg"):
        assert (documents / "config" / example).exists()
    manual = {path.name for path in (debian / "usr/share/man/man1").glob("pullcache*")}
    assert manual == {f"{path.name}.gz" for path in (ROOT / "config" / "man").iterdir()}
    for name in ("bash-completion/completions/pullcache", "zsh/vendor-completions/_pullcache"):
        assert "_PULLCACHE_COMPLETE" in (debian / "usr/share" / name).read_text()
    assert (debian / "usr/share/fish/vendor_completions.d/pullcache.fish").exists()
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
    remaining = files_in(debian) - before
    assert {Path(name).name for name in remaining} <= {*ACCOUNTS, ".pwd.lock"}
    assert before - files_in(debian) == set()


def test_with_systemd_the_service_is_started_restarted_by_an_upgrade_and_stopped(
    package: Path, debian: Path
):
    # Maintainer scripts take this directory as the sign that systemd runs, sd_booted(3).
    (debian / "run" / "systemd" / "system").mkdir(parents=True)
    systemctl = debian / "usr" / "bin" / "systemctl"
    systemctl.unlink()
    systemctl.write_text(SYSTEMCTL)
    systemctl.chmod(0o755)

    dpkg(debian, "--install", package)
    started = ["daemon-reload", "start pullcache.socket", "start pullcache.service"]
    assert take_systemctl_log(debian) == started

    (debian / CONFIG).write_text("offline = true\n")
    dpkg(debian, "--force-confold", "--install", package)
    assert take_systemctl_log(debian) == [*started[:2], "restart pullcache.service"]
    assert (debian / CONFIG).read_text() == "offline = true\n"

    dpkg(debian, "--purge", "pullcache")
    stopped = "stop pullcache.socket pullcache-admin.socket pullcache.service"
    assert take_systemctl_log(debian) == [stopped, "daemon-reload"]
