"""Faults of the process (P6 to P9): little memory, few threads, little processor, everybody at once."""

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

from tests.fakes.content import OCI_MANIFEST, Image, digest_of
from tests.fakes.registry import FakeRegistry
from tests.system.processes import NOWHERE, Process, run
from tests.system.servers import Daemon, run_to_end
from tests.system.wire import ask

MIB = 1 << 20
CLIENTS = 150
MakeDaemon = Callable[..., Daemon]


# P6.


def leave_little_memory(daemon: Daemon, more: int = 128 * MIB) -> None:
    """Let allocations fail beyond so many bytes more: there would be a MemoryError, which is a bug met."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmData:")]
    limit = (int(line.split()[1]) << 10) + more
    run("prlimit", "--pid", str(daemon.process.pid), f"--data={limit}")


@contextmanager
def silent_readers(daemon: Daemon, path: str) -> Iterator[None]:
    """Have many clients ask for the same, who take no more of it than the kernel does."""
    host, port = daemon.address.split(":")
    clients = [socket.socket() for _ in range(CLIENTS)]
    for client in clients:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1024)
        client.connect((host, int(port)))
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    for client in clients:
        client.settimeout(40)
        client.recv(1, socket.MSG_PEEK)  # only when more than the headers is there
    yield
    for client in clients:
        client.close()


def read_slowly(daemon: Daemon, path: str) -> None:
    """Let many read one answer slowly, and see that there is memory for one more who reads all of it."""
    digest = path.rpartition("/")[2]
    assert ask(daemon.url, path).sha256 == digest
    leave_little_memory(daemon)
    with silent_readers(daemon, path):
        assert ask(daemon.url, path).sha256 == digest
        assert ask(daemon.url, "/readyz").status == 200
    assert daemon.metric("pullcache_internal_errors_total") == 0


@pytest.mark.parametrize("max_size", ["1GB", "10MB"], ids=["stored", "passed through"])
async def test_p06_many_who_read_a_blob_slowly_take_little_memory(
    make_daemon: MakeDaemon, max_size: str
):
    async with FakeRegistry(auth=False, cdn=False) as registry:
        digest = registry.add_blob(bytes(12 * MIB))
        daemon = await asyncio.to_thread(make_daemon, registry.url, max_size=max_size)
        await asyncio.to_thread(read_slowly, daemon, f"/v2/library/app/blobs/{digest}")
        fetches = registry.count("GET /v2/.*/blobs/")
        assert (fetches > CLIENTS) == (max_size == "10MB")


async def test_p06_many_who_read_a_large_manifest_slowly_share_its_bytes(make_daemon: MakeDaemon):
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "annotations": {"a": "b" * 3 * MIB}}
    config = {"mediaType": "application/vnd.oci.image.config.v1+json", "size": 2}
    document |= {"config": {**config, "digest": f"sha256:{'0' * 64}"}, "layers": []}
    async with FakeRegistry(auth=False) as registry:
        content = json.dumps(document).encode()
        digest = registry.add_manifest("library/app", "large", content, OCI_MANIFEST)
        daemon = await asyncio.to_thread(make_daemon, registry.url)
        await asyncio.to_thread(read_slowly, daemon, f"/v2/library/app/manifests/{digest}")


# P7.

# A user whose threads nobody else counts, for whom root's limits do not go by; who may read what root may.
NOBODY = 64999
AS_NOBODY = [
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--inh-caps=+dac_override", "--ambient-caps=+dac_override"),
]


def serve(store: Path, upstream: str, *before: str) -> list[str]:
    options = ("--listen", "127.0.0.1:0", "--store", str(store), "--upstream")
    command = (sys.executable, "-m", "proxy", "serve", *options, f"docker.io={upstream}")
    return [*AS_NOBODY, *before, *command]


def test_p07_too_few_threads_are_said_at_the_start(place: Path):
    place.chmod(0o777)
    code, said = run_to_end(serve(place / "store", NOWHERE, "prlimit", "--nproc=12"), place)
    assert code == 2
    assert "threads" in said
    assert "TasksMax=" in said
    assert "Traceback" not in said


async def test_p07_a_daemon_that_may_start_no_thread_more_does_all_its_work(place: Path):
    async with FakeRegistry() as registry, AsyncExitStack() as stack:
        images = [registry.add_image(f"library/app{n}", layers=[bytes([n])]) for n in range(20)]
        by_name = registry.url.replace("127.0.0.1", "localhost")
        process, url = await asyncio.to_thread(start_without_threads, place, by_name)
        stack.callback(process.kill)
        async with aiohttp.ClientSession(url) as session, asyncio.TaskGroup() as group:
            for image in images:
                group.create_task(pull(session, image))
        process.signal(signal.SIGHUP)
        await asyncio.to_thread(
            process.wait_until, lambda: '"config_reloaded"' in process.err.read_text(), "a reload"
        )
        assert await asyncio.to_thread(process.stop) == 0
    assert '"level":"error"' not in process.err.read_text()


def start_without_threads(place: Path, upstream: str) -> tuple[Process, str]:
    """Start a daemon, and let it have no thread more than it then has."""
    place.chmod(0o777)
    process = Process(place, "daemon", serve(place / "store", upstream))

    def announced() -> str:
        found = re.search(r"http://127\.0\.0\.1:[1-9]\d*", process.out.read_text())
        return found[0] if found else ""

    url = process.wait_until(announced, "its announcement")
    status = Path(f"/proc/{process.pid}/status").read_text()
    (threads,) = re.findall(r"Threads:\t(\d+)", status)
    run(*AS_NOBODY, "prlimit", "--pid", str(process.pid), f"--nproc={threads}")
    return process, url


async def pull(session: aiohttp.ClientSession, image: Image) -> None:
    """Pull an image, and check what comes."""
    kinds = {image.digest: "manifests", **dict.fromkeys(image.blobs, "blobs")}
    for digest, kind in kinds.items():
        async with session.get(f"/v2/{image.repository}/{kind}/{digest}") as answer:
            assert (answer.status, digest_of(await answer.read())) == (200, digest)


# P8.


@contextmanager
def a_tenth_of_a_processor(pid: int) -> Iterator[None]:
    """Let a process run a tenth of the time, as a quota of CPU does (`CPUQuota=10%`, `--cpus 0.1`)."""
    over = threading.Event()

    def alternate() -> None:
        while not over.wait(0.09):
            os.kill(pid, signal.SIGCONT)
            over.wait(0.01)
            os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=alternate)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


async def test_p08_a_tenth_of_a_processor_is_slow_and_fails_nothing(make_daemon: MakeDaemon):
    async with FakeRegistry() as registry:
        image = registry.add_image(layers=[bytes([n]) * MIB for n in range(4)])
        daemon = await asyncio.to_thread(make_daemon, registry.url)
        async with aiohttp.ClientSession(daemon.url) as session, asyncio.TaskGroup() as group:
            with a_tenth_of_a_processor(daemon.process.pid):
                pulled = group.create_task(pull(session, image))
                while not pulled.done():
                    assert (await asyncio.to_thread(ask, daemon.url, "/healthz")).status == 200
        # Nothing took so long that it was taken for a failure.
        assert await asyncio.to_thread(daemon.metric, "pullcache_upstream_retries_total") == 0
        up = await asyncio.to_thread(daemon.metric, "pullcache_upstream_up", upstream="docker.io")
        assert up == 1
        assert registry.bytes_sent(registry.body_of(image.layers[0])) == MIB


# P9.

NODES = 500


async def test_p09_a_fleet_that_comes_back_at_once_fetches_once(make_daemon: MakeDaemon):
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
        assert registry.count("GET /v2/.*/manifests/") <= 2  # challenged, and asked again
        served = await asyncio.to_thread(daemon.metric, "pullcache_requests_total", status="200")
        assert served >= NODES * (1 + len(image.blobs))


async def pull_by_tag(session: aiohttp.ClientSession, image: Image) -> None:
    async with session.get(f"/v2/{image.repository}/manifests/{image.tag}") as answer:
        assert answer.headers["Docker-Content-Digest"] == image.digest
    await pull(session, image)
