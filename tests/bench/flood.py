"""A client with many connections that requests blobs which no registry has, as fast as it gets responses.

    python -m tests.bench.flood URL CONNECTIONS

It is a separate process with an address of its own. When its stdin is closed, it prints how many responses it
got, by status, as JSON.
"""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import cast
from urllib.parse import urlsplit

import uvloop

ADDRESS = "127.0.0.2"
_HEAD_END = b"\r\n\r\n"


@contextmanager
def flooding(url: str, connections: int) -> Iterator[Counter[str]]:
    """Flood while the context lasts; at its end, count the responses by status."""
    statuses: Counter[str] = Counter()
    argv = [sys.executable, "-m", "tests.bench.flood", url, str(connections)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline(), "the flood got no response"
        try:
            yield statuses
        finally:
            output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, "the flood failed"
    statuses.update(json.loads(output))


class _Flood:
    def __init__(self, url: str, connections: int) -> None:
        self.host = urlsplit(url).netloc
        self.statuses: Counter[str] = Counter()
        self.answered: set[_Connection] = set()
        self.connections = connections
        self.all_answered = asyncio.Event()
        self._numbers = count()

    def next_request(self) -> bytes:
        path = f"/v2/library/app/blobs/sha256:{next(self._numbers):064x}"
        return f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\n\r\n".encode()

    def count(self, connection: "_Connection", status: str) -> None:
        self.statuses[status] += 1
        self.answered.add(connection)
        if len(self.answered) == self.connections:
            self.all_answered.set()


class _Connection(asyncio.Protocol):
    """Sends the next request when a response has arrived completely."""

    def __init__(self, flood: _Flood) -> None:
        self._flood = flood
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's class is not one
        self._send()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(_HEAD_END)
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if end and len(body) >= int(length):
            self._flood.count(self, head[9:12].decode())
            self._received = b""
            self._send()

    def _send(self) -> None:
        self._transport.write(self._flood.next_request())


async def _run(url: str, connections: int) -> None:
    loop, parts = asyncio.get_running_loop(), urlsplit(url)
    flood = _Flood(url, connections)
    for _ in range(connections):
        await loop.create_connection(
            lambda: _Connection(flood),
            parts.hostname or "",
            parts.port or 0,
            local_addr=(ADDRESS, 0),
        )
    await flood.all_answered.wait()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    sys.stdout.write(json.dumps(flood.statuses) + "\n")


if __name__ == "__main__":
    uvloop.run(_run(sys.argv[1], int(sys.argv[2])))
