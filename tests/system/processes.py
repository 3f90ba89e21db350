"""Runs programs for tests: commands to their end, and servers with their logs in a directory."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# The discard port of loopback: nothing listens there, so connections are refused at once.
UNREACHABLE = "http://127.0.0.1:9"

PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")


def make_short_directory() -> Path:
    """Create a directory with a path short enough for Unix sockets, and for podman's limit of 50 characters."""
    return Path(tempfile.mkdtemp(prefix="test-"))


def eventually(condition: Callable[[], T], what: str, *, timeout: float = 40) -> T:
    """Return the first true value of `condition`; after `timeout` seconds, fail with `what`."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.02)
    return value


def isolated_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return our environment with HTTP proxies that refuse all connections beyond loopback.

    A client whose mirror fails asks Docker Hub next: in the tests it must fail instead.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PULLCACHE_")}
    proxies = dict.fromkeys(PROXY_VARIABLES, UNREACHABLE)
    loopback = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    return {**inherited, **proxies, **loopback, **(extra or {})}


def network_environment() -> dict[str, str]:
    """Return the variables that give a command the network access of this process, for pip."""
    return {name: os.environ.get(name, "") for name in (*PROXY_VARIABLES, "NO_PROXY", "no_proxy")}


def run(*argv: str | Path, env: Mapping[str, str] | None = None, timeout: float = 60) -> str:
    """Run a command and return its stdout. If it fails, the assertion shows both streams."""
    done = subprocess.run(
        [str(argument) for argument in argv],
        env=isolated_environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, (
        f"{argv[0]} exited with {done.returncode}: {argv}\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


# The servers that were started since the last `kill_servers`.
_started: list["Process"] = []


def kill_servers() -> list[str]:
    """Kill every `Process` that is still running; return the names of those processes."""
    running = [process for process in _started if process.is_running()]
    _started.clear()
    for process in running:
        process.kill()
    return [process.name for process in running]


class Process:
    """A running server. Its streams go to `NAME.out.log` and `NAME.err.log` in its directory."""

    def __init__(
        self,
        directory: Path,
        name: str,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.argv = [str(argument) for argument in argv]
        self.stdout_log = directory / f"{name}.out.log"
        self.stderr_log = directory / f"{name}.err.log"
        directory.mkdir(parents=True, exist_ok=True)
        with self.stdout_log.open("ab") as stdout, self.stderr_log.open("ab") as stderr:
            self._popen = subprocess.Popen(
                self.argv,
                env=isolated_environment(env),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=pass_fds,
            )
        _started.append(self)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def is_running(self) -> bool:
        return self._popen.poll() is None

    def wait_until(self, condition: Callable[[], T], what: str, *, timeout: float = 40) -> T:
        """Return the first true value of `condition`; fail at once, with the log, if the process exits."""

        def check() -> T | None:
            value = condition()
            if not value:
                assert self.is_running(), (
                    f"{self.name} exited before {what}: {self.stderr_log.read_text()[-4000:]}"
                )
            return value or None

        value = eventually(check, f"{self.name}: {what}", timeout=timeout)
        assert value is not None
        return value

    def wait(self, timeout: float = 20) -> int:
        """Wait for the process to exit and return its exit code."""
        return self._popen.wait(timeout=timeout)

    def signal(self, signum: signal.Signals) -> None:
        self._popen.send_signal(signum)

    def stop(self, timeout: float = 20) -> int:
        """Send SIGTERM and return the exit code. If the process does not exit in time, kill it and raise."""
        if self.is_running():
            self._popen.terminate()
        try:
            return self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """Send SIGKILL, as the OOM killer does."""
        self._popen.kill()
        self._popen.wait()
