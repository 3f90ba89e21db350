"""Many clients: a thousand on one growing blob, two thousand idle connections, hundreds of slow readers.

A healthy client requests a manifest at the same time, from a separate process.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from tests.bench import load, proc
from tests.bench.content import MIB, BenchContent
from tests.bench.figures import Goal, LoadSize, Row
from tests.bench.probe import probing
from tests.bench.testbed import MIRROR, NGINX, PULLCACHE, ServerProcess, Testbed, metric
from tests.system.images import MANIFEST
from tests.system.processes import eventually

MB = 10**6
UPSTREAM_RATE = MB  # bytes per second and connection, for the growing blob
READ_RATE = 64 << 10  # bytes per second that a slow client reads
READ_INTERVAL = 0.25  # seconds between two reads of a slow client

_UPSTREAM_BYTES = "pullcache_upstream_bytes_total"


def followers(testbed: Testbed, size: LoadSize, directory: Path) -> Iterator[Row]:
    """Measure many clients of one blob that upstream sends slowly."""
    content = BenchContent(directory / "growing", hits=[], cold=MIB, shared=size.growing)
    with (
        testbed.throttled(content, UPSTREAM_RATE) as url,
        testbed.running(PULLCACHE, url) as server,
    ):
        testbed.check(server, content.by_tag, content)
        eventually(lambda: not metric(server, "pullcache_downloads_in_progress"), "no download")
        before, idle = metric(server, _UPSTREAM_BYTES), proc.resident_bytes(server.pid)
        proc.reset_peak(server.pid)
        with probing(server.url, content.by_tag) as latencies:
            run = load.blobs(
                server, content.shared, size.growing, seconds=0, clients=size.followers
            )
        memory = (proc.peak_bytes(server.pid) - idle) / MIB
        fetched = metric(server, _UPSTREAM_BYTES) - before
    work = f"{size.followers:,} on a growing blob"
    yield Row(work, "MB/s", {PULLCACHE: [run.received / run.seconds / MB]}, more=True)
    yield Row(
        "  of it from upstream", "blobs", {PULLCACHE: [fetched / size.growing]}, Goal("<=", 1), 2
    )
    yield Row("  memory above idle", "MiB", {PULLCACHE: [memory]}, Goal("<=", 50), 1)
    latency = latencies.percentile(0.99) * 1e3
    yield Row("  manifest's 99th percentile", "ms", {PULLCACHE: [latency]}, Goal("<=", 50), 1)


def idle(testbed: Testbed, size: LoadSize) -> Iterator[Row]:
    """Measure connections that send one request and then stay idle."""
    memory: dict[str, list[float]] = {}
    request_cpu: dict[str, list[float]] = {}
    idle_cpu: dict[str, list[float]] = {}
    for name in (PULLCACHE, NGINX, MIRROR):
        with testbed.running(name) as server:
            testbed.fill(server)
            resident, spent = proc.resident_bytes(server.pid), proc.cpu_seconds(server.pid)
            with _connections(server, testbed.content.by_tag, size.idle_connections):
                seconds = proc.cpu_seconds(server.pid) - spent
                added = proc.resident_bytes(server.pid) - resident
                memory[name] = [added / size.idle_connections / 1024]
                request_cpu[name] = [seconds / size.idle_connections * 1e6]
                spent = proc.cpu_seconds(server.pid)
                time.sleep(size.seconds)
                seconds = proc.cpu_seconds(server.pid) - spent
                idle_cpu[name] = [seconds / size.seconds * 1e3]
    yield Row(f"{size.idle_connections:,} idle connections", "KiB each", memory, digits=1)
    yield Row("  CPU to connect and send a request", "us each", request_cpu, Goal("<=", 2.0, NGINX))
    yield Row("  CPU while they are idle", "ms/s", idle_cpu, digits=1)


def slow_readers(testbed: Testbed, size: LoadSize) -> Iterator[Row]:
    """Measure hundreds of clients that read one blob slowly, and a fast client at the same time."""
    blob = testbed.content.blobs[max(testbed.content.blobs)]
    with testbed.running(PULLCACHE) as server:
        testbed.fill(server)
        proc.reset_peak(server.pid)
        spent = proc.cpu_seconds(server.pid)
        with probing(server.url, testbed.content.by_tag) as latencies:
            _read_slowly(server, blob, size.slow_readers, size.slow_seconds)
        cpu = (proc.cpu_seconds(server.pid) - spent) / size.slow_seconds * 1e3
        peak = proc.peak_bytes(server.pid) / MIB
    latency = latencies.percentile(0.99) * 1e3
    work = f"{size.slow_readers} slow readers: manifest's p99"
    yield Row(work, "ms", {PULLCACHE: [latency]}, Goal("<=", 100), 1)
    yield Row("  peak memory", "MiB", {PULLCACHE: [peak]}, Goal("<=", 200))
    yield Row("  CPU", "ms/s", {PULLCACHE: [cpu]})


@contextmanager
def stalled(server: ServerProcess, path: str) -> Iterator[None]:
    """Keep a connection open that has requested a blob and stops reading after its first bytes."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, READ_RATE)
        client.settimeout(load.SILENCE)
        client.connect(_address(server))
        client.sendall(_request(server, path))
        assert client.recv(READ_RATE), f"{server.name}: no response"
        yield


@contextmanager
def _connections(server: ServerProcess, path: str, count: int) -> Iterator[None]:
    """Open `count` connections one after the other, and request `path` on each."""
    request = _request(server, path)
    with ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(socket.create_connection(_address(server), timeout=60))
            client.sendall(request)
            head, _, body = client.recv(65536).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), f"{server.name}: {head!r}"
            assert body or client.recv(65536), server.name
        yield


def _read_slowly(server: ServerProcess, path: str, count: int, seconds: float) -> None:
    """Let `count` clients read one blob at `READ_RATE` each. None may be disconnected."""
    with ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, READ_RATE)
            client.connect(_address(server))
            client.sendall(_request(server, path))
            client.setblocking(False)
            clients.append(client)
        buffer = bytearray(int(READ_RATE * READ_INTERVAL))
        received = [0] * count
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            started = time.monotonic()
            for number, client in enumerate(clients):
                with suppress(BlockingIOError):
                    size = client.recv_into(buffer)
                    assert size, f"{server.name} disconnected a slow reader"
                    received[number] += size
            time.sleep(max(0.0, READ_INTERVAL - (time.monotonic() - started)))
        assert min(received), f"{server.name}: a slow reader got nothing"


def _address(server: ServerProcess) -> tuple[str, int]:
    parts = urlsplit(server.url)
    return parts.hostname or "", parts.port or 0


def _request(server: ServerProcess, path: str) -> bytes:
    host = urlsplit(server.url).netloc
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAccept: {MANIFEST}\r\n\r\n".encode()
