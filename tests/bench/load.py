"""The load: wrk for small answers, and a client of our own for blobs, which throws the bytes away."""

import os
import re
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tests.system.images import MANIFEST
from tests.system.processes import run

CONNECTIONS = 32
PIECE = 1 << 20
TICK = os.sysconf("SC_CLK_TCK")
_HEAD = re.compile(rb"HTTP/1\.1 200 .*?\r\ncontent-length: *(\d+)\r\n.*", re.IGNORECASE | re.DOTALL)


def cpu_seconds(pid: int) -> float:
    """Return what a process has used so far, its own time and the kernel's."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


@dataclass
class Run:
    """What one stretch of load came to."""

    seconds: float = 0.0
    requests: int = 0
    received: int = 0  # bytes of bodies
    cpu: float = 0.0  # seconds of the server
    p99: float = 0.0
    first_byte: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.requests / self.seconds

    @property
    def bytes_rate(self) -> float:
        return self.received / self.seconds

    @property
    def cpu_per_gib(self) -> float:
        return self.cpu / (self.received / (1 << 30))

    @property
    def cpu_per_request(self) -> float:
        return self.cpu / self.requests


@contextmanager
def clocked(done: Run, pid: int) -> Iterator[None]:
    """Note in `done` the time that passes and what the server spends."""
    began, spent = time.perf_counter(), cpu_seconds(pid)
    yield
    done.seconds = time.perf_counter() - began
    done.cpu = cpu_seconds(pid) - spent


def small(url: str, path: str, pid: int, seconds: int) -> Run:
    """Ask for one small thing again and again on 32 connections. Any error fails."""
    done = Run()
    options = [f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", "-H", f"Accept: {MANIFEST}"]
    with clocked(done, pid):
        said = run("wrk", "-t1", *options, url + path)
    assert "Non-2xx" not in said, said
    assert "Socket errors" not in said, said
    total = re.search(r"(\d+) requests in ([\d.]+)(ms|s),", said)
    slow = re.search(r"99%\s+([\d.]+)(us|ms|s)", said)
    assert total, said
    assert slow, said
    scale = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
    done.requests = int(total[1])
    done.seconds = float(total[2]) * scale[total[3]]
    done.p99 = float(slow[1]) * scale[slow[2]]
    return done


def blobs(url: str, path: str, size: int, pid: int, seconds: float, clients: int) -> Run:
    """Fetch one blob again and again on so many connections. Any error fails.

    The kernel drops the bytes (MSG_TRUNC) instead of copying them: wrk spends more on reading 8 KiB
    at a time than a server on sending.
    """
    done = Run()
    with clocked(done, pid):
        _Sink(url, path, size).run(done, clients, time.perf_counter() + seconds)
    return done


def once(url: str, path: str, size: int, pid: int) -> Run:
    """Fetch a blob once."""
    done = Run()
    with clocked(done, pid):
        _Sink(url, path, size).run(done, 1, 0.0)
    return done


@dataclass
class _Client:
    socket: socket.socket
    left: int = -1  # bytes of the body; -1 before the head
    began: float = 0.0


class _Sink:
    """Keep-alive clients in one thread."""

    def __init__(self, url: str, path: str, size: int) -> None:
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        self._address = (parts.hostname, parts.port)
        self._request = f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
        self._size = size
        self._buffer = bytearray(PIECE)
        self._events = select.epoll()
        self._clients: dict[int, _Client] = {}

    def run(self, done: Run, clients: int, deadline: float) -> None:
        for _ in range(clients):
            self._connect()
        try:
            while self._clients:
                ready = self._events.poll(60)
                assert ready, f"nothing came for a minute; {done.requests} bodies so far"
                for number, _ in ready:
                    self._read(self._clients[number], done, deadline)
        finally:
            for client in self._clients.values():
                client.socket.close()
            self._events.close()

    def _connect(self) -> None:
        client = _Client(socket.create_connection(self._address, timeout=60))
        self._clients[client.socket.fileno()] = client
        self._events.register(client.socket, select.EPOLLIN)
        self._ask(client)

    def _ask(self, client: _Client) -> None:
        client.left = -1
        client.began = time.perf_counter()
        client.socket.sendall(self._request)

    def _read(self, client: _Client, done: Run, deadline: float) -> None:
        count = self._receive(client, done)
        done.received += count
        client.left -= count
        assert client.left >= 0, "more bytes than announced"
        if client.left:
            return
        done.requests += 1
        if time.perf_counter() < deadline:
            self._ask(client)
        else:
            self._events.unregister(client.socket)
            del self._clients[client.socket.fileno()]
            client.socket.close()

    def _receive(self, client: _Client, done: Run) -> int:
        """Take what has come; return how many bytes of it are the body's."""
        if client.left >= 0:
            count = client.socket.recv_into(
                self._buffer, min(PIECE, client.left), socket.MSG_TRUNC | socket.MSG_DONTWAIT
            )
            assert count, f"the body ended {client.left} bytes early"
            return count
        piece = client.socket.recv(4096)
        head, end, body = piece.partition(b"\r\n\r\n")
        found = _HEAD.fullmatch(head + b"\r\n")
        assert end, piece
        assert found, piece
        assert int(found[1]) == self._size, piece
        client.left = self._size
        if body and not done.first_byte:
            done.first_byte = time.perf_counter() - client.began
        return len(body)
