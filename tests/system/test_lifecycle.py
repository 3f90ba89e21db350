"""Starting, ending and refusing to start, seen from outside."""

import json
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.system.blobserver import CHUNK, BlobServer
from tests.system.images import Image
from tests.system.processes import eventually
from tests.system.servers import Daemon, Registry, run_to_end, wait_until_refused
from tests.system.wire import Reader, ask

MIB = 1 << 20
PATH = "/v2/library/big/blobs/"
MakeDaemon = Callable[..., Daemon]


def test_the_start_says_what_a_newcomer_needs(daemon: Daemon, upstream: Registry):
    said = daemon.announcement
    for fact in (daemon.url, str(daemon.store), "1 GB", "docker.io", upstream.url):
        assert fact in said
    assert re.search(r"\d+\.\d+", said.splitlines()[0]), "its version"
    found = re.search(r'"registry-mirrors": *\[[^\]]*\]', said)
    assert found, "the line for daemon.json"
    assert json.loads("{" + found[0] + "}") == {"registry-mirrors": [daemon.url]}


def test_a_response_under_way_is_finished_at_sigterm(blobs: BlobServer, make_daemon: MakeDaemon):
    digest = blobs.add(bytes(8 * MIB), hold_at=4 * MIB)
    daemon = make_daemon(blobs.url)
    reader = Reader(daemon.url, PATH + digest)
    eventually(lambda: reader.received > MIB, "the middle of a pull")
    process = daemon.process
    daemon.ask_to_stop()
    wait_until_refused(daemon.url)
    assert process.running()
    blobs.release(digest)
    assert (reader.finish().digest, reader.error) == (digest, None)
    assert daemon.stop() == 0


def test_sigterm_ends_the_daemon_although_a_pull_hangs(blobs: BlobServer, make_daemon: MakeDaemon):
    digest = blobs.add(bytes(8 * MIB), hold_at=2 * CHUNK)
    daemon = make_daemon(blobs.url)
    reader = Reader(daemon.url, PATH + digest)
    eventually(reader.first_byte.is_set, "the middle of a pull")
    assert daemon.stop(deadline=20) == 0
    assert not reader.finish().complete


def test_a_second_daemon_leaves_the_store_to_the_first(daemon: Daemon, place: Path, image: Image):
    code, said = run_to_end(daemon.command(listen="127.0.0.1:0"), place)
    assert code == 1, said
    assert str(daemon.store) in said
    assert str(daemon.process.pid) in said
    assert "Traceback" not in said
    path = f"/v2/{image.repository}/manifests/{image.tag}"
    assert ask(daemon.url, path).sha256 == image.index


def test_p13_a_port_in_use_is_named(daemon: Daemon, place: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "{}:{}".format(*taken.getsockname())
        code, said = run_to_end(daemon.command(listen=address, store=place / "other"), place)
    assert code == 2, said
    assert address in said
    assert "Traceback" not in said


def test_an_address_passes_to_the_next_daemon_at_once(daemon: Daemon, image: Image):
    path = f"/v2/{image.repository}/blobs/{image.layers[-1]}"
    for _ in range(3):
        assert ask(daemon.url, path).sha256 == image.layers[-1]
        before = daemon.address
        assert daemon.stop() == 0
        daemon.start()
        assert daemon.address == before


def test_promtool_finds_nothing_wrong_with_the_metrics(daemon: Daemon, image: Image):
    ask(daemon.url, f"/v2/{image.repository}/manifests/{image.tag}")
    ask(daemon.url, f"/v2/{image.repository}/blobs/{image.layers[0]}")
    ask(daemon.url, "/v2/library/none/manifests/latest")
    answer = ask(daemon.url, "/metrics")
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=answer.body,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert (checked.returncode, checked.stdout) == (0, b"")
