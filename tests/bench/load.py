"""The load: wrk for small answers; for blobs a client of our own that throws the bytes away."""

import os
import re
import select
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from itertools import chain, repeat, takewhile
from pathlib import Path
from urllib.parse import urlsplit

from tests.bench.stage import Server
from tests.system.images import MANIFEST
from tests.system.processes import run
from tests.system.wire import ask

CONNECTIONS = 32
PIECE = 1 << 20
SILENCE = 60.0  # seconds after which a server that sends nothing has failed

_TICK = os.sysconf("SC_CLK_TCK")
_HEAD = re.compile(rb"HTTP/1\.1 200 .*?\r\ncontent-length: *(\d+)\r\n.*", re.IGNORECASE | re.DOTALL)
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass
class Run:
    """What one stretch of load came to."""

    seconds: float = 0.0
    requests: int = 0
    received: int = 0  # bytes of bodies
    server_cpu: float = 0.0  # seconds of the server, in user and kernel mode
    p99: float = 0.0  # seconds
    first_byte: float = 0.0  # seconds from the first request to its body's first bytes


@contextmanager
def clocked(server: Server) -> Iterator[Run]:
    """Note in a new `Run` the time that passes and what the server spends."""
    done = Run()
    began, spent = time.perf_counter(), _cpu_seconds(server.pid)
    yield done
    done.seconds = done.seconds or time.perf_counter() - began
    done.server_cpu = _cpu_seconds(server.pid) - spent


def _cpu_seconds(pid: int) -> float:
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def small(server: Server, path: str, seconds: int) -> Run:
    """Ask for one small thing again and again on keep-alive connections. Any error fails."""
    options = [f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", "-H", f"Accept: {MANIFEST}"]
    with clocked(server) as done:
        said = run("wrk", "-t1", *options, server.url + path)
        assert "Non-2xx" not in said, f"{server.name}: {said}"
        assert "Socket errors" not in said, f"{server.name}: {said}"
        total = re.search(r"(\d+) requests in ([\d.]+)(s),", said)
        slow = re.search(r"99%\s+([\d.]+)(us|ms|s)", said)
        assert total, said
        assert slow, said
        done.requests, done.seconds = int(total[1]), float(total[2])
        done.p99 = float(slow[1]) * _UNITS[slow[2]]
    return done


def blobs(server: Server, path: str, size: int, *, seconds: float, clients: int) -> Run:
    """Fetch a blob again and again until the time is up; what has begun is finished.

    With no time each client fetches it once. Any error fails. The kernel drops the bytes (MSG_TRUNC)
    instead of copying them: wrk spends more on reading them by 8 KiB than a server does on sending.
    """
    with clocked(server) as done:
        deadline = time.perf_counter() + seconds
        again = takewhile(lambda _: time.perf_counter() < deadline, repeat((path, size)))
        _Sink(server, chain(repeat((path, size), clients), again)).run(done, clients)
    return done


def pull(server: Server, manifest: str, blobs: Iterable[tuple[str, int]], *, clients: int) -> Run:
    """Ask for a manifest and then for these blobs (paths, sizes), as many at once as `clients`."""
    with clocked(server) as done:
        answer = ask(server.url, manifest, headers={"Accept": MANIFEST})
        assert answer.status == HTTPStatus.OK, f"{server.name}: {answer.status} for {manifest}"
        _Sink(server, iter(blobs)).run(done, clients)
    return done


@dataclass
class _Client:
    socket: socket.socket
    size: int  # of the blob it asked for
    left: int | None = None  # bytes of the body that are still to come; None before its head


class _Sink:
    """Keep-alive clients in one thread; each asks for the next of what is `wanted`: paths and sizes."""

    def __init__(self, server: Server, wanted: Iterator[tuple[str, int]]) -> None:
        parts = urlsplit(server.url)
        self._name = server.name
        self._host = parts.netloc
        self._address = (parts.hostname or "", parts.port or 0)
        self._wanted = wanted
        self._buffer = bytearray(PIECE)
        self._events = select.epoll()
        self._clients: dict[int, _Client] = {}

    def run(self, done: Run, clients: int) -> None:
        began = time.perf_counter()
        try:
            for _ in range(clients):
                client = _Client(socket.create_connection(self._address, timeout=SILENCE), 0)
                self._clients[client.socket.fileno()] = client
                self._events.register(client.socket, select.EPOLLIN)
                self._next(client)
            while self._clients:
                ready = self._events.poll(SILENCE)
                assert ready, f"{self._name}: nothing came for {SILENCE} s"
                for number, _ in ready:
                    client = self._clients[number]
                    if self._read(client, done):
                        done.requests += 1
                        self._next(client)
                    if done.received and not done.first_byte:
                        done.first_byte = time.perf_counter() - began
        finally:
            for client in self._clients.values():
                client.socket.close()
            self._events.close()

    def _next(self, client: _Client) -> None:
        """Ask for the next blob, or leave."""
        client.left = None
        if wanted := next(self._wanted, None):
            path, client.size = wanted
            client.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\n\r\n".encode())
        else:
            del self._clients[client.socket.fileno()]
            self._events.unregister(client.socket)
            client.socket.close()

    def _read(self, client: _Client, done: Run) -> bool:
        """Take what has come; tell whether the body is complete."""
        if client.left is None:
            piece = client.socket.recv(4096)
            head, _, body = piece.partition(b"\r\n\r\n")
            found = _HEAD.fullmatch(head + b"\r\n")
            assert found, f"{self._name}: {piece[:1000]!r}"
            assert int(found[1]) == client.size, f"{self._name}: {piece[:1000]!r}"
            count, client.left = len(body), client.size
        else:
            wanted = min(PIECE, client.left)
            count = client.socket.recv_into(self._buffer, wanted, socket.MSG_TRUNC)
            assert count, f"{self._name}: the body ended {client.left} bytes early"
        done.received += count
        client.left -= count
        assert client.left >= 0, f"{self._name}: more bytes than announced"
        return client.left == 0
