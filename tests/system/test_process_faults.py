"""Faults of the process (P11, P18, P19): floods of log lines, no packet while offline, true health checks."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.system.http_client import HttpResponse, send_request
from tests.system.images import BuiltImage
from tests.system.processes import Process, eventually, run
from tests.system.servers import Daemon, Registry

MakeDaemon = Callable[..., Daemon]
MALFORMED_REQUESTS = (
    b"\x16\x03\x01\x02\x00 is the start of TLS\r\n\r\n",
    b"GET /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n",
    b'{"level":"error"}\r\n\x1b[31m\r\n\r\n',
)


def test_p11_a_flood_of_malformed_requests_leaves_a_short_log(daemon: Daemon):
    host, port = daemon.address.split(":")
    before = len(daemon.log)
    for number in range(1000):
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(MALFORMED_REQUESTS[number % len(MALFORMED_REQUESTS)])
            assert b"400" in client.recv(100)
    assert send_request(daemon.url, "/v2/").status == 200
    eventually(lambda: '"path":"/v2/"' in daemon.log, "the line of the valid request")
    assert len(daemon.log) - before < 5000


def test_p18_while_offline_no_packet_is_sent_to_an_upstream_or_a_name_server(directory: Path):
    with socket.create_server(("127.0.0.1", 0)) as registry:
        port = registry.getsockname()[1]
        trace = trace_connections(directory / "online", port)
        assert f"htons({port})" in trace, "the control: the trace shows connections to upstreams"
        trace = trace_connections(directory / "offline", port, "--offline")
    assert f"htons({port})" not in trace
    assert "htons(53)" not in trace


def trace_connections(directory: Path, port: int, *options: str) -> str:
    """Return strace's log of the connections that a daemon opens when asked for content that it lacks."""
    trace, config = directory / "trace", directory / "pullcache.toml"
    directory.mkdir()
    # The name would be resolved by a name server. The online control must not query one: it uses an
    # address.
    name = "registry.invalid" if options else "127.0.0.1"
    config.write_text(
        f'[upstreams."docker.io"]\nurl = "http://127.0.0.1:{port}"\nsearch_url = "http://127.0.0.1:{port}"\n'
        f'[upstreams."named"]\nurl = "http://{name}:{port}"\n[[preload]]\nimages = ["named/app:1"]\n'
        "[fetch]\nattempts = 1\nconnect_timeout = '1s'\n"
    )
    strace = ("strace", "-D", "-f", "-qq", "-e", "trace=connect", "-o", str(trace))
    serve = (sys.executable, "-m", "proxy", "serve", "--config", str(config), *options)
    listen = ("--listen", "127.0.0.1:0", "--store", str(directory / "store"))
    process = Process(directory, "daemon", [*strace, *serve, *listen])

    def find_url() -> str:
        match = re.search(r"http://127\.0\.0\.1:[1-9]\d*", process.stdout_log.read_text())
        return match[0] if match else ""

    url = process.wait_until(find_url, "its address", timeout=40)
    if options:
        for response in request_uncached_content(url):
            assert response.status in (404, 503)
            assert b"offline" in response.body
    else:
        process.wait_until(lambda: f"htons({port})" in trace.read_text(), "a connection")
    process.stop()
    return trace.read_text()


def request_uncached_content(url: str) -> list[HttpResponse]:
    """Request manifests, blobs and tags that only an upstream could have."""
    digest = f"sha256:{'0' * 64}"
    paths = [
        f"/v2/{prefix}library/app/{path}"
        for prefix in ("", "named/")
        for path in ("manifests/latest", f"manifests/{digest}", f"blobs/{digest}", "tags/list")
    ]
    return [send_request(url, path) for path in paths]


def test_p19_health_readiness_and_status_report_different_faults(
    daemon: Daemon, upstream: Registry, image: BuiltImage
):
    path = f"/v2/{image.repository}/manifests/{image.tag}"
    assert send_request(daemon.url, path).sha256 == image.index
    assert health(daemon) == (200, 200, "serving")
    # While an upstream is down the daemon stays ready, because it still serves cached content.
    upstream.stop()

    def is_degraded() -> bool:
        send_request(daemon.url, "/v2/library/other/manifests/latest")
        return health(daemon)[2] == "degraded"

    eventually(is_degraded, "the daemon notices that upstream is down")
    assert health(daemon) == (200, 200, "degraded")
    upstream.start()
    eventually(
        lambda: send_request(daemon.url, "/v2/library/no/manifests/x").status == 404,
        "the daemon notices that upstream is up",
    )
    assert health(daemon) == (200, 200, "serving")
    # A daemon that cannot write its store is not ready, but it stays healthy: a restart would not
    # help.
    ingest = daemon.store / "ingest"
    run("mount", "--bind", ingest, ingest)
    run("mount", "-o", "remount,bind,ro", ingest)
    try:
        assert health(daemon) == (200, 503, "degraded")
        assert b"cannot be written" in send_request(daemon.url, "/readyz").body
        assert send_request(daemon.url, path).sha256 == image.index
    finally:
        run("umount", ingest)
    assert health(daemon) == (200, 200, "serving")


def health(daemon: Daemon) -> tuple[int, int, str]:
    """Return the statuses of /healthz and /readyz, and the state in the admin API."""
    status = subprocess.run(
        ["curl", "-sS", "--unix-socket", daemon.store / "admin.sock", "http://x/api/v1/status"],
        capture_output=True,
        check=True,
    )
    state = str(json.loads(status.stdout)["state"])
    return (
        send_request(daemon.url, "/healthz").status,
        send_request(daemon.url, "/readyz").status,
        state,
    )
