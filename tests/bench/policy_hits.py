"""Hits under policies: stored manifests with ten rules, the last of which decides, and without any."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.bench import load, proc
from tests.bench.figures import Goal, LoadSize, Row, Runs
from tests.bench.testbed import PULLCACHE, ServerProcess, Testbed, pullcache

WITHOUT = "no policy"
CLIENTS = 32
RULES = 10


def measure(testbed: Testbed, size: LoadSize, directory: Path) -> Iterator[Row]:
    """Measure manifests by tag and by digest."""
    config = directory / "policies.toml"
    config.write_text(_policies())
    with ExitStack() as stack:
        servers = []
        for name, env in ((PULLCACHE, {"PULLCACHE_CONFIG": str(config)}), (WITHOUT, {})):
            home = directory / name.replace(" ", "-")
            upstream = f"http://{testbed.address}"
            daemon = stack.enter_context(pullcache(home, upstream, dict(env)))
            server = ServerProcess(name, daemon.url, daemon.process.pid, home)
            testbed.check(server, testbed.content.by_tag)
            testbed.check(server, testbed.content.by_digest)
            servers.append(server)
        for what, path in (("tag", testbed.content.by_tag), ("digest", testbed.content.by_digest)):
            once = partial(load.wrk, path=path, seconds=size.seconds, clients=CLIENTS)
            runs = Runs()
            for _ in range(size.rounds):
                for server in servers:
                    load.load_into_memory(server, path)
                    proc.wait_until_idle(other.pid for other in servers)
                    runs.add(server.name, once(server))
            rates = runs.figures(lambda run: run.requests / run.seconds)
            work = f"manifest by {what}, {CLIENTS} clients, {RULES} rules"
            yield Row(work, "1/s", rates, Goal(">=", 0.9, WITHOUT))
            spent = runs.figures(lambda run: run.server_cpu / max(1, run.requests) * 1e6)
            yield Row("  server's CPU", "us", spent)


def _policies() -> str:
    """Return rules of which only the last is about the images that are measured."""
    others = "".join(
        f'[[policy]]\nimages = ["docker.io/team{number}/*"]\nmode = "enforce"\n'
        f'trusted = ["verified_publisher"]\n\n'
        for number in range(RULES - 1)
    )
    return (
        f'{others}[[policy]]\nimages = ["docker.io/*"]\nmode = "enforce"\n'
        'allow = ["docker.io/*"]\ndeny_tags = ["nightly*"]\nmin_age = "3d"\n'
    )
