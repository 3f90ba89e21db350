"""Behind HAProxy, the daemon knows the real clients: by the PROXY protocol and by X-Forwarded-For."""

import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.support.ports import reserve_port
from tests.system.http_client import has_status
from tests.system.processes import Process
from tests.system.servers import Daemon, Registry

pytestmark = pytest.mark.system

CLIENTS = ("127.0.0.2", "127.0.0.3")
MODES = {
    "send-proxy": "mode tcp",
    "send-proxy-v2": "mode tcp",
    "forwardfor": "mode http\n  option forwardfor",
}
CONFIG = """\
defaults
  timeout connect 5s
  timeout client 30s
  timeout server 30s
listen cache
  bind 127.0.0.1:{port}
  {mode}
  server one {daemon} {option} check inter 200ms
"""


@contextmanager
def haproxy(directory: Path, daemon: Daemon, name: str) -> Iterator[str]:
    """Run HAProxy in front of the daemon, and yield its address."""
    port = reserve_port(daemon)
    option = "" if name == "forwardfor" else name
    file = directory / "haproxy.cfg"
    file.write_text(
        CONFIG.format(port=port, mode=MODES[name], daemon=daemon.address, option=option)
    )
    process = Process(directory, "haproxy", ["haproxy", "-db", "-f", str(file)])
    try:
        url = f"http://127.0.0.1:{port}"
        process.wait_until(lambda: has_status(url, "/readyz"), "the daemon behind it")
        yield f"127.0.0.1:{port}"
    finally:
        process.stop()


def get(address: str, client: str, path: str) -> int:
    """Send a request from the address of a client, and return the status."""
    connection = http.client.HTTPConnection(address, timeout=10, source_address=(client, 0))
    with closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        return response.status


def logged_clients(daemon: Daemon, path: str) -> list[str]:
    lines = [json.loads(line) for line in daemon.log.splitlines() if line.startswith("{")]
    return [one["client"] for one in lines if one["event"] == "request" and one["path"] == path]


@pytest.mark.parametrize("name", MODES)
def test_the_log_has_the_clients_and_not_haproxy(
    name: str, upstream: Registry, make_daemon: Callable[..., Daemon], directory: Path
):
    settings = {
        "PULLCACHE_SERVER_TRUSTED_PROXIES": "127.0.0.1/32",
        "PULLCACHE_SERVER_ALLOW_CLIENTS": "127.0.0.1,127.0.0.2",
    }
    daemon = make_daemon(upstream.url, env=settings)
    with haproxy(directory, daemon, name) as address:
        assert get(address, "127.0.0.2", "/v2/") == 200
        assert get(address, "127.0.0.3", "/v2/") == 403
        assert get(address, "127.0.0.3", "/healthz") == 200
    assert daemon.stop() == 0
    assert logged_clients(daemon, "/v2/") == [*CLIENTS]
