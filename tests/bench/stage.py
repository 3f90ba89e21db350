"""Who is measured: pullcache, nginx that serves files, docker-registry as a mirror, and its upstream."""

import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Self

from tests.bench.content import Content
from tests.system.images import MANIFEST
from tests.system.processes import Process
from tests.system.servers import Daemon, Registry
from tests.system.wire import answers, ask

PULLCACHE, OTHER, NGINX, MIRROR, UPSTREAM = "pullcache", "other", "nginx", "registry", "upstream"

STORE_SIZE = "20GB"
NGINX_CONFIG = """\
worker_processes 1;
master_process off;
daemon off;
pid {home}/pid;
error_log {home}/error.log;
events {{ worker_connections 1024; }}
http {{
  sendfile on;
  tcp_nopush on;
  access_log off;
  keepalive_requests 100000000;
  default_type application/octet-stream;
  client_body_temp_path {home}/body;
  proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi;
  scgi_temp_path {home}/scgi;
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    root {root};
  }}
}}
"""
MIRROR_CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{cache: {{blobdescriptor: inmemory}}, filesystem: {{rootdirectory: {home}/data}}}}
http: {{addr: "127.0.0.1:{port}"}}
proxy: {{remoteurl: "{upstream}"}}
"""


@dataclass(frozen=True)
class Server:
    """One that is measured, by the name of its column."""

    name: str
    url: str
    pid: int


class Stage:
    """Everything that runs, each in a directory of its own below `place`."""

    def __init__(self, place: Path, content: Content, other: Path | None) -> None:
        self.content = content
        self.servers: dict[str, Server] = {}
        self._place = place
        self._other = other
        self._numbers = count()
        self._running = ExitStack()
        self._upstream = Registry(place / "upstream")

    def __enter__(self) -> Self:
        with ExitStack() as running:
            running.callback(self._upstream.stop)
            self._upstream.start()
            self.content.push(self._upstream.url)
            names = [PULLCACHE, NGINX, MIRROR] + [OTHER] * bool(self._other)
            for name in names:
                self.servers[name] = running.enter_context(self.fresh(name))
                self.warm(self.servers[name])
            self._running = running.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._running.close()

    def warm(self, server: Server) -> None:
        """Ask for all that will be hit, which must come back right."""
        for path in self.content.hits:
            self.check(server, path)

    def check(self, server: Server, path: str) -> None:
        """Ask for one thing and compare its digest."""
        answer = ask(server.url, path, headers={"Accept": MANIFEST}, timeout=120)
        assert answer.status == 200, f"{server.name}: {answer.status} for {path}"
        assert answer.sha256 == self.content.digest(path), f"{server.name}: wrong bytes of {path}"

    @contextmanager
    def fresh(self, name: str, upstream: str = "") -> Iterator[Server]:
        """Run one of them on an empty store, for as long as the context lasts.

        It asks the stage's upstream, if no other is given by its URL.
        """
        upstream = upstream or self._upstream.url
        home = self._place / f"{name}{next(self._numbers)}"
        if name == UPSTREAM:
            yield Server(name, upstream, 0)
        elif name in (PULLCACHE, OTHER):
            # Without the latter our own checkout, the working directory, comes before.
            other = {"PYTHONPATH": str(self._other), "PYTHONSAFEPATH": "1"}
            env = other if name == OTHER else {}
            daemon = Daemon(home, upstream, max_size=STORE_SIZE, env=env)
            try:
                daemon.start()
                yield Server(name, daemon.url, daemon.process.pid)
            finally:
                daemon.finish()
                shutil.rmtree(home)
        else:
            port, process = self._peer(name, home, upstream)
            try:
                url = f"http://127.0.0.1:{port}"
                path = "/v2/" if name == MIRROR else self.content.by_tag
                process.wait_until(lambda: answers(url, path), "an answer")
                yield Server(name, url, process.pid)
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

    def transfers(self, path: str) -> list[int]:
        """Return the bytes of every answer to a GET of `path` that upstream has logged."""
        log = (self._place / "upstream" / "registry.out.log").read_text()
        found = re.findall(rf'"GET {re.escape(path)} HTTP/1\.1" \d+ (\d+)', log)
        return [int(size) for size in found]

    def _peer(self, name: str, home: Path, upstream: str) -> tuple[int, Process]:
        home.mkdir()
        # Neither nginx nor the mirror tells which port it was given, so a free one is looked for.
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
        config = home / "config"
        if name == NGINX:
            root = self.content.root
            config.write_text(NGINX_CONFIG.format(home=home, port=port, root=root))
            argv: list[str | Path] = ["nginx", "-p", home, "-c", config, "-e", home / "error.log"]
        else:
            config.write_text(MIRROR_CONFIG.format(home=home, port=port, upstream=upstream))
            argv = ["docker-registry", "serve", config]
        return port, Process(home, name, argv)
