"""A small service manager: it holds the sockets, starts the daemon with them and receives its messages.

It does what systemd does for a service with `Type=notify` and sockets: sd_notify(3),
sd_listen_fds(3).
"""

import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.system.processes import Process

CONFIG = """\
[log]
format = "json"
[store]
path = "{store}"
max_size = "1GB"
min_free = "0B"
[upstreams."docker.io"]
url = "{upstream}"
"""
FIRST_SOCKET_FD = 3  # SD_LISTEN_FDS_START

Message = dict[str, str]


class FakeServiceManager:
    """Runs one daemon at a time on one store, behind a socket that stays open between the daemons."""

    def __init__(self, directory: Path, upstream: str, *, watchdog: float = 0.0) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.config = directory / "pullcache.toml"
        self.messages: list[Message] = []
        self._watchdog = watchdog
        self._process: Process | None = None
        directory.mkdir(parents=True)
        self.configure(upstream)
        self._notify_socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify_socket.bind(str(directory / "notify"))
        self.sockets: dict[str, socket.socket] = {
            "registry": socket.create_server(("127.0.0.1", 0), backlog=1024)
        }

    def configure(self, upstream: str, more: str = "") -> None:
        """Write the configuration; a running daemon reads it at the next reload."""
        self.config.write_text(CONFIG.format(store=self.store, upstream=upstream) + more)

    @property
    def address(self) -> str:
        return "{}:{}".format(*self.sockets["registry"].getsockname())

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def process(self) -> Process:
        assert self._process
        return self._process

    @property
    def log(self) -> str:
        return (self.directory / "daemon.err.log").read_text()

    def start(self, *wrapper: str) -> None:
        """Start the daemon, optionally as the command of `wrapper`, and wait until it reports READY."""
        serve = (sys.executable, "-m", "proxy", "serve", "--config", str(self.config))
        fds = [one.fileno() for one in self.sockets.values()]
        redirections = " ".join(
            f"{target}<&{fd}" for target, fd in enumerate(fds, start=FIRST_SOCKET_FD)
        )
        script = f'export LISTEN_PID=$$; exec "$@" {redirections}'
        self.messages.clear()
        self._process = Process(
            self.directory,
            "daemon",
            ["bash", "-c", script, "bash", *wrapper, *serve],
            env=self._environment(),
            pass_fds=fds,
        )
        self.wait_for("READY")

    def _environment(self) -> Mapping[str, str]:
        environment = {
            "NOTIFY_SOCKET": str(self.directory / "notify"),
            "LISTEN_FDS": str(len(self.sockets)),
            "LISTEN_FDNAMES": ":".join(self.sockets),
        }
        if self._watchdog:
            environment["WATCHDOG_USEC"] = f"{self._watchdog * 1e6:.0f}"
        return environment

    def wait_for(self, name: str) -> Message:
        """Wait for the next message that contains `name`, and return it."""

        def receive() -> Message | None:
            return self.receive() if self.has_message(0.1) else None

        while True:
            message = self.process.wait_until(receive, f"{name}, after {self.messages}")
            assert message
            if name in message:
                return message

    def has_message(self, timeout: float) -> bool:
        """Return whether a message arrives within `timeout` seconds."""
        return bool(select.select([self._notify_socket], [], [], timeout)[0])

    def receive(self) -> Message:
        """Return the next message."""
        text = self._notify_socket.recv(4096).decode()
        message = dict(line.split("=", 1) for line in text.split("\n"))
        self.messages.append(message)
        return message

    def reload(self) -> None:
        """Send SIGHUP and wait until the daemon reports the end of its reload."""
        self.process.signal(signal.SIGHUP)
        self.wait_for("RELOADING")
        self.wait_for("READY")

    def stop(self, timeout: float = 30) -> int:
        """Stop the daemon with SIGTERM and return its exit code."""
        code = self.process.stop(timeout)
        self._process = None
        return code

    def finish(self) -> None:
        """Stop a running daemon, check its exit code and log, and close the sockets."""
        try:
            if self._process and self.process.is_running():
                assert self.stop() == 0, self.log[-4000:]
        finally:
            for one in (self._notify_socket, *self.sockets.values()):
                one.close()
        assert "Traceback" not in self.log, self.log[-8000:]


MakeServiceManager = Callable[..., FakeServiceManager]
