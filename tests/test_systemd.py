"""Messages to the service manager, received by a real notify socket, and the sockets it passes."""

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from proxy.systemd import Notifier, read_service_manager


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5)
        yield listener


def received(manager: socket.socket) -> dict[str, str]:
    text = manager.recv(4096).decode()
    return dict(line.split("=", 1) for line in text.split("\n"))


def test_every_message_is_one_datagram(manager):
    notifier = Notifier(manager.getsockname())
    notifier.extend_timeout("opening the store", 30)
    assert received(manager) == {"EXTEND_TIMEOUT_USEC": "30000000", "STATUS": "opening the store"}
    notifier.ready("serving")
    assert received(manager) == {"READY": "1", "STATUS": "serving"}
    notifier.ping_watchdog("still serving")
    assert received(manager) == {"WATCHDOG": "1", "STATUS": "still serving"}
    notifier.status("serving a lot")
    assert received(manager) == {"STATUS": "serving a lot"}
    notifier.stopping()
    assert received(manager)["STOPPING"] == "1"
    notifier.close()


def test_a_reload_reports_its_start_on_the_monotonic_clock(manager):
    notifier = Notifier(manager.getsockname())
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    message = received(manager)
    assert message["RELOADING"] == "1"
    assert before <= int(message["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    notifier.close()


def test_the_address_may_be_in_the_abstract_namespace():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("")  # the kernel chooses an abstract name
        listener.settimeout(5)
        name = listener.getsockname()
        assert name.startswith(b"\0")
        notifier = Notifier("@" + name[1:].decode())
        notifier.ready("here")
        assert received(listener)["READY"] == "1"
        notifier.close()


def test_without_a_manager_messages_are_dropped(tmp_path):
    for address in ("", str(tmp_path / "none")):
        notifier = Notifier(address)
        notifier.ready("serving")
        notifier.close()
        notifier.ready("after close")


def test_a_manager_that_does_not_read_does_not_block_the_daemon(manager):
    notifier = Notifier(manager.getsockname())
    with capture_logs() as logged:
        while len(logged) < 100:
            notifier.status("x" * 1000)
    notifier.close()
    assert {line["event"] for line in logged} == {"systemd_notify_failed"}


def test_the_variables_are_removed_from_the_environment(manager):
    environ = {
        "NOTIFY_SOCKET": manager.getsockname(),
        "WATCHDOG_USEC": "30000000",
        "WATCHDOG_PID": str(os.getpid()),
        "LISTEN_PID": "1",
        "LISTEN_FDS": "1",
        "LISTEN_FDNAMES": "registry",
        "HOME": "/",
    }
    service_manager = read_service_manager(environ)
    assert environ == {"HOME": "/"}
    assert service_manager.watchdog == 30
    assert service_manager.sockets == {}, "LISTEN_PID is another process"
    service_manager.notifier.ready("here")
    assert received(manager)["READY"] == "1"
    service_manager.notifier.close()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, 0),
        ({"WATCHDOG_USEC": "2500000"}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "1"}, 0),
        ({"WATCHDOG_USEC": "soon"}, 0),
    ],
)
def test_the_watchdog_applies_unless_it_is_for_another_process(environ, seconds):
    assert read_service_manager(environ).watchdog == seconds


# Run in a process of its own, in which the descriptors from 3 on are the passed ones.
SCRIPT = """
import os
from proxy.errors import ConfigError
from proxy.systemd import read_service_manager
os.environ["LISTEN_PID"] = str(os.getpid())
try:
    manager = read_service_manager(os.environ)
except ConfigError as error:
    print("error:", error)
else:
    for name, sockets in sorted(manager.sockets.items()):
        for one in sockets:
            print(name, one.getsockname(), os.get_inheritable(one.fileno()))
"""


def passed_sockets(names: str | None, *descriptors: int) -> list[str]:
    """Pass descriptors to a process as 3, 4 and so on; return the sockets that it reads."""
    moves = " ".join(f"{3 + position}<&{fd}" for position, fd in enumerate(descriptors))
    environ = {"LISTEN_FDS": str(len(descriptors)), "PATH": os.environ["PATH"]}
    if names is not None:
        environ["LISTEN_FDNAMES"] = names
    done = subprocess.run(
        ["bash", "-c", f'exec "$@" {moves}', "bash", sys.executable, "-c", SCRIPT],
        pass_fds=descriptors,
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
        # Keep them clear of the numbers that they will get.
        high = [fcntl.fcntl(one.fileno(), fcntl.F_DUPFD, 50) for one in (first, second, local)]
        sockets = [socket.socket(fileno=fd) for fd in high]
        yield sockets
        for one in sockets:
            one.close()


def test_passed_sockets_are_grouped_by_name(listeners, tmp_path):
    first, second, local = listeners
    assert passed_sockets(
        "registry:admin:registry", first.fileno(), local.fileno(), second.fileno()
    ) == [
        f"admin {tmp_path / 'admin'} False",
        f"registry {first.getsockname()} False",
        f"registry {second.getsockname()} False",
    ]


@pytest.mark.parametrize("names", [None, "unknown", "pullcache.socket", ""])
def test_a_socket_without_a_name_is_for_the_registry(listeners, names):
    first = listeners[0]
    assert passed_sockets(names, first.fileno()) == [f"registry {first.getsockname()} False"]


def test_a_socket_with_an_unknown_name_is_an_error_that_lists_the_known_ones(listeners):
    (line,) = passed_sockets("amdin", listeners[0].fileno())
    assert line == "error: FileDescriptorName=amdin: no such socket (known: registry, admin)"


def test_a_descriptor_that_is_not_a_listening_socket_is_an_error(tmp_path):
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_INET) as not_listening,
    ):
        (line,) = passed_sockets("registry", file)
        assert "is not a socket" in line
        for one in (datagrams, not_listening):
            (line,) = passed_sockets("registry", one.fileno())
            assert "is not a listening stream socket" in line
    os.close(file)
