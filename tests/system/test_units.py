"""The units in `systemd/`, checked by systemd's own tools."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.http_client import send_request
from tests.system.images import BuiltImage
from tests.system.processes import run
from tests.system.servers import Registry
from tests.system.service_manager import FakeServiceManager

UNITS = Path(__file__).parents[2] / "systemd"
NAMES = ("pullcache.service", "pullcache.socket", "pullcache-admin.socket")
SERVICE = (UNITS / "pullcache.service").read_text()


@pytest.fixture
def units(directory: Path) -> Path:
    """The units with the path of this environment's program."""
    for name in NAMES:
        text = (UNITS / name).read_text()
        program = Path(sys.executable).with_name("pullcache")
        (directory / name).write_text(text.replace("/usr/bin/pullcache", str(program)))
    return directory


def test_systemd_analyze_accepts_the_units(units: Path):
    analysis = subprocess.run(
        ["systemd-analyze", "verify", *(units / name for name in NAMES)],
        capture_output=True,
        text=True,
        check=False,
    )
    # It also reports problems of this machine's own units.
    problems = [line for line in analysis.stderr.splitlines() if "pullcache" in line]
    assert (analysis.returncode, problems) == (0, [])


def test_the_service_has_a_low_exposure_level(units: Path):
    report = run("systemd-analyze", "security", "--offline=true", units / "pullcache.service")
    (level,) = re.findall(r"Overall exposure level for pullcache.service: ([\d.]+)", report)
    assert float(level) <= 1.3


def test_the_service_reloads_on_a_systemd_without_notify_reload():
    assert "\nType=notify\n" in SERVICE
    assert "\nExecReload=/bin/kill -HUP $MAINPID\n" in SERVICE


def test_systemd_waits_longer_for_a_stop_than_the_daemon_needs_by_default():
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", SERVICE, re.MULTILINE)
    assert int(seconds) > 8 + 2


def test_the_user_and_the_directory_are_created(directory: Path):
    (directory / "etc").mkdir()
    run("systemd-sysusers", f"--root={directory}", UNITS / "pullcache.sysusers")
    (user,) = [
        line.split(":")
        for line in (directory / "etc" / "passwd").read_text().splitlines()
        if line.startswith("pullcache:")
    ]
    assert user[5:] == ["/var/lib/pullcache", "/usr/sbin/nologin"]
    run("systemd-tmpfiles", "--create", f"--root={directory}", UNITS / "pullcache.tmpfiles")
    credentials = directory / "etc" / "pullcache" / "credentials"
    assert credentials.stat().st_mode & 0o777 == 0o700


def forbidden_system_calls() -> set[str]:
    """Return the system calls that the unit's filter denies."""
    allowed, denied, added = re.findall(r"^SystemCallFilter=(.*)$", SERVICE, re.MULTILINE)
    assert denied.startswith("~")
    not_allowed = system_calls_of(["@known"]) - system_calls_of(allowed.split())
    return (system_calls_of(denied[1:].split()) | not_allowed) - set(added.split())


def system_calls_of(groups: list[str]) -> set[str]:
    """Return the system calls of systemd's groups, including nested groups."""
    output = run("systemd-analyze", "syscall-filter", *groups)
    names = {line.strip() for line in output.splitlines() if line.startswith("    ")}
    nested = sorted(name for name in names if name.startswith("@"))
    plain = {name for name in names if not name.startswith(("@", "#"))}
    return plain | (system_calls_of(nested) if nested else set())


def test_the_daemon_makes_no_system_call_that_the_unit_forbids(
    directory: Path, upstream: Registry, image: BuiltImage
):
    forbidden = forbidden_system_calls()
    assert {"reboot", "sched_setaffinity", "fchown"} <= forbidden
    assert "sendfile" not in forbidden
    manager = FakeServiceManager(directory / "managed", upstream.url, watchdog=1)
    trace = directory / "trace"
    try:
        # -D: strace runs as a grandchild, so that LISTEN_PID is the daemon's PID.
        manager.start("strace", "-D", "-f", "-qq", "-o", str(trace))
        path = f"/v2/{image.repository}"
        assert send_request(manager.url, f"{path}/manifests/{image.tag}").status == 200
        for layer in image.layers:
            assert send_request(manager.url, f"{path}/blobs/{layer}").sha256 == layer
        assert send_request(manager.url, "/metrics").status == 200
        manager.wait_for("WATCHDOG")
    finally:
        manager.finish()
    # SQLite calls fchown only as root, and the service does not run as root.
    forbidden -= {"fchown"}
    used = set(re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE))
    assert {"sendfile", "epoll_wait"} & used
    assert used & forbidden == set()
