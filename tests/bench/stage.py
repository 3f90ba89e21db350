"""Who is measured: pullcache, its peers, and the upstream that all of them ask."""

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
from tests.bench.content import Content
from tests.support.certificates import Authority
from tests.system.images import MANIFEST
from tests.system.processes import Process, eventually
from tests.system.servers import Daemon, Registry, sum_samples
from tests.system.wire import answers, ask

PULLCACHE, OTHER, NGINX, CACHE = "pullcache", "other", "nginx", "proxy_cache"
MIRROR, UPSTREAM = "registry", "upstream"

STORE_SIZE = "20GB"


@dataclass(frozen=True)
class Server:
    """One that is measured, by the name of its column. `home` is where it keeps what it has."""

    name: str
    url: str
    pid: int
    home: Path


class Stage:
    """Everything that runs, each in a directory of its own below `place`.

    `other` is another checkout of pullcache, which is measured wherever this one is.
    """

    def __init__(self, place: Path, content: Content, other: Path | None) -> None:
        self.content = content
        self._place = place
        self._other = other
        self._numbers = count()
        self._upstream = Registry(place / "upstream")
        self._tls = Authority(place / "authority" / "certs").issue("local", "IP:127.0.0.1")

    def __enter__(self) -> Self:
        with ExitStack() as failing:
            failing.callback(self._upstream.stop)
            self._upstream.start()
            self.content.push(self._upstream.url)
            failing.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._upstream.stop()

    def among(self, *names: str) -> list[str]:
        """Return these names, and with ours that of the other checkout if there is one."""
        return [*names, *([OTHER] if self._other and PULLCACHE in names else [])]

    @contextmanager
    def warmed(self, *names: str, tls: bool = False) -> Iterator[list[Server]]:
        """Run these, each with all that will be hit."""
        with ExitStack() as running:
            servers = []
            for name in self.among(*names):
                servers.append(running.enter_context(self.fresh(name, tls=tls)))
                self.warm(servers[-1])
            # What was written for it is not to go to the disk while something is measured, nor its memory back to
            # the host of a virtual machine: while that takes gigabytes, whoever answers waits for 20 ms now and then.
            os.sync()
            for file in filter(Path.is_file, self._place.rglob("*")):
                _forget(file)
            yield servers

    def warm(self, server: Server) -> None:
        """Ask for all that will be hit, which must come back right, and lie there."""
        for path in self.content.hits:
            self.check(server, path)
            self.await_stored(server, path)

    def check(self, server: Server, path: str, content: Content | None = None) -> None:
        """Ask for one thing and compare its digest."""
        answer = ask(server.url, path, headers={"Accept": MANIFEST}, timeout=120)
        assert answer.status == 200, f"{server.name}: {answer.status} for {path}"
        wanted = (content or self.content).digest(path)
        assert answer.sha256 == wanted, f"{server.name}: wrong bytes of {path}"

    def await_stored(self, server: Server, path: str, content: Content | None = None) -> None:
        """Wait until it has all of a thing in its store. docker-registry fetches once more for that."""
        has = partial(_has, server, path, content or self.content)
        eventually(has, f"{server.name} stores {path}", deadline=120)

    def drop(self, server: Server, path: str) -> None:
        """Have the system forget what it has in memory of a file that nginx or pullcache serves."""
        _forget(self.content.file(path) if server.name == NGINX else _blob(server, path))

    @contextmanager
    def fresh(self, name: str, upstream: str = "", *, tls: bool = False) -> Iterator[Server]:
        """Run one of them on an empty store, for as long as the context lasts.

        It asks the stage's upstream, if no other is given by its URL.
        """
        upstream = upstream or self._upstream.url
        home = self._place / f"{name}{next(self._numbers)}"
        if name == UPSTREAM:
            yield Server(name, upstream, 0, home)
        elif name in (PULLCACHE, OTHER):
            # Without the latter our own checkout, the working directory, comes before.
            other = {"PYTHONPATH": str(self._other), "PYTHONSAFEPATH": "1"}
            env = other if name == OTHER else {}
            if tls:
                certificate, key = self._tls
                env["PULLCACHE_SERVER_TLS_CERTIFICATE"] = certificate
                env["PULLCACHE_SERVER_TLS_KEY"] = key
            with pullcache(home, upstream, env) as daemon:
                yield Server(name, daemon.url, daemon.process.pid, home)
        else:
            port = peers.free_port()
            home.mkdir()
            process = Process(home, name, self._peer(name, home, port, upstream, tls=tls))
            try:
                url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
                path = self.content.by_tag if name == NGINX else "/v2/"
                process.wait_until(lambda: answers(url, path), "an answer")
                yield Server(name, url, process.pid, home)
            finally:
                process.stop()
                shutil.rmtree(home)

    @contextmanager
    def throttled(self, content: Content, rate: int) -> Iterator[str]:
        """Serve this content at `rate` bytes a second for each connection; yield the URL."""
        home = self._place / f"throttled{next(self._numbers)}"
        argv = [sys.executable, "-m", "tests.bench.throttled", str(content.root), str(rate)]
        process = Process(home, "throttled", argv)
        try:
            port = process.wait_until(process.out.read_text, "its port").strip()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.stop()

    @property
    def address(self) -> str:
        """Return where the upstream listens, `host:port`."""
        return self._upstream.address

    def asked(self, repository: str) -> int:
        """Return how many requests for that repository upstream has logged."""
        return sum(f"/v2/{repository}/" in request for request in self._upstream.requests())

    def transfers(self, path: str) -> list[int]:
        """Return the bytes of every answer to a GET of `path` that upstream has logged."""
        log = (self._place / "upstream" / "registry.out.log").read_text()
        found = re.findall(rf'"GET {re.escape(path)} HTTP/1\.[01]" \d+ (\d+)', log)
        return [int(size) for size in found]

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
    """Run pullcache for as long as the context lasts; its store goes with it."""
    daemon = Daemon(home, upstream, max_size=max_size, env=env)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.finish()
        shutil.rmtree(home)


def metric(server: Server, name: str) -> float:
    """Return the sum of the samples of one of pullcache's metrics."""
    return sum_samples(ask(server.url, "/metrics").body.decode(), name, {})


def _forget(file: Path) -> None:
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _has(server: Server, path: str, content: Content) -> bool:
    """Tell whether a server's store holds the whole of what is at the path."""
    hexadecimal, size = content.digest(path).partition(":")[2], content.size(path)
    if server.name == MIRROR:
        where = "data/docker/registry/v2/blobs/sha256"
        file = server.home / where / hexadecimal[:2] / hexadecimal / "data"
        return file.exists() and file.stat().st_size == size
    if server.name == CACHE:  # named by nginx when it is complete; a head is before the body
        files = (server.home / "cache").iterdir()
        return any("." not in f.name and f.stat().st_size > size for f in files)
    if server.name in (PULLCACHE, OTHER):
        return _blob(server, content.digest(path)).exists()
    return True


def _blob(server: Server, path: str) -> Path:
    return server.home / "store" / "blobs" / "sha256" / path.rpartition(":")[2]
