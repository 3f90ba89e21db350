"""Starts, stops and failed starts of the daemon, seen from outside."""

import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.system.blob_server import CHUNK_SIZE, BlobServer
from tests.system.http_client import DownloadThread, send_request
from tests.system.images import BuiltImage
from tests.system.processes import eventually
from tests.system.servers import Daemon, Registry, run_until_exit, wait_until_refused

MIB = 1 << 20
PATH = "/v2/library/big/blobs/"
MakeDaemon = Callable[..., Daemon]


def test_the_startup_output_shows_the_settings_and_the_command_for_clients(
    daemon: Daemon, upstream: Registry
):
    output = daemon.startup_output
    for fact in (daemon.url, str(daemon.store), "1 GB", "docker.io", upstream.url):
        assert fact in output
    assert re.search(r"\d+\.\d+", output.splitlines()[0]), "its version"
    assert "pullcache client-config docker" in output


def test_a_running_response_is_finished_after_sigterm(blobs: BlobServer, make_daemon: MakeDaemon):
    digest = blobs.add(bytes(8 * MIB), hold_at=4 * MIB)
    daemon = make_daemon(blobs.url)
    download = DownloadThread(daemon.url, PATH + digest)
    eventually(lambda: download.received > MIB, "the middle of a pull")
    process = daemon.process
    daemon.send_sigterm()
    wait_until_refused(daemon.url)
    assert process.is_running()
    blobs.release(digest)
    assert (download.finish().digest, download.error) == (digest, None)
    assert process.wait(30) == 0


def test_sigterm_stops_the_daemon_although_a_pull_hangs(blobs: BlobServer, make_daemon: MakeDaemon):
    digest = blobs.add(bytes(8 * MIB), hold_at=2 * CHUNK_SIZE)
    daemon = make_daemon(blobs.url, env={"PULLCACHE_SERVER_SHUTDOWN_TIMEOUT": "1s"})
    download = DownloadThread(daemon.url, PATH + digest)
    eventually(download.first_byte.is_set, "the middle of a pull")
    assert daemon.stop(timeout=20) == 0
    assert not download.finish().is_complete


def test_a_second_daemon_on_the_same_store_exits(
    daemon: Daemon, directory: Path, image: BuiltImage
):
    code, errors = run_until_exit(daemon.serve_command(listen="127.0.0.1:0"), directory)
    assert code == 1, errors
    assert str(daemon.store) in errors
    assert str(daemon.process.pid) in errors
    assert "Traceback" not in errors
    path = f"/v2/{image.repository}/manifests/{image.tag}"
    assert send_request(daemon.url, path).sha256 == image.index


def test_p13_a_start_on_a_port_in_use_fails_with_the_address(daemon: Daemon, directory: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "{}:{}".format(*taken.getsockname())
        code, errors = run_until_exit(
            daemon.serve_command(listen=address, store=directory / "other"), directory
        )
    assert code == 1, errors
    assert address in errors
    assert "Traceback" not in errors


def test_a_new_daemon_can_bind_the_address_of_the_last_at_once(daemon: Daemon, image: BuiltImage):
    path = f"/v2/{image.repository}/blobs/{image.layers[-1]}"
    for _ in range(3):
        assert send_request(daemon.url, path).sha256 == image.layers[-1]
        before = daemon.address
        assert daemon.stop() == 0
        daemon.start()
        assert daemon.address == before


def test_promtool_accepts_the_metrics(daemon: Daemon, image: BuiltImage):
    send_request(daemon.url, f"/v2/{image.repository}/manifests/{image.tag}")
    send_request(daemon.url, f"/v2/{image.repository}/blobs/{image.layers[0]}")
    send_request(daemon.url, "/v2/library/none/manifests/latest")
    response = send_request(daemon.url, "/metrics")
    promtool = subprocess.run(
        ["promtool", "check", "metrics"],
        input=response.body,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert (promtool.returncode, promtool.stdout) == (0, b"")
