"""What a service manager and its service say to each other: sd_notify(3), sd_listen_fds(3).

Everything is in the environment, which is emptied of it: a credential helper that we start is not the
service. Without a manager there is nothing in it, and nothing is said.
"""

import os
import socket
import stat
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

from proxy.errors import ConfigError
from proxy.log import get_logger

REGISTRY_SOCKET = "registry"
ADMIN_SOCKET = "admin"

# What a socket is called that nobody has given a name (sd_listen_fds_with_names(3)).
_DEFAULT_SOCKET_NAMES = ("unknown", "connection", "")
_FIRST_FD = 3
_VARIABLES = (
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"),
    *("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"),
)

log = get_logger(__name__)


class Notifier:
    """Tells the manager at `address` how the service is; nobody, if it is empty.

    Nothing waits: what the manager does not take at once is lost, and logged.
    """

    def __init__(self, address: str = "") -> None:
        # A name that begins with @ is in the abstract namespace, which Linux writes as NUL.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    def close(self) -> None:
        """Say nothing any more."""
        if self._socket:
            self._socket.close()
            self._socket = None

    def ready(self, status: str) -> None:
        """Say that clients can connect: at the start, and when a reload is over."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Say that the configuration is read again; `ready` is to follow."""
        microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={microseconds}")

    def stopping(self) -> None:
        """Say that the service ends."""
        self._send("STOPPING=1", "STATUS=stopping: what is being sent is finished")

    def extend_timeout(self, status: str, seconds: float) -> None:
        """Ask not to be ended for so many seconds, although the start, or the end, takes long."""
        self._send(f"EXTEND_TIMEOUT_USEC={seconds * 1e6:.0f}", f"STATUS={status}")

    def ping_watchdog(self, status: str) -> None:
        """Say that the watchdog need not bite, and how it goes."""
        self._send("WATCHDOG=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """Say how it goes."""
        self._send(f"STATUS={status}")

    def _send(self, *assignments: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto("\n".join(assignments).encode(), self._address)
        except OSError as error:
            log.warning("systemd_notify_failed", state=assignments[0], reason=error.strerror)


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """The service manager. `watchdog` is in seconds, 0 without one; `sockets` listen already, by name."""

    notifier: Notifier
    watchdog: float = 0.0
    sockets: Mapping[str, Sequence[socket.socket]] = field(default_factory=dict)


def read_service_manager(environ: MutableMapping[str, str]) -> ServiceManager:
    """Return the manager that `environ` tells of, which says nothing of it any more.

    Raises `ConfigError` if a socket was passed that cannot be listened on.
    """
    said = {name: environ.pop(name, "") for name in _VARIABLES}
    ours = str(os.getpid())
    is_watched = said["WATCHDOG_USEC"].isdecimal() and said["WATCHDOG_PID"] in ("", ours)
    return ServiceManager(
        Notifier(said["NOTIFY_SOCKET"]),
        int(said["WATCHDOG_USEC"]) / 1e6 if is_watched else 0.0,
        _sockets(said["LISTEN_FDS"], said["LISTEN_FDNAMES"]) if said["LISTEN_PID"] == ours else {},
    )


def _sockets(count: str, names: str) -> dict[str, list[socket.socket]]:
    if not count.isdecimal():
        return {}
    fds = range(_FIRST_FD, _FIRST_FD + int(count))
    given = names.split(":") if names else []
    sockets: dict[str, list[socket.socket]] = {}
    for position, fd in enumerate(fds):
        name = given[position] if position < len(given) else ""
        sockets.setdefault(_socket_purpose(name), []).append(_open_passed_socket(fd, name))
    return sockets


def _socket_purpose(name: str) -> str:
    # A socket unit that gives no name passes its own.
    if name in (REGISTRY_SOCKET, *_DEFAULT_SOCKET_NAMES) or name.endswith(".socket"):
        return REGISTRY_SOCKET
    if name != ADMIN_SOCKET:
        raise ConfigError(
            f"FileDescriptorName={name}: no such socket (known: {REGISTRY_SOCKET}, {ADMIN_SOCKET})"
        )
    return ADMIN_SOCKET


def _open_passed_socket(fd: int, name: str) -> socket.socket:
    """Return the listening stream socket `fd`, which programs that we start do not get."""
    try:
        os.set_inheritable(fd, False)
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ConfigError(
                f"descriptor {fd} ({name}): was passed to listen on, and is no socket"
            )
        passed = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"descriptor {fd} ({name}): {error.strerror}") from error
    if (
        passed.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
        or passed.type != socket.SOCK_STREAM
        or not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        raise ConfigError(
            f"descriptor {fd} ({name}): does not listen for streams (ListenStream=, Accept=no)"
        )
    passed.setblocking(False)
    return passed
