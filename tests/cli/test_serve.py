"""`pullcache serve`: the banner, and a real start."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from proxy import __version__
from proxy.app import DaemonInfo
from proxy.cli.commands.serve import print_banner


def banner(capsys: pytest.CaptureFixture[str], *addresses: str) -> str:
    print_banner(
        DaemonInfo(
            addresses=list(addresses),
            store=Path("/var/cache/pullcache"),
            max_size=50_000_000_000,
            used=1_234_567_890,
            upstreams={
                "docker.io": "https://registry-1.docker.io",
                "ghcr.test": "https://registry.ghcr.example",
            },
        )
    )
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_the_banner_shows_addresses_store_upstreams_and_metrics(capsys):
    text = banner(capsys, "127.0.0.1:5000", "[::1]:5000")
    assert (
        text
        == f"""\
pullcache {__version__}
  listening  http://127.0.0.1:5000
             http://[::1]:5000
  store      /var/cache/pullcache
             1.23 GB of 50 GB used
  upstreams  docker.io
             ghcr.test = https://registry.ghcr.example
  metrics    http://127.0.0.1:5000/metrics
  clients    pullcache client-config docker
  pages      pullcache ui
"""
    )
    assert max(map(len, text.splitlines())) <= 60


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("[::]:5001", "http://127.0.0.1:5001"),
        ("0.0.0.0:5002", "http://127.0.0.1:5002"),
        ("192.0.2.7:5000", "http://192.0.2.7:5000"),
    ],
)
def test_the_address_of_the_metrics_is_one_that_works_here(capsys, address, local):
    assert f"  metrics    {local}/metrics\n" in banner(capsys, address)


def test_options_reach_the_daemon_and_sigterm_stops_it(tmp_path):
    command = [
        *(sys.executable, "-m", "proxy", "serve"),
        *("--listen", "127.0.0.1:0"),
        *("--store", str(tmp_path / "store")),
        *("--max-size", "20MB"),
        *("--upstream", "docker.io=http://127.0.0.1:9"),
        *("--upstream", "ghcr.io=http://127.0.0.1:9"),
        *("--upstream", "quay.io"),
        *("--log-format", "json"),
        *("--log-level", "debug"),
        "--offline",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdout
        text = "".join(lines_until(daemon.stdout, "pullcache ui"))
        (port,) = re.findall(r"listening +http://127\.0\.0\.1:(\d+)\n", text)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            metrics = response.read().decode()
        daemon.send_signal(signal.SIGTERM)
        out, log = daemon.communicate(timeout=30)
    assert daemon.returncode == 0, log
    assert out == ""
    assert f"  store      {tmp_path}/store\n             0 B of 20 MB used\n" in text
    for upstream in ("docker.io = http://127.0.0.1:9", "ghcr.io = http://127.0.0.1:9", "quay.io"):
        assert f" {upstream}\n" in text
    assert "pullcache_store_limit_bytes 2e+07\n" in metrics
    assert {json.loads(line)["level"] for line in log.splitlines()} <= {"info", "debug"}


def test_a_port_that_is_in_use_is_a_failure_and_no_configuration_error(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "proxy", "serve", "--listen", address, "--store", tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"server.listen: {address} cannot be used" in done.stderr


def lines_until(stream: Iterable[str], word: str) -> Iterator[str]:
    for line in stream:
        yield line
        if word in line:
            return
