"""Loads: wrk for small responses and TLS; for blobs, a client that discards the bytes."""

import re
import select
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import repeat
from urllib.parse import urlsplit

from tests.bench import proc
from tests.bench.testbed import ServerProcess
from tests.system.http_client import connect, send_request
from tests.system.images import MANIFEST
from tests.system.processes import run

PIECE = 1 << 20
SILENCE = 60.0  # seconds after which a server that sends nothing has failed
MAX_SECONDS = 8.0  # of a load that wrk repeats because it received nothing

_HEAD = re.compile(rb"HTTP/1\.1 200 .*?\r\ncontent-length: *(\d+)\r\n.*", re.IGNORECASE | re.DOTALL)
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_BYTES = {"B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}


@dataclass
class Run:
    """The results of one load."""

    seconds: float = 0.0
    requests: int = 0  # with a complete response
    received: int = 0  # bytes of bodies
    server_cpu: float = 0.0  # seconds of the server, in user and kernel mode
    peak: int = 0  # of the server's resident memory, in bytes
    p50: float = 0.0  # seconds from a request to the end of its response
    p99: float = 0.0
    first_byte: float = 0.0  # seconds from the first request to the first bytes of its body
    stored: float = 0.0  # seconds until the content was in the server's store, if measured
    stored_cpu: float = 0.0  # CPU seconds of the server until then
    latencies: list[float] = field(default_factory=list)


@contextmanager
def measured(server: ServerProcess) -> Iterator[Run]:
    """Yield a `Run`, and at the end fill in the time, the server's CPU time and its memory."""
    done = Run()
    proc.reset_peak(server.pid)
    began, spent = time.perf_counter(), proc.cpu_seconds(server.pid)
    yield done
    done.seconds = done.seconds or time.perf_counter() - began
    done.server_cpu = proc.cpu_seconds(server.pid) - spent
    done.peak = proc.peak_bytes(server.pid)
    if done.latencies:
        done.p50, done.p99 = (percentile(done.latencies, share) for share in (0.5, 0.99))


def load_into_memory(server: ServerProcess, path: str) -> None:
    """Request `path` once, so that its file is in the page cache when the measurement starts."""
    buffer = bytearray(PIECE)
    with closing(connect(server.url, SILENCE)) as connection:
        connection.request("GET", path, headers={"Accept": MANIFEST})
        response = connection.getresponse()
        assert response.status == HTTPStatus.OK, f"{server.name}: {response.status} for {path}"
        while response.readinto(buffer):
            pass


def percentile(values: list[float], share: float) -> float:
    """Return the value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def wrk(
    server: ServerProcess, path: str, seconds: float, clients: int, headers: Sequence[str] = ()
) -> Run:
    """Request `path` repeatedly on keep-alive connections; fail on any error.

    If no response arrives, repeat with twice the time.
    """
    while not (done := _wrk(server, path, seconds, clients, headers)).received:
        assert seconds < MAX_SECONDS, f"{server.name}: no response within {seconds:g} s"
        seconds *= 2
    return done


def _wrk(
    server: ServerProcess, path: str, seconds: float, clients: int, headers: Sequence[str]
) -> Run:
    options = [f"-c{clients}", f"-d{max(1, round(seconds))}s", "--latency", "--timeout", "60s"]
    for header in headers:
        options += ["-H", header]
    with measured(server) as done:
        said = run("wrk", "-t1", *options, "-H", f"Accept: {MANIFEST}", server.url + path)
        assert "Non-2xx" not in said, f"{server.name}: {said}"
        assert "Socket errors" not in said, f"{server.name}: {said}"
        total = re.search(r"(\d+) requests in ([\d.]+)(s|m), ([\d.]+)(B|KB|MB|GB) read", said)
        assert total, said
        done.requests, done.seconds = int(total[1]), float(total[2]) * _TIMES[total[3]]
        done.received = int(float(total[4]) * _BYTES[total[5]])
        done.p50, done.p99 = (_percentile(said, share) for share in ("50", "99"))
    return done


def _percentile(said: str, share: str) -> float:
    found = re.search(rf"{share}%\s+([\d.]+)(us|ms|s|m)", said)
    assert found, said
    return float(found[1]) * _TIMES[found[2]]


def blobs(server: ServerProcess, path: str, size: int, *, seconds: float, clients: int) -> Run:
    """Fetch a blob repeatedly for `seconds`, or longer until bytes arrive; fail on any error.

    Bytes of incomplete bodies count too. With `seconds` 0 each client fetches the blob once. The kernel
    discards the bytes (MSG_TRUNC) instead of copying them: wrk, which reads 8 KiB at a time, uses more CPU than
    the server.
    """
    with measured(server) as done:
        wanted = repeat((path, size)) if seconds else repeat((path, size), clients)
        _Sink(server, iter(wanted), seconds).run(done, clients)
    return done


def fetch(server: ServerProcess, blobs: Iterable[tuple[str, int]], *, clients: int) -> Run:
    """Fetch each of these blobs (paths, sizes) once, with `clients` connections."""
    with measured(server) as done:
        _Sink(server, iter(blobs), 0).run(done, clients)
    return done


def pull(
    server: ServerProcess, manifest: str, blobs: Iterable[tuple[str, int]], *, clients: int
) -> Run:
    """Fetch a manifest and then these blobs (paths, sizes) with `clients` connections."""
    with measured(server) as done:
        answer = send_request(server.url, manifest, headers={"Accept": MANIFEST})
        assert answer.status == HTTPStatus.OK, f"{server.name}: {answer.status} for {manifest}"
        _Sink(server, iter(blobs), 0).run(done, clients)
        done.seconds = 0  # so that `measured` sets the whole time, with the manifest
    return done


@dataclass
class _Client:
    socket: socket.socket
    size: int  # of the blob it asked for
    left: int | None = None  # missing bytes of the body; None before the head
    asked: float = 0.0  # time of the request


class _Sink:
    """Keep-alive clients in one thread that fetch `wanted`, an iterator of paths and sizes."""

    def __init__(
        self, server: ServerProcess, wanted: Iterator[tuple[str, int]], seconds: float
    ) -> None:
        parts = urlsplit(server.url)
        self._name = server.name
        self._host = parts.netloc
        self._address = (parts.hostname or "", parts.port or 0)
        self._wanted = wanted
        self._seconds = seconds
        self._buffer = bytearray(PIECE)
        self._events = select.epoll()
        self._clients: dict[int, _Client] = {}

    def run(self, done: Run, clients: int) -> None:
        began = time.perf_counter()
        end = began + self._seconds if self._seconds else float("inf")
        try:
            for _ in range(clients):
                client = _Client(socket.create_connection(self._address, timeout=SILENCE), 0)
                self._clients[client.socket.fileno()] = client
                self._events.register(client.socket, select.EPOLLIN)
                self._next(client)
            while self._clients and (time.perf_counter() < end or not done.received):
                ready = self._events.poll(SILENCE)
                assert ready, f"{self._name}: nothing came for {SILENCE:g} s"
                for number, _ in ready:
                    client = self._clients[number]
                    if self._read(client, done):
                        done.requests += 1
                        done.latencies.append(time.perf_counter() - client.asked)
                        self._next(client)
                    if done.received and not done.first_byte:
                        done.first_byte = time.perf_counter() - began
            done.seconds = time.perf_counter() - began
        finally:
            for client in self._clients.values():
                client.socket.close()
            self._events.close()

    def _next(self, client: _Client) -> None:
        """Send the next request, or close the connection after the last one."""
        client.left = None
        if wanted := next(self._wanted, None):
            path, client.size = wanted
            client.asked = time.perf_counter()
            client.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\n\r\n".encode())
        else:
            del self._clients[client.socket.fileno()]
            self._events.unregister(client.socket)
            client.socket.close()

    def _read(self, client: _Client, done: Run) -> bool:
        """Read what has arrived; return whether the body is complete."""
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
