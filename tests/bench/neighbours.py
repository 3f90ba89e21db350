"""A client's cold blob beside a greedy client, and beside an upstream that does not respond."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tests.bench import load
from tests.bench.content import MIB
from tests.bench.figures import Goal, LoadSize, Row
from tests.bench.flood import ADDRESS, flooding
from tests.bench.testbed import PULLCACHE, ServerProcess, Testbed, pullcache

HANGING = "hanging.test"
HANGING_REQUESTS = 24

_CONFIG = """\
[upstreams."docker.io"]
url = "{url}"
[upstreams."{hanging}"]
url = "http://127.0.0.1:{port}"
"""


def measure(testbed: Testbed, size: LoadSize, directory: Path) -> Iterator[Row]:
    """Fetch a cold blob alone and beside each of the two, with an empty store each time."""
    seconds: dict[str, list[float]] = {"alone": [], "flood": [], "hanging": []}
    for round_number in range(size.slow_rounds):
        for what, figures in seconds.items():
            with (
                _hanging_port() as port,
                _running(testbed, directory / f"{what}{round_number}", port) as server,
                ExitStack() as stack,
            ):
                if what == "flood":
                    stack.enter_context(flooding(server.url, size.flooding))
                if what == "hanging":
                    stack.enter_context(_waiting(server))
                path = testbed.content.cold
                run = load.blobs(server, path, size.cold, seconds=0, clients=1)
                figures.append(run.seconds)
    alone = seconds["alone"]
    yield Row(f"{size.cold // MIB} MiB blob, cold, alone", "s", {PULLCACHE: alone}, digits=2)
    for what, text in (
        ("flood", f"  beside {size.flooding:,} connections for absent blobs"),
        ("hanging", f"  beside {HANGING_REQUESTS} requests to an upstream that hangs"),
    ):
        ratios = [taken / before for taken, before in zip(seconds[what], alone, strict=True)]
        goal = Goal("<=", 2 if what == "flood" else 1.25)
        yield Row(text, "x alone", {PULLCACHE: ratios}, goal, digits=2)


@contextmanager
def _running(testbed: Testbed, home: Path, hanging_port: int) -> Iterator[ServerProcess]:
    """Run pullcache with the testbed's upstream and one that hangs; let it fetch one small blob."""
    home.mkdir()
    config = home / "pullcache.toml"
    url = f"http://{testbed.address}"
    config.write_text(_CONFIG.format(url=url, hanging=HANGING, port=hanging_port))
    with pullcache(home, url, {"PULLCACHE_CONFIG": str(config)}) as daemon:
        server = ServerProcess(PULLCACHE, daemon.url, daemon.process.pid, home)
        testbed.fill(server)
        yield server


@contextmanager
def _hanging_port() -> Iterator[int]:
    """Yield a port where connections are established, but nothing is answered."""
    with socket.create_server(("127.0.0.1", 0), backlog=2 * HANGING_REQUESTS) as listener:
        yield listener.getsockname()[1]


@contextmanager
def _waiting(server: ServerProcess) -> Iterator[None]:
    """Let requests wait for blobs of the hanging upstream, all from one address."""
    parts = urlsplit(server.url)
    with ExitStack() as stack:
        for number in range(HANGING_REQUESTS):
            client = socket.create_connection(
                (parts.hostname, parts.port), timeout=60, source_address=(ADDRESS, 0)
            )
            stack.enter_context(client)
            path = f"/v2/{HANGING}/library/app/blobs/sha256:{number:064x}"
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
        yield
