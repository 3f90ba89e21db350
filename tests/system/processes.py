"""Programs as the tests run them: each in a directory of its own, watched, and ended by its pid."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens, so a way out ends on loopback

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")


def short_directory() -> Path:
    """Return a new directory; its path leaves room for sockets, and for podman, which takes 50 characters."""
    return Path(tempfile.mkdtemp(prefix="test-"))


def eventually(condition: Callable[[], T], what: str, *, deadline: float = 20) -> T:
    """Return the first true value of `condition`; fail, naming `what`, when none comes in time."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {deadline:g} s in vain: {what}"
        time.sleep(0.02)
    return value


def fenced(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return our environment with every way off this machine closed.

    Clients that give up on a mirror go to Docker Hub; here they must fail instead.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PULLCACHE_")}
    proxies = dict.fromkeys(PROXIES, NOWHERE)
    loopback = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    return {**inherited, **proxies, **loopback, **(extra or {})}


def open_to_pip() -> dict[str, str]:
    """Return what opens the fence again for pip, which asks what it asks on this machine anyway."""
    return {name: os.environ.get(name, "") for name in (*PROXIES, "NO_PROXY", "no_proxy")}


def run(*argv: str | Path, env: Mapping[str, str] | None = None, timeout: float = 60) -> str:
    """Run a command to its end and return what it printed; a failure shows both its streams."""
    done = subprocess.run(
        [str(part) for part in argv],
        env=fenced(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, (
        f"{argv[0]} ended with {done.returncode}: {argv}\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


class Process:
    """A server: its streams go to `NAME.out.log` and `NAME.err.log` in its directory."""

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
        self.argv = [str(part) for part in argv]
        self.out = directory / f"{name}.out.log"
        self.err = directory / f"{name}.err.log"
        directory.mkdir(parents=True, exist_ok=True)
        with self.out.open("ab") as out, self.err.open("ab") as err:
            self._popen = subprocess.Popen(
                self.argv,
                env=fenced(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                pass_fds=pass_fds,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def running(self) -> bool:
        return self._popen.poll() is None

    def wait_until(self, condition: Callable[[], T], what: str, *, deadline: float = 20) -> T:
        """Wait for a true `condition`; a process that ends meanwhile fails at once, with its log."""

        def step() -> T | None:
            value = condition()
            if not value:
                assert self.running(), f"{self.name} ended, {what}: {self.err.read_text()[-4000:]}"
            return value or None

        value = eventually(step, f"{self.name}: {what}", deadline=deadline)
        assert value is not None
        return value

    def wait(self, deadline: float = 20) -> int:
        return self._popen.wait(timeout=deadline)

    def signal(self, signum: signal.Signals) -> None:
        self._popen.send_signal(signum)

    def stop(self, deadline: float = 20) -> int:
        """End it by SIGTERM and return its exit code; what does not end in time is killed."""
        if self.running():
            self._popen.terminate()
        try:
            return self.wait(deadline)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """End it as a crash or the OOM killer does."""
        self._popen.kill()
        self._popen.wait()
