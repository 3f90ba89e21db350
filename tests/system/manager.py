"""A service manager in small: it holds the sockets, starts the daemon with them, and hears what it says."""

import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
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

State = dict[str, str]


class Manager:
    """Runs one daemon at a time on one store, behind a socket that outlives it."""

    def __init__(self, directory: Path, upstream: str, *, watchdog: float = 0.0) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.config = directory / "pullcache.toml"
        self.heard: list[State] = []
        self._watchdog = watchdog
        self._process: Process | None = None
        directory.mkdir(parents=True)
        self.configure(upstream)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(directory / "notify"))
        self.sockets: dict[str, socket.socket] = {
            "registry": socket.create_server(("127.0.0.1", 0), backlog=1024)
        }

    def configure(self, upstream: str, more: str = "") -> None:
        """Write the configuration; a daemon that runs does not know it yet."""
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

    def start(self, *before: str) -> None:
        """Start the daemon, perhaps under another program, and wait until it says that it is ready."""
        serve = (sys.executable, "-m", "proxy", "serve", "--config", str(self.config))
        fds = [one.fileno() for one in self.sockets.values()]
        moves = " ".join(f"{3 + place}<&{fd}" for place, fd in enumerate(fds))
        self.heard.clear()
        self._process = Process(
            self.directory,
            "daemon",
            ["bash", "-c", f'export LISTEN_PID=$$; exec "$@" {moves}', "bash", *before, *serve],
            env=self._environment(),
            pass_fds=fds,
        )
        self.hear("READY")

    def _environment(self) -> Mapping[str, str]:
        environment = {
            "NOTIFY_SOCKET": str(self.directory / "notify"),
            "LISTEN_FDS": str(len(self.sockets)),
            "LISTEN_FDNAMES": ":".join(self.sockets),
        }
        if self._watchdog:
            environment["WATCHDOG_USEC"] = f"{self._watchdog * 1e6:.0f}"
        return environment

    def hear(self, name: str) -> State:
        """Wait for the next thing that is said with `name` in it, and return it."""

        def said() -> State | None:
            return self.listen() if self.is_talking(0.1) else None

        while True:
            state = self.process.wait_until(said, f"{name}, after {self.heard}")
            assert state
            if name in state:
                return state

    def is_talking(self, seconds: float) -> bool:
        """Tell whether something is said within so many seconds."""
        return bool(select.select([self._notify], [], [], seconds)[0])

    def listen(self) -> State:
        """Return what is said next."""
        text = self._notify.recv(4096).decode()
        state = dict(line.split("=", 1) for line in text.split("\n"))
        self.heard.append(state)
        return state

    def reload(self) -> None:
        """Send SIGHUP, and wait until the daemon has said that it is over."""
        self.process.signal(signal.SIGHUP)
        self.hear("RELOADING")
        self.hear("READY")

    def stop(self, deadline: float = 30) -> int:
        code = self.process.stop(deadline)
        self._process = None
        return code

    def finish(self) -> None:
        """End what still runs, check that it ends well, and let the sockets go."""
        try:
            if self._process and self.process.running():
                assert self.stop() == 0, self.log[-4000:]
        finally:
            for one in (self._notify, *self.sockets.values()):
                one.close()
        assert "Traceback" not in self.log, self.log[-8000:]


MakeManager = Callable[..., Manager]
Command = Sequence[str]
