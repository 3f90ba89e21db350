"""Faults of the process (P6 to P9): little memory, few threads, little CPU time, many clients at once."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.fakes.content import OCI_MANIFEST, FakeImage, digest_of
from tests.fakes.registry import FakeRegistry
from tests.system.http_client import send_request
from tests.system.processes import UNREACHABLE, Process, run
from tests.system.servers import Daemon, run_until_exit

MIB = 1 << 20
CLIENTS = 150
MakeDaemon = Callable[..., Daemon]


# P6.


def limit_memory(daemon: Daemon, headroom: int = 128 * MIB) -> None:
    """Make allocations fail once the daemon uses `headroom` bytes more than now.

    A MemoryError would count as an internal error.
    """
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmData:")]
    limit = (int(line.split()[1]) << 10) + headroom
    run("prlimit", "--pid", str(daemon.process.pid), f"--data={limit}")


@contextmanager
def stalled_clients(daemon: Daemon, path: str) -> Iterator[None]:
    """Connect many clients that request `path` and read nothing beyond the kernel's buffers."""
    host, port = daemon.address.split(":")
    clients = [socket.socket() for _ in range(CLIENTS)]
    for client in clients:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1024)
        client.connect((host, int(port)))
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    for client in clients:
        client.settimeout(40)
        client.recv(1, socket.MSG_PEEK)  # waits for more bytes than the headers have (SO_RCVLOWAT)
    yield
    for client in clients:
        client.close()


def check_stalled_clients(daemon: Daemon, path: str) -> None:
    """Check that stalled clients leave enough memory for another client to read all of `path`."""
    digest = path.rpartition("/")[2]
    assert send_request(daemon.url, path).sha256 == digest
    limit_memory(daemon)
    with stalled_clients(daemon, path):
        assert send_request(daemon.url, path).sha256 == digest
        assert send_request(daemon.url, "/readyz").status == 200
    assert daemon.metric("pullcache_internal_errors_total") == 0


@pytest.mark.parametrize("max_size", ["1GB", "10MB"], ids=["stored", "passed through"])
async def test_p06_many_stalled_clients_of_a_blob_need_little_memory(
    make_daemon: MakeDaemon, max_size: str
):
    async with FakeRegistry(auth=False, cdn=False) as registry:
        digest = registry.add_blob(bytes(12 * MIB))
        daemon = await asyncio.to_thread(make_daemon, registry.url, max_size=max_size)
        await asyncio.to_thread(check_stalled_clients, daemon, f"/v2/library/app/blobs/{digest}")
        fetches = registry.count("GET /v2/.*/blobs/")
        assert (fetches > CLIENTS) == (max_size == "10MB")


async def test_p06_many_stalled_clients_of_a_large_manifest_share_its_bytes(
    make_daemon: MakeDaemon,
):
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "annotations": {"a": "b" * 3 * MIB}}
    config = {"mediaType": "application/vnd.oci.image.config.v1+json", "size": 2}
    document |= {"config": {**config, "digest": f"sha256:{'0' * 64}"}, "layers": []}
    async with FakeRegistry(auth=False) as registry:
        content = json.dumps(document).encode()
        digest = registry.add_manifest("library/app", "large", content, OCI_MANIFEST)
        daemon = await asyncio.to_thread(make_daemon, registry.url)
        path = f"/v2/library/app/manifests/{digest}"
        await asyncio.to_thread(check_stalled_clients, daemon, path)


# P7.

# A user with no other threads: RLIMIT_NPROC counts all threads of a user and does not apply to
# root. The capability lets it read root's files.
USER_ID = 64999
AS_USER = [
    *("setpriv", f"--reuid={USER_ID}", f"--regid={USER_ID}", "--clear-groups"),
    *("--inh-caps=+dac_override", "--ambient-caps=+dac_override"),
]


def serve_command(store: Path, upstream: str, *wrapper: str) -> list[str]:
    options = ("--listen", "127.0.0.1:0", "--store", str(store), "--upstream")
    command = (sys.executable, "-m", "proxy", "serve", *options, f"docker.io={upstream}")
    return [*AS_USER, *wrapper, *command]


def test_p07_a_start_with_too_few_threads_fails_with_advice(directory: Path):
    directory.chmod(0o777)
    code, errors = run_until_exit(
        serve_command(directory / "store", UNREACHABLE, "prlimit", "--nproc=12"), directory
    )
    assert code == 2
    assert "threads" in errors
    assert "TasksMax=" in errors
    assert "Traceback" not in errors


async def test_p07_a_daemon_works_without_starting_threads_after_its_start(directory: Path):
    async with FakeRegistry() as registry, AsyncExitStack() as stack:
        images = [registry.add_image(f"library/app{n}", layers=[bytes([n])]) for n in range(20)]
        # A name, so that the daemon has to resolve it, which takes a thread.
        upstream = registry.url.replace("127.0.0.1", "localhost")
        process, url = await asyncio.to_thread(start_without_more_threads, directory, upstream)
        stack.callback(process.kill)
        async with aiohttp.ClientSession(url) as session, asyncio.TaskGroup() as group:
            for image in images:
                group.create_task(pull(session, image))
        process.signal(signal.SIGHUP)
        await asyncio.to_thread(
            process.wait_until,
            lambda: '"config_reloaded"' in process.stderr_log.read_text(),
            "a reload",
        )
        assert await asyncio.to_thread(process.stop) == 0
    assert '"level":"error"' not in process.stderr_log.read_text()


def start_without_more_threads(directory: Path, upstream: str) -> tuple[Process, str]:
    """Start a daemon and limit it to the threads that it has then; return it and its URL."""
    directory.chmod(0o777)
    process = Process(directory, "daemon", serve_command(directory / "store", upstream))

    def find_url() -> str:
        match = re.search(r"http://127\.0\.0\.1:[1-9]\d*", process.stdout_log.read_text())
        return match[0] if match else ""

    url = process.wait_until(find_url, "its address")
    status = Path(f"/proc/{process.pid}/status").read_text()
    (threads,) = re.findall(r"Threads:\t(\d+)", status)
    run(*AS_USER, "prlimit", "--pid", str(process.pid), f"--nproc={threads}")
    return process, url


async def pull(session: aiohttp.ClientSession, image: FakeImage) -> None:
    """Pull an image by digest and check its content."""
    kinds = {image.digest: "manifests", **dict.fromkeys(image.blobs, "blobs")}
    for digest, kind in kinds.items():
        async with session.get(f"/v2/{image.repository}/{kind}/{digest}") as response:
            assert (response.status, digest_of(await response.read())) == (200, digest)


# P8.


@contextmanager
def limited_to_a_tenth_of_a_cpu(pid: int) -> Iterator[None]:
    """Let a process run a tenth of the time, as a CPU quota does (`CPUQuota=10%`, `--cpus 0.1`)."""
    stop = threading.Event()

    def alternate() -> None:
        while not stop.wait(0.09):
            os.kill(pid, signal.SIGCONT)
            stop.wait(0.01)
            os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=alternate)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


async def test_p08_a_daemon_with_a_tenth_of_a_cpu_is_slow_but_fails_no_request(
    make_daemon: MakeDaemon,
):
    async with FakeRegistry() as registry:
        image = registry.add_image(layers=[bytes([n]) * MIB for n in range(4)])
        daemon = await asyncio.to_thread(make_daemon, registry.url)
        async with aiohttp.ClientSession(daemon.url) as session, asyncio.TaskGroup() as group:
            with limited_to_a_tenth_of_a_cpu(daemon.process.pid):
                task = group.create_task(pull(session, image))
                while not task.done():
                    assert (
                        await asyncio.to_thread(send_request, daemon.url, "/healthz")
                    ).status == 200
        # No slow transfer was mistaken for a failed one.
        assert await asyncio.to_thread(daemon.metric, "pullcache_upstream_retries_total") == 0
        up = await asyncio.to_thread(daemon.metric, "pullcache_upstream_up", upstream="docker.io")
        assert up == 1
        assert registry.bytes_sent(registry.body_of(image.layers[0])) == MIB


# P9.

NODES = 500


async def test_p09_many_nodes_that_pull_at_once_cost_one_fetch(make_daemon: MakeDaemon):
    async with FakeRegistry() as registry:
        image = registry.add_image(layers=[bytes([n]) * (MIB // 4) for n in range(3)])
        daemon = await asyncio.to_thread(make_daemon, registry.url)
        connector = aiohttp.TCPConnector(limit=NODES)
        session = aiohttp.ClientSession(daemon.url, connector=connector)
        async with session, asyncio.TaskGroup() as group:
            for _ in range(NODES):
                group.create_task(pull_by_tag(session, image))
        for digest in image.blobs:
            assert registry.count(registry.body_of(digest)) == 1
        assert registry.count("GET /v2/.*/manifests/") <= 2  # the challenge, and with the token
        served = await asyncio.to_thread(daemon.metric, "pullcache_requests_total", status="200")
        assert served >= NODES * (1 + len(image.blobs))


async def pull_by_tag(session: aiohttp.ClientSession, image: FakeImage) -> None:
    async with session.get(f"/v2/{image.repository}/manifests/{image.tag}") as response:
        assert response.headers["Docker-Content-Digest"] == image.digest
    await pull(session, image)
