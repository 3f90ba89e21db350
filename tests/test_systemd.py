"""What is said to the service manager, read from a real notify socket; and the sockets that it passes."""

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.systemd import Notifier, read_service_manager


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5)
        yield listener


def heard(manager: socket.socket) -> dict[str, str]:
    text = manager.recv(4096).decode()
    return dict(line.split("=", 1) for line in text.split("\n"))


def test_each_state_is_one_datagram(manager):
    notifier = Notifier(manager.getsockname())
    notifier.extend_timeout("opening the store", 30)
    assert heard(manager) == {"EXTEND_TIMEOUT_USEC": "30000000", "STATUS": "opening the store"}
    notifier.ready("serving")
    assert heard(manager) == {"READY": "1", "STATUS": "serving"}
    notifier.ping_watchdog("still serving")
    assert heard(manager) == {"WATCHDOG": "1", "STATUS": "still serving"}
    notifier.status("serving a lot")
    assert heard(manager) == {"STATUS": "serving a lot"}
    notifier.stopping()
    assert heard(manager)["STOPPING"] == "1"
    notifier.close()


def test_a_reload_says_when_it_began_by_the_clock_that_systemd_compares(manager):
    notifier = Notifier(manager.getsockname())
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    said = heard(manager)
    assert said["RELOADING"] == "1"
    assert before <= int(said["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    notifier.close()


def test_an_abstract_address_is_understood():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("")  # the kernel chooses an abstract name
        listener.settimeout(5)
        name = listener.getsockname()
        assert name.startswith(b"\0")
        notifier = Notifier("@" + name[1:].decode())
        notifier.ready("here")
        assert heard(listener)["READY"] == "1"
        notifier.close()


def test_a_manager_that_is_not_there_is_no_reason_to_fail(tmp_path):
    for address in ("", str(tmp_path / "none")):
        notifier = Notifier(address)
        notifier.ready("serving")
        notifier.close()
        notifier.ready("nobody is told")


def test_a_manager_that_does_not_read_holds_nobody_up(manager):
    notifier = Notifier(manager.getsockname())
    for _ in range(100_000):
        notifier.status("x" * 1000)
    notifier.close()


def test_the_environment_is_emptied(manager):
    environ = {
        "NOTIFY_SOCKET": manager.getsockname(),
        "WATCHDOG_USEC": "30000000",
        "WATCHDOG_PID": str(os.getpid()),
        "LISTEN_PID": "1",
        "LISTEN_FDS": "1",
        "LISTEN_FDNAMES": "registry",
        "HOME": "/",
    }
    met = read_service_manager(environ)
    assert environ == {"HOME": "/"}
    assert met.watchdog == 30
    assert met.sockets == {}, "they are for another process"
    met.notifier.ready("here")
    assert heard(manager)["READY"] == "1"
    met.notifier.close()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, 0),
        ({"WATCHDOG_USEC": "2500000"}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "1"}, 0),
        ({"WATCHDOG_USEC": "soon"}, 0),
    ],
)
def test_the_watchdog_is_ours_only_if_it_says_so(environ, seconds):
    assert read_service_manager(environ).watchdog == seconds


# Run where nothing else has the descriptors from 3 on, as a service manager starts it.
MEET = """
import os
from proxy.errors import ConfigError
from proxy.systemd import read_service_manager
os.environ["LISTEN_PID"] = str(os.getpid())
try:
    met = read_service_manager(os.environ)
except ConfigError as error:
    print("refused:", error)
else:
    for name, sockets in sorted(met.sockets.items()):
        for one in sockets:
            print(name, one.getsockname(), os.get_inheritable(one.fileno()))
"""


def met(names: str | None, *passed: int) -> list[str]:
    """Return what a process makes of the descriptors, which it gets as 3, 4 and so on."""
    moves = " ".join(f"{3 + position}<&{fd}" for position, fd in enumerate(passed))
    environ = {"LISTEN_FDS": str(len(passed)), "PATH": os.environ["PATH"]}
    if names is not None:
        environ["LISTEN_FDNAMES"] = names
    done = subprocess.run(
        ["bash", "-c", f'exec "$@" {moves}', "bash", sys.executable, "-c", MEET],
        pass_fds=passed,
        env=environ,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.fixture
def listeners(tmp_path: Path) -> Iterator[list[socket.socket]]:
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        socket.create_server(("127.0.0.2", 0)) as second,
        socket.socket(socket.AF_UNIX) as local,
    ):
        local.bind(str(tmp_path / "admin"))
        local.listen()
        # Away from the numbers that they are to get.
        high = [fcntl.fcntl(one.fileno(), fcntl.F_DUPFD, 50) for one in (first, second, local)]
        sockets = [socket.socket(fileno=fd) for fd in high]
        yield sockets
        for one in sockets:
            one.close()


def test_several_sockets_are_told_apart_by_their_names(listeners, tmp_path):
    first, second, local = listeners
    assert met("registry:admin:registry", first.fileno(), local.fileno(), second.fileno()) == [
        f"admin {tmp_path / 'admin'} False",
        f"registry {first.getsockname()} False",
        f"registry {second.getsockname()} False",
    ]


@pytest.mark.parametrize("names", [None, "unknown", "pullcache.socket", ""])
def test_a_socket_without_a_name_is_for_clients(listeners, names):
    first = listeners[0]
    assert met(names, first.fileno()) == [f"registry {first.getsockname()} False"]


def test_a_socket_of_another_name_is_refused_with_the_names_there_are(listeners):
    (said,) = met("amdin", listeners[0].fileno())
    assert said == "refused: FileDescriptorName=amdin: no such socket (known: registry, admin)"


def test_what_cannot_be_listened_on_is_refused(tmp_path):
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_INET) as deaf,
    ):
        (said,) = met("registry", file)
        assert "no socket" in said
        for one in (datagrams, deaf):
            (said,) = met("registry", one.fileno())
            assert "does not listen for streams" in said
    os.close(file)
