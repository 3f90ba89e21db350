"""The service manager's protocol: state notifications, watchdog and passed sockets.

sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3). The variables are removed from the
environment, so that credential helpers do not send notifications as the service. Without a service
manager, all of this does nothing.
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

# Names of a socket without FileDescriptorName= (sd_listen_fds_with_names(3)).
_DEFAULT_SOCKET_NAMES = ("unknown", "connection", "")
_FIRST_FD = 3
_VARIABLES = (
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"),
    *("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"),
)

log = get_logger(__name__)


class Notifier:
    """Sends the state of the service to the manager at `address`; does nothing if that is empty.

    Never blocks: a message that the manager cannot take immediately is dropped, and logged.
    """

    def __init__(self, address: str = "") -> None:
        # @ stands for the NUL byte that begins an address in Linux's abstract namespace.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    def close(self) -> None:
        """Stop sending."""
        if self._socket:
            self._socket.close()
            self._socket = None

    def ready(self, status: str) -> None:
        """Report that clients can connect, after the start or a reload."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Report the start of a reload; `ready` must follow."""
        microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={microseconds}")

    def stopping(self) -> None:
        """Report the start of the shutdown."""
        self._send("STOPPING=1", "STATUS=stopping: finishing running responses")

    def extend_timeout(self, status: str, seconds: float) -> None:
        """Ask for `seconds` more before the start or the shutdown counts as failed."""
        self._send(f"EXTEND_TIMEOUT_USEC={seconds * 1e6:.0f}", f"STATUS={status}")

    def ping_watchdog(self, status: str) -> None:
        """Reset the watchdog and report the status line."""
        self._send("WATCHDOG=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """Report the status line."""
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
    """The service manager. `watchdog` is its timeout in seconds, 0 for none.

    `sockets` are listening already, by purpose: `REGISTRY_SOCKET` or `ADMIN_SOCKET`.
    """

    notifier: Notifier
    watchdog: float = 0.0
    sockets: Mapping[str, Sequence[socket.socket]] = field(default_factory=dict)


def read_service_manager(environ: MutableMapping[str, str]) -> ServiceManager:
    """Return the manager described in `environ`, and remove its variables from there.

    Raises `ConfigError` if a passed descriptor is not a listening stream socket.
    """
    variables = {name: environ.pop(name, "") for name in _VARIABLES}
    pid = str(os.getpid())
    timeout = variables["WATCHDOG_USEC"]
    is_watched = timeout.isdecimal() and variables["WATCHDOG_PID"] in ("", pid)
    sockets: dict[str, list[socket.socket]] = {}
    if variables["LISTEN_PID"] == pid:
        sockets = _open_passed_sockets(variables["LISTEN_FDS"], variables["LISTEN_FDNAMES"])
    return ServiceManager(
        Notifier(variables["NOTIFY_SOCKET"]), int(timeout) / 1e6 if is_watched else 0.0, sockets
    )


def _open_passed_sockets(count: str, names: str) -> dict[str, list[socket.socket]]:
    if not count.isdecimal():
        return {}
    fds = range(_FIRST_FD, _FIRST_FD + int(count))
    given_names = names.split(":") if names else []
    sockets: dict[str, list[socket.socket]] = {}
    for position, fd in enumerate(fds):
        name = given_names[position] if position < len(given_names) else ""
        sockets.setdefault(_socket_purpose(name), []).append(_open_passed_socket(fd, name))
    return sockets


def _socket_purpose(name: str) -> str:
    # Without FileDescriptorName=, systemd passes the name of the socket unit.
    if name in (REGISTRY_SOCKET, *_DEFAULT_SOCKET_NAMES) or name.endswith(".socket"):
        return REGISTRY_SOCKET
    if name != ADMIN_SOCKET:
        raise ConfigError(
            f"FileDescriptorName={name}: no such socket (known: {REGISTRY_SOCKET}, {ADMIN_SOCKET})"
        )
    return ADMIN_SOCKET


def _open_passed_socket(fd: int, name: str) -> socket.socket:
    """Return the listening stream socket `fd`, closed on exec."""
    try:
        os.set_inheritable(fd, False)
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ConfigError(f"descriptor {fd} ({name}): is not a socket")
        passed = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"descriptor {fd} ({name}): {error.strerror}") from error
    if (
        passed.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
        or passed.type != socket.SOCK_STREAM
        or not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        raise ConfigError(
            f"descriptor {fd} ({name}): is not a listening stream socket "
            "(set ListenStream= and Accept=no)"
        )
    passed.setblocking(False)
    return passed
