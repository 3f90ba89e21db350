"""The units of `systemd/`, as systemd itself judges them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.images import Image
from tests.system.manager import Manager
from tests.system.processes import run
from tests.system.servers import Registry
from tests.system.wire import ask

UNITS = Path(__file__).parents[2] / "systemd"
NAMES = ("pullcache.service", "pullcache.socket", "pullcache-admin.socket")
SERVICE = (UNITS / "pullcache.service").read_text()


@pytest.fixture
def units(place: Path) -> Path:
    """The units with the path of a program that is installed here."""
    for name in NAMES:
        text = (UNITS / name).read_text()
        program = Path(sys.executable).with_name("pullcache")
        (place / name).write_text(text.replace("/usr/bin/pullcache", str(program)))
    return place


def test_systemd_finds_nothing_wrong_with_the_units(units: Path):
    checked = subprocess.run(
        ["systemd-analyze", "verify", *(units / name for name in NAMES)],
        capture_output=True,
        text=True,
        check=False,
    )
    # What it says of the units of this machine is not about ours.
    said = [line for line in checked.stderr.splitlines() if "pullcache" in line]
    assert (checked.returncode, said) == (0, [])


def test_the_service_is_exposed_to_little(units: Path):
    said = run("systemd-analyze", "security", "--offline=true", units / "pullcache.service")
    (level,) = re.findall(r"Overall exposure level for pullcache.service: ([\d.]+)", said)
    assert float(level) <= 1.3


def test_the_service_reloads_on_a_systemd_that_knows_no_notify_reload():
    assert "\nType=notify\n" in SERVICE
    assert "\nExecReload=/bin/kill -HUP $MAINPID\n" in SERVICE


def test_a_stop_is_given_longer_than_the_daemon_takes_by_default():
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", SERVICE, re.MULTILINE)
    assert int(seconds) > 8 + 2


def test_the_user_and_the_directory_are_made(place: Path):
    (place / "etc").mkdir()
    run("systemd-sysusers", f"--root={place}", UNITS / "pullcache.sysusers")
    (user,) = [
        line.split(":")
        for line in (place / "etc" / "passwd").read_text().splitlines()
        if line.startswith("pullcache:")
    ]
    assert user[5:] == ["/var/lib/pullcache", "/usr/sbin/nologin"]
    run("systemd-tmpfiles", "--create", f"--root={place}", UNITS / "pullcache.tmpfiles")
    made = place / "etc" / "pullcache" / "credentials"
    assert made.stat().st_mode & 0o777 == 0o700


def filtered() -> set[str]:
    """Return the system calls that the unit's filter kills the daemon for."""
    kept, *denied = re.findall(r"^SystemCallFilter=(.*)$", SERVICE, re.MULTILINE)
    (groups,) = denied
    assert groups.startswith("~")
    return calls_of(groups[1:].split()) | (calls_of(["@known"]) - calls_of(kept.split()))


def calls_of(groups: list[str]) -> set[str]:
    """Return the system calls of systemd's groups, and of the groups in them."""
    said = run("systemd-analyze", "syscall-filter", *groups)
    names = {line.strip() for line in said.splitlines() if line.startswith("    ")}
    inner = sorted(name for name in names if name.startswith("@"))
    plain = {name for name in names if not name.startswith(("@", "#"))}
    return plain | (calls_of(inner) if inner else set())


def test_the_daemon_makes_no_system_call_that_the_unit_forbids(
    place: Path, upstream: Registry, image: Image
):
    forbidden = filtered()
    assert {"reboot", "setpriority", "fchown"} <= forbidden
    assert "sendfile" not in forbidden
    manager = Manager(place / "managed", upstream.url, watchdog=1)
    trace = place / "trace"
    try:
        # -D: the daemon is the process that was started, which the sockets are for.
        manager.start("strace", "-D", "-f", "-qq", "-o", str(trace))
        path = f"/v2/{image.repository}"
        assert ask(manager.url, f"{path}/manifests/{image.tag}").status == 200
        for layer in image.layers:
            assert ask(manager.url, f"{path}/blobs/{layer}").sha256 == layer
        assert ask(manager.url, "/metrics").status == 200
        manager.hear("WATCHDOG")
    finally:
        manager.finish()
    # As root, which the service is not, SQLite gives its files the database's owner.
    forbidden -= {"fchown"}
    made = set(re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE))
    assert {"sendfile", "epoll_wait"} & made
    assert made & forbidden == set()
