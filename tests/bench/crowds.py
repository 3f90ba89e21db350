"""Crowds: a thousand who follow one growing blob, two thousand who stay connected, hundreds who read slowly.

A healthy client asks for a manifest meanwhile, in a process of its own.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from tests.bench import load, proc
from tests.bench.content import MIB, Content
from tests.bench.figures import Goal, Row, Size
from tests.bench.probe import probing
from tests.bench.stage import MIRROR, NGINX, PULLCACHE, Server, Stage, metric
from tests.system.images import MANIFEST
from tests.system.processes import eventually

MB = 10**6
RATE = MB  # bytes a second that upstream gives one connection for the growing blob
READ = 64 << 10  # bytes a second that a slow client takes
TURN = 0.25  # seconds between two reads of a slow client

_BROUGHT = "pullcache_upstream_bytes_total"


def followers(stage: Stage, size: Size, place: Path) -> Iterator[Row]:
    """Let very many fetch one blob that upstream sends slowly."""
    content = Content(place / "growing", hits=[], cold=MIB, crowd=size.growing)
    with stage.throttled(content, RATE) as url, stage.fresh(PULLCACHE, url) as server:
        stage.check(server, content.by_tag, content)
        eventually(lambda: not metric(server, "pullcache_downloads_in_progress"), "no download")
        before, idle = metric(server, _BROUGHT), proc.memory(server.pid)
        proc.forget_peak(server.pid)
        with probing(server.url, content.by_tag) as latencies:
            run = load.blobs(server, content.crowd, size.growing, seconds=0, clients=size.followers)
        more = (proc.peak(server.pid) - idle) / MIB
        brought = metric(server, _BROUGHT) - before
    work = f"{size.followers:,} on a growing blob"
    yield Row(work, "MB/s", {PULLCACHE: [run.received / run.seconds / MB]}, more=True)
    yield Row(
        "  of it from upstream", "blobs", {PULLCACHE: [brought / size.growing]}, Goal("<=", 1), 2
    )
    yield Row("  memory above idle", "MiB", {PULLCACHE: [more]}, Goal("<=", 50), 1)
    waited = latencies.percentile(0.99) * 1e3
    yield Row("  manifest's 99th percentile", "ms", {PULLCACHE: [waited]}, Goal("<=", 50), 1)


def idle(stage: Stage, size: Size) -> Iterator[Row]:
    """Let very many connections ask once, and then do nothing."""
    held: dict[str, list[float]] = {}
    spent: dict[str, list[float]] = {}
    waiting: dict[str, list[float]] = {}
    names = (PULLCACHE, NGINX, MIRROR)
    for name in names:
        with stage.fresh(name) as server:
            stage.warm(server)
            before, began = proc.memory(server.pid), proc.cpu_seconds(server.pid)
            with _connected(server, stage.content.by_tag, size.idle):
                taken = proc.cpu_seconds(server.pid) - began
                held[name] = [(proc.memory(server.pid) - before) / size.idle / 1024]
                spent[name] = [taken / size.idle * 1e6]
                began = proc.cpu_seconds(server.pid)
                time.sleep(size.seconds)
                taken = proc.cpu_seconds(server.pid) - began
                waiting[name] = [taken / size.seconds * 1e3]
    yield Row(f"{size.idle:,} idle connections", "KiB each", held, digits=1)
    yield Row("  CPU to connect and ask once", "us each", spent)
    yield Row("  CPU while they are idle", "ms/s", waiting, digits=1)


def slow(stage: Stage, size: Size) -> Iterator[Row]:
    """Let hundreds read a blob slower than any link, while a healthy client goes on."""
    blob = stage.content.blobs[max(stage.content.blobs)]
    with stage.fresh(PULLCACHE) as server:
        stage.warm(server)
        proc.forget_peak(server.pid)
        began = proc.cpu_seconds(server.pid)
        with probing(server.url, stage.content.by_tag) as latencies:
            _read_slowly(server, blob, size.slow, size.slow_seconds)
        spent = (proc.cpu_seconds(server.pid) - began) / size.slow_seconds * 1e3
        peak = proc.peak(server.pid) / MIB
    waited = latencies.percentile(0.99) * 1e3
    work = f"{size.slow} slow readers: manifest's p99"
    yield Row(work, "ms", {PULLCACHE: [waited]}, Goal("<=", 100), 1)
    yield Row("  peak memory", "MiB", {PULLCACHE: [peak]}, Goal("<=", 200))
    yield Row("  CPU", "ms/s", {PULLCACHE: [spent]})


@contextmanager
def stalled(server: Server, path: str) -> Iterator[None]:
    """Be a client that has asked for a blob, and reads no more of it than its beginning."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, READ)
        one.settimeout(load.SILENCE)
        one.connect(_address(server))
        one.sendall(_request(server, path))
        assert one.recv(READ), f"{server.name}: no answer"
        yield


@contextmanager
def _connected(server: Server, path: str, count: int) -> Iterator[list[socket.socket]]:
    """Open so many connections and ask for a thing on each, one after the other."""
    request = _request(server, path)
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.create_connection(_address(server), timeout=60))
            found.append(one)
            one.sendall(request)
            head, _, body = one.recv(65536).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), f"{server.name}: {head!r}"
            assert body or one.recv(65536), server.name
        yield found


def _read_slowly(server: Server, path: str, clients: int, seconds: float) -> None:
    """Keep so many readers of one blob at so many bytes a second each; none may be cut off."""
    with ExitStack() as stack:
        readers = []
        for _ in range(clients):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, READ)
            one.connect(_address(server))
            one.sendall(_request(server, path))
            one.setblocking(False)
            readers.append(one)
        buffer = bytearray(int(READ * TURN))
        received = [0] * clients
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.monotonic()
            for number, one in enumerate(readers):
                with suppress(BlockingIOError):
                    count = one.recv_into(buffer)
                    assert count, f"{server.name} cut a slow reader off"
                    received[number] += count
            time.sleep(max(0.0, TURN - (time.monotonic() - began)))
        assert min(received), f"{server.name}: a slow reader got nothing"


def _address(server: Server) -> tuple[str, int]:
    parts = urlsplit(server.url)
    return parts.hostname or "", parts.port or 0


def _request(server: Server, path: str) -> bytes:
    host = urlsplit(server.url).netloc
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAccept: {MANIFEST}\r\n\r\n".encode()
