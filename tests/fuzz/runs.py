"""Runs of the fuzzers: a daemon of its own, random input, and what must never happen.

A run fails if the daemon answers 500, logs a traceback, does not answer, holds up `/healthz`, or grows.
"""

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.fakes.registry import FakeRegistry
from tests.fuzz.client_requests import RequestMaker
from tests.fuzz.upstream_responses import ResponseMaker
from tests.system.servers import Daemon

CONNECTIONS = 32
# More, because most responses of a bad upstream are waited for.
UPSTREAM_CONNECTIONS = 200
# Seconds for one response. Upstream's own time-outs are part of it.
RESPONSE_TIMEOUT = 60.0
PROBE_INTERVAL = 0.05
# Seconds that the event loop may compute before it answers.
MAX_BUSY = 0.2
MIB = 1 << 20

_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([0-9]{3})")


@dataclass
class FuzzFindings:
    """What a run has seen. Sizes are bytes, times are seconds.

    `longest_probe` is the longest response to `/healthz`, also because of other load on the machine;
    `longest_busy` is the longest time that the event loop's thread computed during such a response.
    """

    seed: int
    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    longest_probe: float = 0.0
    longest_busy: float = 0.0
    memory: list[int] = field(default_factory=list)

    @property
    def growth(self) -> int:
        """The memory at the end beyond that after a quarter of the run."""
        return self.memory[-1] - self.memory[len(self.memory) // 4] if self.memory else 0

    def __str__(self) -> str:
        statuses = ", ".join(
            f"{status}: {count}" for status, count in sorted(self.statuses.items())
        )
        return (
            f"{self.sent} requests (seed {self.seed}); {statuses}; longest /healthz "
            f"{self.longest_probe * 1000:.0f} ms, busy {self.longest_busy * 1000:.0f} ms; memory +{self.growth / MIB:.1f} MiB; "
            f"{len(self.problems)} problems"
        )


async def fuzz_clients(directory: Path, count: int, seed: int) -> FuzzFindings:
    """Send `count` random requests to a daemon whose upstream is a good one."""
    findings = FuzzFindings(seed)
    async with FakeRegistry() as registry:
        registry.pull_limit = None
        images = [
            registry.add_image(),
            registry.add_image(tag="v1", layers=[b"x" * 9000], index=True),
        ]
        digests = [one for image in images for one in (image.digest, image.manifest, *image.blobs)]
        async with _run_daemon(directory, registry.url, findings) as daemon:
            work = iter(range(count))

            async def send(number: int) -> None:
                maker = RequestMaker(random.Random(f"{seed}.{number}"), digests)
                await _send_all(daemon.address, work, maker, findings)

            await asyncio.gather(*(send(number) for number in range(CONNECTIONS)))
    return findings


async def fuzz_upstreams(directory: Path, count: int, seed: int) -> FuzzFindings:
    """Send `count` good requests to a daemon whose upstream responds at random."""
    findings = FuzzFindings(seed)
    source = FakeRegistry()
    images = [source.add_image(f"library/app{n}", layers=[b"%d" % n * 5000]) for n in range(20)]
    contents = {
        digest: content
        for repository in source.repositories.values()
        for digest, content in (
            *repository.blobs.items(),
            *((digest, one.content) for digest, one in repository.manifests.items()),
        )
    }
    rng = random.Random(seed)
    maker = ResponseMaker(rng, list(contents))

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(maker.make(head.split(b" ")[1].decode("latin-1"), contents))
                await writer.drain()
                # After a broken response the client would wait for the rest.
                if rng.random() < 0.3:
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, _run_daemon(directory, f"http://127.0.0.1:{port}", findings) as daemon:
        targets = [
            f"/v2/{image.repository}/{path}"
            for image in images
            for path in (
                *("manifests/latest", f"manifests/{image.digest}", "tags/list"),
                *(f"referrers/{image.digest}", f"blobs/{image.config}"),
                *(f"blobs/{layer}" for layer in image.layers),
            )
        ]
        work = iter(range(count))

        async def send(number: int) -> None:
            chosen = random.Random(f"{seed}.{number}")
            await _send_good(daemon.address, work, chosen, targets, findings)

        await asyncio.gather(*(send(number) for number in range(UPSTREAM_CONNECTIONS)))
    return findings


@asynccontextmanager
async def _run_daemon(
    directory: Path, upstream: str, findings: FuzzFindings
) -> AsyncIterator[Daemon]:
    env = {
        "PULLCACHE_LOG_LEVEL": "warning",
        "PULLCACHE_FETCH_ATTEMPTS": "1",
        "PULLCACHE_FETCH_STALL_TIMEOUT": "1s",
        "PULLCACHE_MANIFESTS_TTL": "0s",
        "PULLCACHE_MANIFESTS_NEGATIVE_TTL": "0s",
    }
    daemon = Daemon(directory / "daemon", upstream, env=env, max_size="50MB")
    await asyncio.to_thread(daemon.start)
    try:
        async with asyncio.TaskGroup() as group:
            probe = group.create_task(_probe(daemon, findings))
            yield daemon
            probe.cancel()
        if findings.longest_busy > MAX_BUSY:
            findings.problems.append(f"the event loop was busy for {findings.longest_busy:.3f} s")
        errors = await asyncio.to_thread(daemon.metric, "pullcache_internal_errors_total")
        if errors:
            findings.problems.append(f"{errors:.0f} internal errors, see {directory}")
        if "Traceback" in await asyncio.to_thread(lambda: daemon.log):
            findings.problems.append(f"a traceback in the log, see {directory}")
    finally:
        await asyncio.to_thread(daemon.finish)


async def _probe(daemon: Daemon, findings: FuzzFindings) -> None:
    """Measure how long `/healthz` takes, and the daemon's memory, until cancelled."""
    pid = daemon.process.pid
    status = Path(f"/proc/{pid}/statm")
    # The nanoseconds that the main thread has run.
    schedule = Path(f"/proc/{pid}/task/{pid}/schedstat")
    host, _, port = daemon.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        while True:
            began, ran = time.perf_counter(), _read_run_time(schedule)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            await _read_response(reader)
            findings.longest_probe = max(findings.longest_probe, time.perf_counter() - began)
            findings.longest_busy = max(findings.longest_busy, _read_run_time(schedule) - ran)
            pages = (await asyncio.to_thread(status.read_text)).split()[1]
            findings.memory.append(int(pages) * 4096)
            await asyncio.sleep(PROBE_INTERVAL)
    finally:
        writer.close()


def _read_run_time(schedule: Path) -> float:
    return int(schedule.read_text().split()[0]) / 1e9


async def _send_all(
    address: str, work: Iterator[int], maker: RequestMaker, findings: FuzzFindings
) -> None:
    """Send random requests, each over a connection of its own, until the work is done."""
    host, _, port = address.rpartition(":")
    for _ in work:
        request = maker.make()
        findings.sent += 1
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            async with asyncio.timeout(RESPONSE_TIMEOUT):
                writer.write(request)
                # A request without an end is ended by the end of the connection.
                writer.write_eof()
                received = await reader.read()
            statuses = [int(one) for one in _STATUS_LINE.findall(received)]
            findings.statuses.update(statuses)
            if 500 in statuses:
                findings.problems.append(f"500 for {request[:300]!r}")
        except TimeoutError:
            findings.problems.append(f"no response to {request[:300]!r}")
        except ConnectionError:
            # The server may reset a connection of which it has not read all.
            findings.statuses[0] += 1
        finally:
            writer.close()


async def _send_good(
    address: str,
    work: Iterator[int],
    rng: random.Random,
    targets: list[str],
    findings: FuzzFindings,
) -> None:
    """Send good requests, each over a connection of its own, until the work is done."""
    host, _, port = address.rpartition(":")
    for _ in work:
        target, method = rng.choice(targets), rng.choice(["GET", "GET", "GET", "HEAD"])
        findings.sent += 1
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            async with asyncio.timeout(RESPONSE_TIMEOUT):
                head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                writer.write(head.encode())
                status = await _read_response(reader, is_head=method == "HEAD")
            findings.statuses[status or 0] += 1
            if status == 500:
                findings.problems.append(f"500 for {target}")
        except TimeoutError:
            findings.problems.append(f"no response to {method} {target}")
        except (ConnectionError, asyncio.IncompleteReadError):
            findings.statuses[0] += 1
        finally:
            writer.close()


async def _read_response(reader: asyncio.StreamReader, *, is_head: bool = False) -> int | None:
    """Read one response and return its status; None at the end of the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    status = int(head.split(b" ")[1])
    lines = head.lower().split(b"\r\n")
    length = next((int(one[15:]) for one in lines if one.startswith(b"content-length:")), 0)
    if not (is_head or status in (204, 304) or status < 200):
        await reader.readexactly(length)
    return status
