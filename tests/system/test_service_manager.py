"""The daemon under a service manager: its messages, passed sockets, and restarts that fail no pull."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from tests.system.blob_server import CHUNK_SIZE, BlobServer
from tests.system.http_client import DownloadThread, has_status, send_request
from tests.system.images import BuiltImage
from tests.system.processes import Process, eventually, isolated_environment, run
from tests.system.servers import Registry, htpasswd_auth
from tests.system.service_manager import FakeServiceManager, MakeServiceManager

MIB = 1 << 20
PULLS = 200
RESTARTS = 10


@pytest.fixture
def make_manager(directory: Path) -> Iterator[MakeServiceManager]:
    numbers = count()

    def make(upstream: str, **options: float) -> FakeServiceManager:
        manager = FakeServiceManager(directory / f"managed{next(numbers)}", upstream, **options)
        stack.callback(manager.finish)
        return manager

    with ExitStack() as stack:
        yield make


def test_the_manager_is_notified_of_start_reload_and_stop(
    make_manager: MakeServiceManager, upstream: Registry
):
    manager = make_manager(upstream.url)
    manager.start()
    first, *_, last = manager.messages
    assert int(first["EXTEND_TIMEOUT_USEC"]) >= 10_000_000
    assert last["READY"] == "1"
    assert re.fullmatch(r"running: 0 responses, 0 downloads; 0 served; .* GB", last["STATUS"])
    before = time.monotonic_ns() // 1000
    manager.process.signal(signal.SIGHUP)
    message = manager.wait_for("RELOADING")
    assert before <= int(message["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert manager.wait_for("READY")
    manager.process.signal(signal.SIGTERM)
    assert manager.wait_for("STOPPING")
    assert manager.process.wait() == 0


def test_child_processes_do_not_inherit_the_manager_s_variables_and_sockets(
    make_manager: MakeServiceManager, upstream: Registry, directory: Path
):
    program = directory / "bin" / "docker-credential-spy"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\nenv >{directory}/inherited\nls -l /proc/$$/fd >>{directory}/inherited\nexit 1\n"
    )
    program.chmod(0o755)
    upstream.stop()
    upstream.auth = htpasswd_auth(directory)
    upstream.start()
    manager = make_manager(upstream.url, watchdog=30)
    manager.configure(upstream.url, 'credential_helper = "spy"\n')
    manager.start("env", f"PATH={program.parent}:/usr/bin:/bin")
    send_request(manager.url, "/v2/library/any/manifests/latest")
    inherited = (directory / "inherited").read_text()
    assert "PATH=" in inherited
    assert not re.search("NOTIFY_SOCKET|WATCHDOG|LISTEN_", inherited)
    listener = Path(f"/proc/{manager.process.pid}/fd/3").readlink()
    assert str(listener).startswith("socket:")
    assert str(listener) not in inherited


def test_sighup_applies_the_changed_configuration(
    make_manager: MakeServiceManager, upstream: Registry, image: BuiltImage
):
    manager = make_manager("http://127.0.0.1:9")
    manager.start()
    path = f"/v2/{image.repository}/manifests/{image.tag}"
    assert send_request(manager.url, path).status == 503
    manager.configure(upstream.url)
    manager.reload()
    assert send_request(manager.url, path).sha256 == image.index
    eventually(lambda: '"event":"config_reloaded"' in manager.log, "its line in the log")


def test_p03_an_invalid_configuration_shows_in_log_status_and_metrics(
    make_manager: MakeServiceManager, upstream: Registry, image: BuiltImage
):
    manager = make_manager(upstream.url)
    manager.start()
    manager.configure(upstream.url, "[manifests]\nttl = 'soon'\n")
    manager.reload()
    assert "last reload failed" in manager.messages[-1]["STATUS"]
    (line,) = eventually(
        lambda: [line for line in manager.log.splitlines() if '"config_reload_failed"' in line],
        "its line in the log",
    )
    assert str(manager.config) in line
    assert "manifests.ttl" in line
    metrics = send_request(manager.url, "/metrics").body.decode()
    assert "pullcache_config_last_reload_successful 0.0" in metrics
    assert 'pullcache_config_reloads_total{result="failure"} 1.0' in metrics
    path = f"/v2/{image.repository}/manifests/{image.tag}"
    assert send_request(manager.url, path).sha256 == image.index


def test_p04_a_process_that_was_suspended_continues(
    make_manager: MakeServiceManager, blobs: BlobServer
):
    digest = blobs.add(bytes(8 * MIB), hold_at=4 * MIB)
    manager = make_manager(blobs.url, watchdog=0.4)
    manager.start()
    download = DownloadThread(manager.url, f"/v2/library/big/blobs/{digest}")
    eventually(lambda: download.received > MIB, "the middle of a pull")
    manager.process.signal(signal.SIGSTOP)
    while manager.has_message(1):
        manager.receive()
    blobs.release(digest)
    manager.process.signal(signal.SIGCONT)
    manager.wait_for("WATCHDOG")
    assert (download.finish().digest, download.error) == (digest, None)


def test_p05_the_watchdog_gets_no_message_while_the_store_hangs(
    make_manager: MakeServiceManager, upstream: Registry, directory: Path
):
    disk, image_file = directory / "disk", directory / "disk.img"
    disk.mkdir()
    with image_file.open("wb") as file:
        file.truncate(64 * MIB)
    run("mkfs.ext4", "-q", image_file)
    run("mount", "-o", "loop", image_file, disk)
    manager = make_manager(upstream.url, watchdog=0.4)
    manager.store = disk / "store"
    manager.configure(upstream.url)
    manager.start()
    manager.wait_for("WATCHDOG")
    run("fsfreeze", "--freeze", disk)
    try:
        while manager.has_message(2):
            manager.receive()
        assert has_status(manager.url, "/healthz"), "the event loop runs"
    finally:
        run("fsfreeze", "--unfreeze", disk)
    manager.wait_for("WATCHDOG")
    assert manager.stop() == 0


def test_p05_a_daemon_killed_by_the_watchdog_logs_its_stacks(
    make_manager: MakeServiceManager, upstream: Registry
):
    manager = make_manager(upstream.url)
    manager.start()
    manager.process.signal(signal.SIGABRT)
    assert manager.process.wait() == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in manager.log
    assert "Current thread" in manager.log


def test_p02_sigquit_logs_the_stacks_of_the_tasks(
    make_manager: MakeServiceManager, upstream: Registry
):
    manager = make_manager(upstream.url)
    manager.start()
    manager.process.signal(signal.SIGQUIT)
    eventually(lambda: "run_maintenance" in manager.log, "the stacks of the tasks")
    assert has_status(manager.url, "/healthz")


def test_p02_a_second_sigterm_stops_the_daemon_without_waiting_for_responses(
    make_manager: MakeServiceManager, blobs: BlobServer
):
    digest = blobs.add(bytes(8 * MIB), hold_at=2 * CHUNK_SIZE)
    manager = make_manager(blobs.url)
    manager.configure(blobs.url, "[server]\nshutdown_timeout = '1d'\n")
    manager.start()
    download = DownloadThread(manager.url, f"/v2/library/big/blobs/{digest}")
    eventually(download.first_byte.is_set, "the middle of a pull")
    manager.process.signal(signal.SIGTERM)
    manager.wait_for("STOPPING")
    assert manager.process.is_running()
    manager.process.signal(signal.SIGTERM)
    assert manager.process.wait() == 0
    assert not download.finish().is_complete


def test_passed_sockets_for_the_registry_and_the_admin_api_are_served(
    make_manager: MakeServiceManager, upstream: Registry
):
    manager = make_manager(upstream.url)
    path = manager.directory / "admin"
    admin = socket.socket(socket.AF_UNIX)
    admin.bind(str(path))
    admin.listen()
    manager.sockets["admin"] = admin
    manager.start()
    assert send_request(manager.url, "/v2/").status == 200
    assert send_request(manager.url, "/api/v1/status").status == 404
    status = run("curl", "-sSf", "--unix-socket", path, "http://localhost/api/v1/status")
    assert f'"addresses":["{manager.address}"]' in status
    assert f'"admin_addresses":["unix:{path}"]' in status
    assert manager.stop() == 0
    assert path.exists(), "the manager bound it, so the daemon leaves it"
    manager.start()
    run("curl", "-sSf", "--unix-socket", path, "http://localhost/api/v1/status")


def test_an_admin_socket_for_other_machines_needs_a_token(
    make_manager: MakeServiceManager, upstream: Registry
):
    manager = make_manager(upstream.url)
    manager.sockets["admin"] = socket.create_server(("0.0.0.0", 0))
    with pytest.raises(AssertionError, match="admin_token_file"):
        manager.start()
    assert manager.process.wait() == 2


def test_systemd_socket_activate_starts_the_daemon_at_the_first_connection(
    upstream: Registry, image: BuiltImage, directory: Path
):
    socket_path = directory / "activated.sock"
    serve = (sys.executable, "-m", "proxy", "serve", "--store", directory / "store")
    process = Process(
        directory,
        "activated",
        [
            *("systemd-socket-activate", "-l", socket_path, "--fdname=registry"),
            *(*serve, "--upstream", f"docker.io={upstream.url}", "--max-size", "1GB"),
        ],
    )
    process.wait_until(lambda: "Listening on" in process.stderr_log.read_text(), "its socket")
    url = f"http://localhost/v2/{image.repository}/manifests/{image.tag}"
    run("curl", "-sSf", "--unix-socket", socket_path, "-o", directory / "manifest", url)
    assert image.index.partition(":")[2] in run("sha256sum", directory / "manifest")
    assert process.stop() == 0


@pytest.mark.timeout(300)
def test_restarts_under_load_fail_no_pull(
    make_manager: MakeServiceManager, upstream: Registry, image: BuiltImage, directory: Path
):
    manager = make_manager(upstream.url)
    manager.start()
    pulls = PullLoad(directory, manager.address, image)
    for number in range(RESTARTS):
        pulls.wait_for(PULLS * number // (RESTARTS + 1))
        assert manager.stop() == 0
        manager.start()
    pulls.wait_for(PULLS)
    assert pulls.failures == []


class PullLoad:
    """Runs `PULLS` pulls by skopeo in four threads."""

    def __init__(self, directory: Path, address: str, image: BuiltImage) -> None:
        self.done = 0
        self.failures: list[str] = []
        self._place = directory
        self._source = f"docker://{address}/{image.repository}:{image.tag}"
        self._lock = threading.Lock()
        self._numbers = iter(range(PULLS))
        self._threads = [threading.Thread(target=self._pull, daemon=True) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def wait_for(self, number: int) -> None:
        eventually(lambda: self.done >= number, f"{number} pulls", timeout=200)

    def _pull(self) -> None:
        while True:
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                return
            target = f"dir:{self._place}/pulled{number}"
            done = subprocess.run(
                ["skopeo", "copy", "--quiet", "--src-tls-verify=false", self._source, target],
                env=isolated_environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            with self._lock:
                self.done += 1
                if done.returncode:
                    self.failures.append(done.stderr)
