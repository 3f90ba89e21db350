"""The daemon under test, and Debian's docker-registry as its upstream."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.ports import reserve_port
from tests.system.http_client import has_status, send_request
from tests.system.processes import Process, eventually, run

REGISTRY_CONFIG = """\
version: 0.1
log: {{accesslog: {{disabled: false}}}}
storage: {{filesystem: {{rootdirectory: {root}}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""
# The password of `puller` is `pull me`.
HTPASSWD = "puller:$2b$05$LoRoyS1ljn49pPORqadrnergzPbl1kHJfGSiEUvEB2uwzb18fd2kS\n"


class Registry:
    """docker-registry on a free port, which it keeps when it is restarted.

    `auth` is the part of its configuration that requires a login or a token. A change of it applies
    from the next start.
    """

    def __init__(self, directory: Path) -> None:
        self.auth = ""
        self._directory = directory
        self._port = reserve_port(self)
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
        status = 401 if self.auth else 200
        process.wait_until(lambda: has_status(self.url, "/v2/", status), "a response")

    def stop(self) -> None:
        if self._process:
            self._process.stop()
            self._process = None

    def requests(self) -> list[str]:
        """Return the requests of its access log, as `METHOD PATH`, oldest first."""
        log = (self._directory / "registry.out.log").read_text()
        return re.findall(r'"((?:GET|HEAD) /v2/\S+) HTTP', log)

    def direct_requests(self) -> list[str]:
        """Return the lines of its access log that are not about requests of a cache."""
        log = (self._directory / "registry.out.log").read_text()
        return [
            line
            for line in log.splitlines()
            if re.search(r'"(?:GET|HEAD) /v2/', line) and '"pullcache/' not in line
        ]


def htpasswd_auth(directory: Path) -> str:
    """Return the `auth` of a registry that only `puller` can pull from."""
    htpasswd = directory / "htpasswd"
    htpasswd.write_text(HTPASSWD)
    return f"auth: {{htpasswd: {{realm: here, path: {htpasswd}}}}}\n"


class Daemon:
    """`pullcache serve` as a process, which keeps its address and its store over restarts."""

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
        self._listen = f"127.0.0.1:{reserve_port(self)}"
        self._stdout_offset = 0  # earlier starts wrote the stdout before it
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
    def startup_output(self) -> str:
        """Return the stdout since the last start."""
        return self.process.stdout_log.read_text()[self._stdout_offset :]

    @property
    def log(self) -> str:
        return (self._directory / "daemon.err.log").read_text()

    @property
    def program(self) -> Sequence[str]:
        """Return the command line of pullcache, without a command."""
        return [sys.executable, "-m", "proxy"]

    def serve_command(self, listen: str | None = None, store: Path | None = None) -> Sequence[str]:
        """Return the command line of `serve`, optionally with another address or store."""
        return [
            *self.program,
            "serve",
            *("--listen", listen or self._listen),
            *("--store", str(store or self.store)),
            *("--max-size", self._max_size),
            *("--upstream", f"docker.io={self._upstream}"),
        ]

    def start(self) -> None:
        """Start the daemon and wait until it is ready."""
        stdout_log = self._directory / "daemon.out.log"
        self._stdout_offset = len(stdout_log.read_text()) if stdout_log.exists() else 0
        command = self.serve_command()
        self._process = process = Process(self._directory, "daemon", command, env=self._env)
        process.wait_until(lambda: self.url in self.startup_output, "its address")
        process.wait_until(lambda: has_status(self.url, "/readyz"), "readiness")

    def send_sigterm(self) -> None:
        """Send SIGTERM and do not wait for the exit."""
        self.process.signal(signal.SIGTERM)

    def stop(self, timeout: float = 30) -> int:
        """Stop the daemon with SIGTERM and return its exit code."""
        code = self.process.stop(timeout)
        self._process = None
        return code

    def kill(self) -> None:
        self.process.kill()
        self._process = None

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the metric's samples that have all the given labels."""
        return sum_samples(send_request(self.url, "/metrics").body.decode(), name, labels)

    def upstream_bytes(self) -> float:
        return self.metric("pullcache_upstream_bytes_total")

    def run(self, *arguments: str | Path, timeout: float = 60) -> str:
        """Run a command of pullcache, as `policy list`, on the daemon's store; return its stdout."""
        name, *rest = arguments
        command = str(name).split()
        return run(*self.program, *command, "--store", self.store, *rest, timeout=timeout)

    def manifest_digest(self, repository: str, tag: str) -> str:
        """Return the digest of the manifest that the daemon serves for a tag."""
        response = send_request(self.url, f"/v2/{repository}/manifests/{tag}")
        assert response.status == 200, response
        return response.headers["Docker-Content-Digest"]

    def finish(self) -> None:
        """Stop a running daemon; check that it exits with 0 and that no start logged a traceback."""
        if self._process:
            assert self.stop() == 0, self.log[-4000:]
        log = self.log
        assert "Traceback" not in log, log[max(0, log.find("Traceback") - 2000) :][:8000]


def sum_samples(exposition: str, name: str, labels: Mapping[str, str]) -> float:
    """Return the sum of a metric's samples that have all the given labels."""
    expected = [f'{key}="{value}"' for key, value in labels.items()]
    samples = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)", exposition, re.MULTILINE)
    return sum(float(value) for tags, value in samples if all(label in tags for label in expected))


def resumable_bytes(store: Path) -> int:
    """Return how many bytes of the largest partial download can be resumed."""
    sizes = [0]
    for path in (store / "ingest").glob("*.state"):
        try:
            state = json.loads(path.read_bytes().rstrip(b"\0 "))
        except (ValueError, FileNotFoundError):
            continue  # it is being written, or its blob has just been committed
        sizes.append(state["have"] + sum(stop - start for start, stop in state["ahead"]))
    return max(sizes)


def run_until_exit(command: Sequence[str], directory: Path, timeout: float = 20) -> tuple[int, str]:
    """Run a command that should fail; return its exit code and its stderr."""
    process = Process(directory, "failing", command)
    try:
        return process.wait(timeout), process.stderr_log.read_text()
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def wait_until_refused(url: str, timeout: float = 20) -> None:
    """Wait until connections to `url` are refused."""

    def is_refused() -> bool:
        try:
            send_request(url, "/healthz", timeout=5)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False

    eventually(is_refused, f"{url} refuses connections", timeout=timeout)
