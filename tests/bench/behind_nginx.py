"""Hits behind nginx, which sends stored blobs itself (`server.accel_redirect`), beside a daemon that sends them."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.bench import light_client, load, proc
from tests.bench.content import KIB, MIB
from tests.bench.figures import Goal, LoadSize, Row, Runs
from tests.bench.testbed import OTHER, PULLCACHE, ServerProcess, Testbed, pullcache
from tests.system.nginx import BEHIND_NGINX, nginx

DIRECT = "no nginx"
CLIENTS = 32
SIZES = (64 * KIB, MIB, 16 * MIB)
# The daemon's CPU time for a hit of 1 MiB, in microseconds, and the rate of such hits beside one process.
MAX_CPU = 60
MIN_SPEEDUP = 1.3


def measure(testbed: Testbed, size: LoadSize, directory: Path) -> Iterator[Row]:
    """Measure blobs from memory: rates of whole responses, and the CPU time for each, by process.

    The client is light: wrk takes more CPU time than both servers, so that it would be measured.
    """
    with ExitStack() as stack:
        home = directory / "behind"
        home.mkdir()
        directory.chmod(0o711)  # for nginx's workers
        daemon = stack.enter_context(
            pullcache(home / "daemon", f"http://{testbed.address}", dict(BEHIND_NGINX))
        )
        url, front = stack.enter_context(nginx(home, daemon, workers=2))
        servers = [ServerProcess(PULLCACHE, url, daemon.process.pid, home / "daemon")]
        for name in testbed.with_other(PULLCACHE):
            direct = stack.enter_context(testbed.running(name))
            shown = DIRECT if name == PULLCACHE else OTHER
            servers.append(ServerProcess(shown, direct.url, direct.pid, direct.home))
        for length in SIZES:
            path = testbed.content.blobs[length]
            for server in servers:
                testbed.check(server, path)
                testbed.wait_until_stored(server, path)
            yield from _blobs(servers, size, path, length, front.pid)


def _blobs(
    servers: list[ServerProcess], size: LoadSize, path: str, length: int, front: int
) -> Iterator[Row]:
    seconds = 3 * size.seconds
    runs = Runs()
    by_client: dict[str, list[float]] = {}
    by_nginx = []
    for _ in range(size.rounds):
        for server in servers:
            load.load_into_memory(server, path)
            proc.wait_until_idle([front, *(other.pid for other in servers)])
            spent = proc.cpu_seconds_of_tree(front)
            done = light_client.fetch(server, path, length, seconds=seconds, clients=CLIENTS)
            runs.add(server.name, done)
            by_client.setdefault(server.name, []).append(done.client_cpu / done.requests * 1e6)
            if server.name == PULLCACHE:
                by_nginx.append((proc.cpu_seconds_of_tree(front) - spent) / done.requests * 1e6)
    shown = f"{length // MIB} MiB" if length >= MIB else f"{length // KIB} KiB"
    rates = runs.figures(lambda run: run.requests / run.seconds)
    has_goal = length == MIB
    speedup = Goal(">=", MIN_SPEEDUP, DIRECT) if has_goal else None
    yield Row(f"{shown} blob, {CLIENTS} clients", "1/s", rates, speedup, more=True)
    by_daemon = runs.figures(lambda run: run.server_cpu / run.requests * 1e6)
    yield Row("  daemon's CPU", "us", by_daemon, Goal("<=", MAX_CPU) if has_goal else None)
    yield Row("  nginx's CPU", "us", {PULLCACHE: by_nginx})
    yield Row("  client's CPU", "us", by_client)
