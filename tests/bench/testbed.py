"""Runs the measured programs: pullcache, its peers, and the upstream of all of them."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Self

from tests.bench import peers
from tests.bench.content import BenchContent
from tests.support.certificates import Authority
from tests.system.http_client import has_status, send_request
from tests.system.images import MANIFEST
from tests.system.processes import Process, eventually
from tests.system.servers import Daemon, Registry, sum_samples

PULLCACHE, OTHER, NGINX, CACHE = "pullcache", "other", "nginx", "proxy_cache"
MIRROR, UPSTREAM = "registry", "upstream"

STORE_SIZE = "20GB"


@dataclass(frozen=True)
class ServerProcess:
    """A running program, by the name of its column in the table; `home` is its directory."""

    name: str
    url: str
    pid: int
    home: Path


class Testbed:
    """Starts servers, each in its own directory below `directory`.

    `other` is another checkout of pullcache, which is measured wherever this one is.
    """

    def __init__(self, directory: Path, content: BenchContent, other: Path | None) -> None:
        self.content = content
        self._directory = directory
        self._other = other
        self._numbers = count()
        self._upstream = Registry(directory / "upstream")
        self._tls = Authority(directory / "authority" / "certs").issue("local", "IP:127.0.0.1")

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._upstream.stop)
            self._upstream.start()
            self.content.push(self._upstream.url)
            stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._upstream.stop()

    def with_other(self, *names: str) -> list[str]:
        """Return these names; if pullcache is among them, add the other checkout's name."""
        return [*names, *([OTHER] if self._other and PULLCACHE in names else [])]

    @contextmanager
    def running_with_content(self, *names: str, tls: bool = False) -> Iterator[list[ServerProcess]]:
        """Run these servers, each with the content for hits in its store."""
        with ExitStack() as stack:
            servers = []
            for name in self.with_other(*names):
                servers.append(stack.enter_context(self.running(name, tls=tls)))
                self.fill(servers[-1])
            # So that neither writeback, nor the return of memory to the host of a virtual machine, disturbs the
            # measurement: after gigabytes of content, responses took 20 ms more now and then.
            os.sync()
            for file in filter(Path.is_file, self._directory.rglob("*")):
                _drop_from_page_cache(file)
            yield servers

    def fill(self, server: ServerProcess) -> None:
        """Request the content for hits, check it, and wait until the server has stored it."""
        for path in self.content.hits:
            self.check(server, path)
            self.wait_until_stored(server, path)

    def check(self, server: ServerProcess, path: str, content: BenchContent | None = None) -> None:
        """Request `path` and check the digest of the body."""
        response = send_request(server.url, path, headers={"Accept": MANIFEST}, timeout=120)
        assert response.status == 200, f"{server.name}: {response.status} for {path}"
        expected = (content or self.content).digest(path)
        assert response.sha256 == expected, f"{server.name}: wrong bytes for {path}"

    def wait_until_stored(
        self, server: ServerProcess, path: str, content: BenchContent | None = None
    ) -> None:
        """Wait until the server has stored all of `path`; docker-registry fetches it twice for that."""
        is_stored = partial(_is_stored, server, path, content or self.content)
        eventually(is_stored, f"{server.name} stores {path}", timeout=120)

    def drop_from_memory(self, server: ServerProcess, path: str) -> None:
        """Drop a file that nginx or pullcache serves from the page cache."""
        file = self.content.file(path) if server.name == NGINX else _blob_file(server, path)
        _drop_from_page_cache(file)

    @contextmanager
    def running(
        self, name: str, upstream: str = "", *, tls: bool = False
    ) -> Iterator[ServerProcess]:
        """Run one server with an empty store. Its upstream is the testbed's, or the given URL."""
        upstream = upstream or self._upstream.url
        home = self._directory / f"{name}{next(self._numbers)}"
        if name == UPSTREAM:
            yield ServerProcess(name, upstream, 0, home)
        elif name in (PULLCACHE, OTHER):
            # Without PYTHONSAFEPATH the working directory, which is this checkout, would come first.
            other = {"PYTHONPATH": str(self._other), "PYTHONSAFEPATH": "1"}
            env = other if name == OTHER else {}
            if tls:
                certificate, key = self._tls
                env["PULLCACHE_SERVER_TLS_CERTIFICATE"] = certificate
                env["PULLCACHE_SERVER_TLS_KEY"] = key
            with pullcache(home, upstream, env) as daemon:
                yield ServerProcess(name, daemon.url, daemon.process.pid, home)
        else:
            port = peers.free_port()
            home.mkdir()
            process = Process(home, name, self._peer(name, home, port, upstream, tls=tls))
            try:
                url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
                path = self.content.by_tag if name == NGINX else "/v2/"
                process.wait_until(lambda: has_status(url, path), "a response")
                yield ServerProcess(name, url, process.pid, home)
            finally:
                process.stop()
                shutil.rmtree(home)

    @contextmanager
    def throttled(self, content: BenchContent, rate: int) -> Iterator[str]:
        """Serve this content at `rate` bytes per second and connection; yield the URL."""
        home = self._directory / f"throttled{next(self._numbers)}"
        argv = [sys.executable, "-m", "tests.bench.throttled_server", str(content.root), str(rate)]
        process = Process(home, "throttled", argv)
        try:
            port = process.wait_until(process.stdout_log.read_text, "its port").strip()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.stop()

    @property
    def address(self) -> str:
        """Return the upstream's `host:port`."""
        return self._upstream.address

    def count_requests(self, repository: str) -> int:
        """Return how many requests for the repository the upstream has logged."""
        return sum(f"/v2/{repository}/" in request for request in self._upstream.requests())

    def transfers(self, path: str) -> list[int]:
        """Return the size of every response to a GET of `path` that the upstream has logged."""
        log = (self._directory / "upstream" / "registry.out.log").read_text()
        sizes = re.findall(rf'"GET {re.escape(path)} HTTP/1\.[01]" \d+ (\d+)', log)
        return [int(size) for size in sizes]

    def _peer(
        self, name: str, home: Path, port: int, upstream: str, *, tls: bool
    ) -> list[str | Path]:
        if name == NGINX:
            return peers.static_nginx(home, port, self.content.root, self._tls if tls else None)
        if name == CACHE:
            return peers.caching_nginx(home, port, upstream)
        return peers.mirror(home, port, upstream)


@contextmanager
def pullcache(
    home: Path, upstream: str, env: dict[str, str] | None = None, max_size: str = STORE_SIZE
) -> Iterator[Daemon]:
    """Run pullcache, and remove its store at the end."""
    daemon = Daemon(home, upstream, max_size=max_size, env=env)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.finish()
        shutil.rmtree(home)


def metric(server: ServerProcess, name: str) -> float:
    """Return the sum of the samples of a metric of pullcache."""
    return sum_samples(send_request(server.url, "/metrics").body.decode(), name, {})


def _drop_from_page_cache(file: Path) -> None:
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _is_stored(server: ServerProcess, path: str, content: BenchContent) -> bool:
    """Return whether a server has stored all of `path`."""
    hexadecimal, size = content.digest(path).partition(":")[2], content.size(path)
    if server.name == MIRROR:
        blobs = server.home / "data/docker/registry/v2/blobs/sha256"
        file = blobs / hexadecimal[:2] / hexadecimal / "data"
        return file.exists() and file.stat().st_size == size
    if server.name == CACHE:
        # nginx gives a complete file its final name, without a dot. The file starts with a header.
        files = (server.home / "cache").iterdir()
        return any("." not in f.name and f.stat().st_size > size for f in files)
    if server.name in (PULLCACHE, OTHER):
        return _blob_file(server, content.digest(path)).exists()
    return True


def _blob_file(server: ServerProcess, path: str) -> Path:
    return server.home / "store" / "blobs" / "sha256" / path.rpartition(":")[2]
