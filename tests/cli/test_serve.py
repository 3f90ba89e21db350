"""`pullcache serve`: what it says when it listens, and a real start."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from proxy import __version__
from proxy.app import DaemonInfo
from proxy.cli.commands.serve import print_banner


def announced(capsys: pytest.CaptureFixture[str], *addresses: str) -> str:
    print_banner(
        DaemonInfo(
            addresses=list(addresses),
            store=Path("/var/cache/pullcache"),
            max_size=50_000_000_000,
            used=1_234_567_890,
            upstreams={"docker.io": "https://registry-1.docker.io"},
        )
    )
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_a_newcomer_is_told_what_is_needed(capsys):
    said = announced(capsys, "127.0.0.1:5000", "[::1]:5000")
    assert f"pullcache {__version__}\n" in said
    assert "http://127.0.0.1:5000, http://[::1]:5000\n" in said
    assert "/var/cache/pullcache (1.23 GB used of at most 50 GB)\n" in said
    assert "docker.io = https://registry-1.docker.io\n" in said
    assert "http://127.0.0.1:5000/metrics\n" in said


@pytest.mark.parametrize(
    ("listens", "mirror"),
    [
        ("127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("[::]:5001", "http://127.0.0.1:5001"),
        ("0.0.0.0:5002", "http://127.0.0.1:5002"),
        ("192.0.2.7:5000", "http://192.0.2.7:5000"),
    ],
)
def test_the_line_for_docker_can_be_pasted(capsys, listens, mirror):
    (found,) = re.findall(r"put (\{.*\}) into /etc/docker/daemon.json", announced(capsys, listens))
    assert json.loads(found) == {"registry-mirrors": [mirror]}


def test_flags_reach_the_daemon_and_sigterm_ends_it(tmp_path):
    command = [
        *(sys.executable, "-m", "proxy", "serve"),
        *("--listen", "127.0.0.1:0"),
        *("--store", str(tmp_path / "store")),
        *("--max-size", "20MB"),
        *("--upstream", "docker.io=http://127.0.0.1:9"),
        *("--upstream", "ghcr.io=http://127.0.0.1:9"),
        *("--log-format", "json"),
        "--offline",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdout
        said = "".join(iter_until(daemon.stdout, "systemctl"))
        (port,) = re.findall(r"listening +http://127\.0\.0\.1:(\d+)\n", said)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        daemon.send_signal(signal.SIGTERM)
        out, log = daemon.communicate(timeout=30)
    assert daemon.returncode == 0, log
    assert out == ""
    assert f"{tmp_path}/store (0 B used of at most 20 MB)" in said
    assert "docker.io = http://127.0.0.1:9, ghcr.io = http://127.0.0.1:9\n" in said
    assert "pullcache_store_limit_bytes 2e+07\n" in metrics
    assert [json.loads(line)["level"] for line in log.splitlines()].count("error") == 0


def iter_until(stream, word: str):
    for line in stream:
        yield line
        if word in line:
            return
