"""The daemon under a service manager: what it says, the sockets it is given, restarts that nobody notices."""

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

from tests.system.blobserver import CHUNK, BlobServer
from tests.system.images import Image
from tests.system.manager import MakeManager, Manager
from tests.system.processes import Process, eventually, fenced, run
from tests.system.servers import Registry, by_password
from tests.system.wire import Reader, answers, ask

MIB = 1 << 20
PULLS = 200
RESTARTS = 10


@pytest.fixture
def make_manager(place: Path) -> Iterator[MakeManager]:
    numbers = count()

    def make(upstream: str, **options: float) -> Manager:
        manager = Manager(place / f"managed{next(numbers)}", upstream, **options)
        stack.callback(manager.finish)
        return manager

    with ExitStack() as stack:
        yield make


def test_the_manager_is_told_how_it_goes(make_manager: MakeManager, upstream: Registry):
    manager = make_manager(upstream.url)
    manager.start()
    first, *_, last = manager.heard
    assert int(first["EXTEND_TIMEOUT_USEC"]) >= 10_000_000
    assert last["READY"] == "1"
    assert re.fullmatch(r"0 responses and 0 downloads running; 0 served; .* GB", last["STATUS"])
    before = time.monotonic_ns() // 1000
    manager.process.signal(signal.SIGHUP)
    said = manager.hear("RELOADING")
    assert before <= int(said["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert manager.hear("READY")
    manager.process.signal(signal.SIGTERM)
    assert manager.hear("STOPPING")
    assert manager.process.wait() == 0


def test_the_environment_of_the_manager_is_not_handed_on(
    make_manager: MakeManager, upstream: Registry, place: Path
):
    program = place / "bin" / "docker-credential-spy"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nenv >{place}/seen\nls -l /proc/$$/fd >>{place}/seen\nexit 1\n")
    program.chmod(0o755)
    upstream.stop()
    upstream.auth = by_password(place)
    upstream.start()
    manager = make_manager(upstream.url, watchdog=30)
    manager.configure(upstream.url, 'credential_helper = "spy"\n')
    manager.start("env", f"PATH={program.parent}:/usr/bin:/bin")
    ask(manager.url, "/v2/library/any/manifests/latest")
    seen = (place / "seen").read_text()
    assert "PATH=" in seen
    assert not re.search("NOTIFY_SOCKET|WATCHDOG|LISTEN_", seen)
    listening = Path(f"/proc/{manager.process.pid}/fd/3").readlink()
    assert str(listening).startswith("socket:")
    assert str(listening) not in seen


def test_sighup_takes_over_what_the_file_says_now(
    make_manager: MakeManager, upstream: Registry, image: Image
):
    manager = make_manager("http://127.0.0.1:9")
    manager.start()
    path = f"/v2/{image.repository}/manifests/{image.tag}"
    assert ask(manager.url, path).status == 503
    manager.configure(upstream.url)
    manager.reload()
    assert ask(manager.url, path).sha256 == image.index
    eventually(lambda: '"event":"config_reloaded"' in manager.log, "its line in the log")


def test_p03_a_broken_file_is_said_in_log_status_and_metric(
    make_manager: MakeManager, upstream: Registry, image: Image
):
    manager = make_manager(upstream.url)
    manager.start()
    manager.configure(upstream.url, "[manifests]\nttl = 'soon'\n")
    manager.reload()
    assert "last reload failed" in manager.heard[-1]["STATUS"]
    (line,) = eventually(
        lambda: [line for line in manager.log.splitlines() if '"config_reload_failed"' in line],
        "its line in the log",
    )
    assert str(manager.config) in line
    assert "manifests.ttl" in line
    metrics = ask(manager.url, "/metrics").body.decode()
    assert "pullcache_config_last_reload_successful 0.0" in metrics
    assert 'pullcache_config_reloads_total{result="failure"} 1.0' in metrics
    path = f"/v2/{image.repository}/manifests/{image.tag}"
    assert ask(manager.url, path).sha256 == image.index


def test_p04_a_process_that_was_stopped_for_a_while_goes_on(
    make_manager: MakeManager, blobs: BlobServer
):
    digest = blobs.add(bytes(8 * MIB), hold_at=4 * MIB)
    manager = make_manager(blobs.url, watchdog=0.4)
    manager.start()
    reader = Reader(manager.url, f"/v2/library/big/blobs/{digest}")
    eventually(lambda: reader.received > MIB, "the middle of a pull")
    manager.process.signal(signal.SIGSTOP)
    while manager.is_talking(1):
        manager.listen()
    blobs.release(digest)
    manager.process.signal(signal.SIGCONT)
    manager.hear("WATCHDOG")
    assert (reader.finish().digest, reader.error) == (digest, None)


def test_p05_the_watchdog_hears_nothing_while_the_store_does_not_answer(
    make_manager: MakeManager, upstream: Registry, place: Path
):
    disk, image_file = place / "disk", place / "disk.img"
    disk.mkdir()
    with image_file.open("wb") as file:
        file.truncate(64 * MIB)
    run("mkfs.ext4", "-q", image_file)
    run("mount", "-o", "loop", image_file, disk)
    manager = make_manager(upstream.url, watchdog=0.4)
    manager.store = disk / "store"
    manager.configure(upstream.url)
    manager.start()
    manager.hear("WATCHDOG")
    run("fsfreeze", "--freeze", disk)
    try:
        while manager.is_talking(2):
            manager.listen()
        assert answers(manager.url, "/healthz"), "the loop goes on"
    finally:
        run("fsfreeze", "--unfreeze", disk)
    manager.hear("WATCHDOG")
    assert manager.stop() == 0


def test_p05_what_the_watchdog_kills_leaves_its_stacks(
    make_manager: MakeManager, upstream: Registry
):
    manager = make_manager(upstream.url)
    manager.start()
    manager.process.signal(signal.SIGABRT)
    assert manager.process.wait() == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in manager.log
    assert "Current thread" in manager.log


def test_p02_sigquit_tells_what_the_tasks_wait_for(make_manager: MakeManager, upstream: Registry):
    manager = make_manager(upstream.url)
    manager.start()
    manager.process.signal(signal.SIGQUIT)
    eventually(lambda: "_keep_house" in manager.log, "the stacks of the tasks")
    assert answers(manager.url, "/healthz")


def test_p02_a_second_sigterm_ends_what_the_first_waits_for(
    make_manager: MakeManager, blobs: BlobServer
):
    digest = blobs.add(bytes(8 * MIB), hold_at=2 * CHUNK)
    manager = make_manager(blobs.url)
    manager.configure(blobs.url, "[server]\nshutdown_timeout = '1d'\n")
    manager.start()
    reader = Reader(manager.url, f"/v2/library/big/blobs/{digest}")
    eventually(reader.first_byte.is_set, "the middle of a pull")
    manager.process.signal(signal.SIGTERM)
    manager.hear("STOPPING")
    assert manager.process.running()
    manager.process.signal(signal.SIGTERM)
    assert manager.process.wait() == 0
    assert not reader.finish().complete


def test_sockets_of_every_kind_are_served(make_manager: MakeManager, upstream: Registry):
    manager = make_manager(upstream.url)
    local = manager.directory / "admin"
    admin = socket.socket(socket.AF_UNIX)
    admin.bind(str(local))
    admin.listen()
    manager.sockets["admin"] = admin
    manager.start()
    assert ask(manager.url, "/v2/").status == 200
    assert ask(manager.url, "/api/v1/status").status == 404
    status = run("curl", "-sSf", "--unix-socket", local, "http://here/api/v1/status")
    assert f'"addresses":["{manager.address}"]' in status
    assert f'"admin_addresses":["unix:{local}"]' in status
    assert manager.stop() == 0
    assert local.exists(), "it belongs to who has bound it"
    manager.start()
    run("curl", "-sSf", "--unix-socket", local, "http://here/api/v1/status")


def test_an_admin_socket_that_others_reach_needs_a_token(
    make_manager: MakeManager, upstream: Registry
):
    manager = make_manager(upstream.url)
    manager.sockets["admin"] = socket.create_server(("0.0.0.0", 0))
    with pytest.raises(AssertionError, match="admin_token_file"):
        manager.start()
    assert manager.process.wait() == 2


def test_systemd_socket_activate_starts_the_daemon_at_the_first_connection(
    upstream: Registry, image: Image, place: Path
):
    local = place / "activated.sock"
    serve = (sys.executable, "-m", "proxy", "serve", "--store", place / "store")
    process = Process(
        place,
        "activated",
        [
            *("systemd-socket-activate", "-l", local, "--fdname=registry"),
            *(*serve, "--upstream", f"docker.io={upstream.url}", "--max-size", "1GB"),
        ],
    )
    process.wait_until(lambda: "Listening on" in process.err.read_text(), "its socket")
    path = f"http://here/v2/{image.repository}/manifests/{image.tag}"
    run("curl", "-sSf", "--unix-socket", local, "-o", place / "manifest", path)
    assert image.index.partition(":")[2] in run("sha256sum", place / "manifest")
    assert process.stop() == 0


@pytest.mark.timeout(300)
def test_a_restart_under_load_fails_no_pull(
    make_manager: MakeManager, upstream: Registry, image: Image, place: Path
):
    manager = make_manager(upstream.url)
    manager.start()
    pulls = Pulls(place, manager.address, image)
    for number in range(RESTARTS):
        pulls.wait_for(PULLS * number // (RESTARTS + 1))
        assert manager.stop() == 0
        manager.start()
    pulls.wait_for(PULLS)
    assert pulls.failures == []


class Pulls:
    """Pulls by skopeo, four at a time, until there were enough of them."""

    def __init__(self, place: Path, address: str, image: Image) -> None:
        self.done = 0
        self.failures: list[str] = []
        self._place = place
        self._source = f"docker://{address}/{image.repository}:{image.tag}"
        self._lock = threading.Lock()
        self._numbers = iter(range(PULLS))
        self._threads = [threading.Thread(target=self._pull, daemon=True) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def wait_for(self, number: int) -> None:
        eventually(lambda: self.done >= number, f"{number} pulls", deadline=200)

    def _pull(self) -> None:
        while True:
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                return
            target = f"dir:{self._place}/pulled{number}"
            done = subprocess.run(
                ["skopeo", "copy", "--quiet", "--src-tls-verify=false", self._source, target],
                env=fenced(),
                capture_output=True,
                text=True,
                check=False,
            )
            with self._lock:
                self.done += 1
                if done.returncode:
                    self.failures.append(done.stderr)
