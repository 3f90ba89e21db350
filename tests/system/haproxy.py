"""Debian's HAProxy in front of daemons, with `config/haproxy/haproxy.cfg`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.ports import reserve_port
from tests.system.http_client import has_status
from tests.system.processes import Process
from tests.system.servers import Daemon

HAPROXY_EXAMPLE = Path(__file__).parents[2] / "config" / "haproxy" / "haproxy.cfg"
# What each daemon needs behind it.
BEHIND_HAPROXY = {
    "PULLCACHE_SERVER_TRUSTED_PROXIES": "127.0.0.1/32",
    "PULLCACHE_FETCH_PREFETCH": "off",
}


@contextmanager
def haproxy_before(directory: Path, daemons: Sequence[Daemon]) -> Iterator[str]:
    """Run HAProxy with the example, in which only addresses are replaced; yield its URL."""
    text = HAPROXY_EXAMPLE.read_text()
    port = reserve_port(daemons[0])
    replaced = {"bind :5000": f"bind 127.0.0.1:{port}"}
    for number, daemon in enumerate(daemons, 1):
        replaced[f"10.0.0.1{number}:5000"] = daemon.address
    for old, new in replaced.items():
        assert old in text, f"{HAPROXY_EXAMPLE} has no {old}"
        text = text.replace(old, new)
    file = directory / "haproxy.cfg"
    file.write_text(text)
    process = Process(directory, "haproxy", ["haproxy", "-db", "-f", file])
    try:
        url = f"http://127.0.0.1:{port}"
        process.wait_until(lambda: has_status(url, "/readyz"), "the daemons behind it")
        yield url
    finally:
        process.stop()
