"""The daemon under test, and Debian's docker-registry as the upstream it asks."""

import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.system.processes import Process, eventually, run
from tests.system.wire import answers, ask

REGISTRY_CONFIG = """\
version: 0.1
log: {{accesslog: {{disabled: false}}}}
storage: {{filesystem: {{rootdirectory: {root}}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""
# What the user `puller` logs in with is `pull me`, by bcrypt.
HTPASSWD = "puller:$2b$05$LoRoyS1ljn49pPORqadrnergzPbl1kHJfGSiEUvEB2uwzb18fd2kS\n"


class Registry:
    """docker-registry on a port of its own, which it keeps when it is stopped and started again.

    From the next start on it wants a login, or a token, if `auth` says so: that part of its configuration.
    """

    def __init__(self, directory: Path) -> None:
        self.auth = ""
        self._directory = directory
        self._port = 0
        self._process: Process | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def start(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        config = self._directory / "config.yml"
        root = self._directory / "data"
        config.write_text(REGISTRY_CONFIG.format(root=root, port=self._port) + self.auth)
        process = Process(self._directory, "registry", ["docker-registry", "serve", config])
        self._process = process

        def bound() -> str:
            found = re.findall(r"listening on 127\.0\.0\.1:(\d+)", process.err.read_text())
            return found[-1] if found else ""

        self._port = int(process.wait_until(bound, "its address"))
        status = 401 if self.auth else 200
        process.wait_until(lambda: answers(self.url, "/v2/", status), "an answer")

    def stop(self) -> None:
        if self._process:
            self._process.stop()
            self._process = None

    def requests(self) -> list[str]:
        """Return what its access log says it was asked to serve, oldest first."""
        log = (self._directory / "registry.out.log").read_text()
        return re.findall(r'"((?:GET|HEAD) /v2/\S+) HTTP', log)


def by_password(directory: Path) -> str:
    """Return the `auth` of a registry that only `puller` reads."""
    logins = directory / "htpasswd"
    logins.write_text(HTPASSWD)
    return f"auth: {{htpasswd: {{realm: here, path: {logins}}}}}\n"


class Daemon:
    """`pullcache serve` as a process; it keeps its address and its store over restarts."""

    def __init__(
        self,
        directory: Path,
        upstream: str,
        *,
        max_size: str = "1GB",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.store = directory / "store"
        self._directory = directory
        self._upstream = upstream
        self._max_size = max_size
        self._env = dict(env or {})
        self._listen = "127.0.0.1:0"
        self._said = 0  # how much of stdout earlier starts wrote
        self._process: Process | None = None

    @property
    def url(self) -> str:
        scheme = "https" if "PULLCACHE_SERVER_TLS_CERTIFICATE" in self._env else "http"
        return f"{scheme}://{self._listen}"

    @property
    def address(self) -> str:
        return self._listen

    @property
    def process(self) -> Process:
        assert self._process, "the daemon is not running"
        return self._process

    @property
    def announcement(self) -> str:
        """Return what the last start printed."""
        return self.process.out.read_text()[self._said :]

    @property
    def log(self) -> str:
        return (self._directory / "daemon.err.log").read_text()

    @property
    def python(self) -> Sequence[str]:
        """Return the command line that any sub-command follows."""
        return [sys.executable, "-m", "proxy"]

    def command(self, listen: str | None = None, store: Path | None = None) -> Sequence[str]:
        """Return the command line that serves, perhaps elsewhere than this daemon does."""
        return [
            *self.python,
            "serve",
            *("--listen", listen or self._listen),
            *("--store", str(store or self.store)),
            *("--max-size", self._max_size),
            *("--upstream", f"docker.io={self._upstream}"),
        ]

    def start(self) -> None:
        earlier = self._directory / "daemon.out.log"
        self._said = len(earlier.read_text()) if earlier.exists() else 0
        self._process = process = Process(self._directory, "daemon", self.command(), env=self._env)

        def announced() -> str:
            found = re.search(r"https?://(127\.0\.0\.1:[1-9]\d*)", self.announcement)
            return found[1] if found else ""

        self._listen = process.wait_until(announced, "its announcement")
        process.wait_until(lambda: answers(self.url, "/readyz"), "readiness")

    def ask_to_stop(self) -> None:
        """Send SIGTERM and do not wait."""
        self.process.signal(signal.SIGTERM)

    def stop(self, deadline: float = 30) -> int:
        """End it by SIGTERM and return its exit code."""
        code = self.process.stop(deadline)
        self._process = None
        return code

    def kill(self) -> None:
        self.process.kill()
        self._process = None

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that carry all the given labels."""
        return sum_samples(ask(self.url, "/metrics").body.decode(), name, labels)

    def upstream_bytes(self) -> float:
        return self.metric("pullcache_upstream_bytes_total")

    def run(self, *arguments: str | Path, timeout: float = 60) -> str:
        """Run a command on the daemon's store to its end; return what it printed."""
        name, *rest = arguments
        return run(*self.python, name, "--store", self.store, *rest, timeout=timeout)

    def manifest_digest(self, repository: str, tag: str) -> str:
        """Return what it serves a tag as, without asking for the manifest itself."""
        answer = ask(self.url, f"/v2/{repository}/manifests/{tag}")
        assert answer.status == 200, answer
        return answer.headers["Docker-Content-Digest"]

    def finish(self) -> None:
        """End what still runs and check that no start left a traceback or a bad exit code."""
        if self._process:
            assert self.stop() == 0, self.log[-4000:]
        log = self.log
        assert "Traceback" not in log, log[max(0, log.find("Traceback") - 2000) :][:8000]


def sum_samples(exposition: str, name: str, labels: Mapping[str, str]) -> float:
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    samples = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)", exposition, re.MULTILINE)
    return sum(float(value) for tags, value in samples if all(want in tags for want in wanted))


def run_to_end(command: Sequence[str], directory: Path, deadline: float = 20) -> tuple[int, str]:
    """Run a command that should refuse to go on; return its exit code and its stderr."""
    process = Process(directory, "refused", command)
    try:
        return process.wait(deadline), process.err.read_text()
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def wait_until_refused(url: str, deadline: float = 20) -> None:
    """Wait until nothing accepts connections at `url` any more."""

    def refused() -> bool:
        try:
            ask(url, "/healthz", timeout=5)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False

    eventually(refused, f"{url} stops listening", deadline=deadline)
