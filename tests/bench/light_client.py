"""A client that takes almost no CPU time, as if it ran on another machine: the rate is that of the servers.

The kernel discards the bytes (`MSG_TRUNC`, tcp(7)) instead of copying them, and wakes the client once a MiB
(`SO_RCVLOWAT`, socket(7)). Its window is wide, as on a fast network. What the kernel does to receive a segment on
loopback, the sender pays for.
"""

import re
import resource
import select
import socket
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from tests.bench import load
from tests.bench.load import SILENCE, Run
from tests.bench.testbed import ServerProcess

# Bytes after which a connection wakes the client, and the buffer of its socket.
WAKEUP = 1 << 20
WINDOW = 8 << 20
# Headers are shorter.
HEAD_SIZE = 2048

_SO_RCVBUFFORCE = 33
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


@dataclass
class LightRun(Run):
    """A run with the CPU seconds of the client too."""

    client_cpu: float = 0.0


@dataclass
class _LightConnection:
    socket: socket.socket
    left: int = 0  # missing bytes of the body; 0 before the head


def fetch(server: ServerProcess, path: str, size: int, *, seconds: float, clients: int) -> LightRun:
    """Fetch a blob again and again for `seconds`, on this many connections; fail on any error."""
    done = LightRun()
    client = _LightClient(server, path, size)
    spent = _cpu_seconds()
    with load.measured(server) as measured:
        client.run(measured, seconds, clients)
    done.client_cpu = _cpu_seconds() - spent
    done.seconds, done.requests = measured.seconds, measured.requests
    done.received, done.server_cpu = measured.received, measured.server_cpu
    return done


class _LightClient:
    def __init__(self, server: ServerProcess, path: str, size: int) -> None:
        parts = urlsplit(server.url)
        self._name, self._size = server.name, size
        self._address = (parts.hostname or "", parts.port or 0)
        self._request = f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
        # Of a response and its head. All heads are equally long; the first one tells.
        self._response_size = 1

    def run(self, done: Run, seconds: float, clients: int) -> None:
        events = select.epoll()
        connections = {}
        try:
            for _ in range(clients):
                opened = self._connect()
                connections[opened.fileno()] = _LightConnection(opened)
                events.register(opened, select.EPOLLIN)
            began = time.perf_counter()
            for one in connections.values():
                self._ask(one)
            while time.perf_counter() < began + seconds or not done.requests:
                ready = events.poll(SILENCE)
                assert ready, f"{self._name}: nothing came for {SILENCE:g} s"
                for number, _ in ready:
                    if self._read(connections[number], done):
                        done.requests += 1
                        self._ask(connections[number])
            done.seconds = time.perf_counter() - began
        finally:
            for one in connections.values():
                one.socket.close()
            events.close()

    def _connect(self) -> socket.socket:
        opened = socket.socket()
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, WINDOW)
        opened.settimeout(SILENCE)
        opened.connect(self._address)
        opened.setblocking(False)
        return opened

    def _ask(self, one: _LightConnection) -> None:
        self._wake_after(one, self._response_size)
        one.socket.sendall(self._request)

    def _wake_after(self, one: _LightConnection, count: int) -> None:
        # A response that is a little longer than a wakeup is read at once.
        wanted = count if count < WAKEUP + HEAD_SIZE else WAKEUP
        one.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)

    def _read(self, one: _LightConnection, done: Run) -> bool:
        """Read what has arrived; return whether the body is complete."""
        if not one.left:
            piece = one.socket.recv(HEAD_SIZE)
            head, end, body = piece.partition(b"\r\n\r\n")
            length = _LENGTH.search(head + b"\r\n")
            is_right = head.startswith(b"HTTP/1.1 200 ") and length and int(length[1]) == self._size
            assert is_right, f"{self._name}: {piece!r}"
            self._response_size = len(head) + len(end) + self._size
            one.left = self._size - len(body)
            done.received += len(body)
        while one.left and self._discard(one, done):
            pass
        if one.left:
            self._wake_after(one, one.left)
        return not one.left

    def _discard(self, one: _LightConnection, done: Run) -> int:
        """Discard what has arrived of the body; return its size, 0 if nothing has."""
        try:
            wanted = min(one.left, len(_BUFFER))
            count = one.socket.recv_into(_BUFFER, wanted, socket.MSG_TRUNC)
        except BlockingIOError:
            return 0
        assert count, f"{self._name}: the body ended {one.left} bytes early"
        done.received += count
        one.left -= count
        return count


_BUFFER = bytearray(WINDOW)


def _cpu_seconds() -> float:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime
