"""Faults of the process (P11, P18, P19): floods of log lines, no packet while offline, health that is true."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.system.images import Image
from tests.system.processes import Process, eventually, run
from tests.system.servers import Daemon, Registry
from tests.system.wire import Answer, ask

MakeDaemon = Callable[..., Daemon]
JUNK = (
    b"\x16\x03\x01\x02\x00 is how TLS begins\r\n\r\n",
    b"GET /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n",
    b'{"level":"error"}\r\n\x1b[31m\r\n\r\n',
)


def test_p11_a_flood_of_malformed_requests_leaves_a_short_log(daemon: Daemon):
    host, port = daemon.address.split(":")
    before = len(daemon.log)
    for number in range(1000):
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(JUNK[number % len(JUNK)])
            assert b"400" in client.recv(100)
    assert ask(daemon.url, "/v2/").status == 200
    eventually(lambda: '"path":"/v2/"' in daemon.log, "the line of what was well formed")
    assert len(daemon.log) - before < 5000


def test_p18_while_offline_not_a_packet_is_sent_to_anybody(place: Path):
    with socket.create_server(("127.0.0.1", 0)) as registry:
        port = registry.getsockname()[1]
        asked = connections_of(place / "online", port)
        assert f"htons({port})" in asked, "that the trace shows what it is looked at for"
        asked = connections_of(place / "offline", port, "--offline")
    assert f"htons({port})" not in asked
    assert "htons(53)" not in asked


def connections_of(place: Path, port: int, *options: str) -> str:
    """Return the connections that a daemon begins while it is asked for all that it does not have."""
    trace, config = place / "trace", place / "pullcache.toml"
    place.mkdir()
    # By name there is nobody to be asked but a name server; online that is not for us to do.
    name = "registry.invalid" if options else "127.0.0.1"
    config.write_text(
        f'[upstreams."docker.io"]\nurl = "http://127.0.0.1:{port}"\nsearch_url = "http://127.0.0.1:{port}"\n'
        f'[upstreams."named"]\nurl = "http://{name}:{port}"\n[[preload]]\nimages = ["named/app:1"]\n'
        "[fetch]\nattempts = 1\nconnect_timeout = '1s'\n"
    )
    serve = (sys.executable, "-m", "proxy", "serve", "--config", str(config), *options)
    where = ("--listen", "127.0.0.1:0", "--store", str(place / "store"))
    traced = ("strace", "-D", "-f", "-qq", "-e", "trace=connect", "-o", str(trace))
    process = Process(place, "daemon", [*traced, *serve, *where])

    def announced() -> str:
        found = re.search(r"http://127\.0\.0\.1:[1-9]\d*", process.out.read_text())
        return found[0] if found else ""

    url = process.wait_until(announced, "its announcement", deadline=40)
    if options:
        for answer in questions(url):
            assert answer.status in (404, 503)
            assert b"offline" in answer.body
    else:
        process.wait_until(lambda: f"htons({port})" in trace.read_text(), "a connection")
    process.stop()
    return trace.read_text()


def questions(url: str) -> list[Answer]:
    """Ask for what only an upstream could know."""
    digest = f"sha256:{'0' * 64}"
    paths = [
        f"/v2/{prefix}library/app/{what}"
        for prefix in ("", "named/")
        for what in ("manifests/latest", f"manifests/{digest}", f"blobs/{digest}", "tags/list")
    ]
    return [ask(url, path) for path in paths]


def test_p19_health_readiness_and_status_tell_three_different_things(
    daemon: Daemon, upstream: Registry, image: Image
):
    path = f"/v2/{image.repository}/manifests/{image.tag}"
    assert ask(daemon.url, path).sha256 == image.index
    assert tell(daemon) == (200, 200, "serving")
    # An upstream that fails is no reason to send clients elsewhere: what is cached is served.
    upstream.stop()

    def is_noticed() -> bool:
        ask(daemon.url, "/v2/library/other/manifests/latest")
        return tell(daemon)[2] == "degraded"

    eventually(is_noticed, "that upstream is down")
    assert tell(daemon) == (200, 200, "degraded")
    upstream.start()
    eventually(lambda: ask(daemon.url, "/v2/library/no/manifests/x").status == 404, "its return")
    assert tell(daemon) == (200, 200, "serving")
    # A store that cannot be written is one; to kill the process for it would mend nothing.
    incoming = daemon.store / "ingest"
    run("mount", "--bind", incoming, incoming)
    run("mount", "-o", "remount,bind,ro", incoming)
    try:
        assert tell(daemon) == (200, 503, "degraded")
        assert b"cannot be written" in ask(daemon.url, "/readyz").body
        assert ask(daemon.url, path).sha256 == image.index
    finally:
        run("umount", incoming)
    assert tell(daemon) == (200, 200, "serving")


def tell(daemon: Daemon) -> tuple[int, int, str]:
    """Return what is said to who restarts it, to who sends clients to it, and to people."""
    status = subprocess.run(
        ["curl", "-sS", "--unix-socket", daemon.store / "admin.sock", "http://x/api/v1/status"],
        capture_output=True,
        check=True,
    )
    state = str(json.loads(status.stdout)["state"])
    return ask(daemon.url, "/healthz").status, ask(daemon.url, "/readyz").status, state
