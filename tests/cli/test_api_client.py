"""How commands reach the daemon: the running one, or an embedded one that leaves nothing behind."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from proxy.cli.api_client import open_admin_client
from proxy.config import Config, load
from proxy.errors import DaemonUnavailableError, ProxyError
from proxy.storage.blobs import BlobStore

# A command that runs until it is stopped.
WAIT_SCRIPT = """
import sys, threading
from pathlib import Path
import click
from proxy.cli import main
from proxy.cli.api_client import open_admin_client
from proxy.cli.options import load_config

@main.command()
@click.option("--store")
def wait(store):
    with open_admin_client(load_config(None, store)) as api:
        print(api.get("/api/v1/status")["state"], flush=True)
        threading.Event().wait()

main()
"""


def config_for(root: Path) -> Config:
    BlobStore(root).close()
    return load(None, {}, {"store": {"path": str(root), "max_size": "1GB", "min_free": "0B"}})


@pytest.fixture
def config(tmp_path) -> Config:
    return config_for(tmp_path / "store")


def tcp_listeners() -> set[str]:
    """Return the TCP addresses that this process listens on."""
    inodes = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            inodes.add(str(fd.readlink()))
        except FileNotFoundError:  # the descriptor of this directory
            continue
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
    ]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}


def test_without_a_daemon_a_command_embeds_one_and_leaves_nothing_behind(config):
    with open_admin_client(config) as api:
        assert api.get("/api/v1/status")["addresses"] == []
        assert tcp_listeners() == set()
        assert (config.store.path / "admin.sock").exists()
    assert not (config.store.path / "admin.sock").exists()
    BlobStore(config.store.path).close()


def test_a_second_command_uses_the_embedded_daemon_of_the_first(config):
    with (
        open_admin_client(config) as first,
        open_admin_client(config, allow_embedded=False) as second,
    ):
        first.put("/api/v1/offline", {"offline": True})
        assert second.get("/api/v1/status")["offline"] is True


def test_the_socket_of_a_killed_daemon_is_ignored(config):
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(config.store.path / "admin.sock"))
    with (
        pytest.raises(DaemonUnavailableError, match="no daemon is listening on"),
        open_admin_client(config, allow_embedded=False),
    ):
        pass
    with open_admin_client(config) as api:
        assert api.get("/api/v1/status")["state"] == "serving"


def test_a_locked_store_without_a_socket_is_an_error_that_names_the_process(config):
    store = BlobStore(config.store.path)
    try:
        with (
            pytest.raises(
                DaemonUnavailableError, match=rf"in use by process {os.getpid()}, which does not"
            ),
            open_admin_client(config),
        ):
            pass
    finally:
        store.close()


def test_a_store_with_a_long_path_is_found(tmp_path):
    config = config_for(tmp_path / ("d" * 100) / ("e" * 100))
    with open_admin_client(config), open_admin_client(config, allow_embedded=False) as api:
        assert api.is_ready()


def test_a_silent_daemon_is_an_error_after_the_timeout(config):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(config.store.path / "admin.sock"))
        silent.listen()
        with open_admin_client(config, allow_embedded=False, timeout=0.05) as api:
            assert not api.is_ready()
            with pytest.raises(DaemonUnavailableError, match="did not respond in time"):
                api.get("/api/v1/status")


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{}", "stopped during the request"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", "stopped during"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 4\r\n\r\nbusy", "responded with status 500: busy"),
        (b"", "stopped during"),
    ],
    ids=["truncated", "no last chunk", "not JSON", "empty"],
)
def test_an_invalid_response_is_an_error(config, response, message):
    with socket.socket(socket.AF_UNIX) as daemon, ThreadPoolExecutor(1) as threads:
        daemon.bind(str(config.store.path / "admin.sock"))
        daemon.listen()

        def serve() -> None:
            daemon.accept()[0].close()  # the check whether a daemon is listening
            connection, _ = daemon.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(response)

        threads.submit(serve)
        with (
            open_admin_client(config, allow_embedded=False) as api,
            pytest.raises(ProxyError, match=message),
        ):
            api.get("/api/v1/status")


def test_an_error_in_the_block_stops_the_embedded_daemon(config):
    with pytest.raises(ZeroDivisionError), open_admin_client(config):
        _ = 1 / 0
    assert not (config.store.path / "admin.sock").exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_signal_shuts_the_embedded_daemon_down_in_order(config, number, code):
    command = [sys.executable, "-c", WAIT_SCRIPT, "wait", "--store", str(config.store.path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout
        assert running.stdout.readline() == "serving\n"
        running.send_signal(number)
        out, err = running.communicate(timeout=30)
    assert (running.returncode, out, err) == (code, "", "")
    assert not (config.store.path / "admin.sock").exists()
    BlobStore(config.store.path).close()
