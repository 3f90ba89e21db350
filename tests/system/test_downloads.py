"""Large blobs through the real daemon: many clients, crashes, corrupt bytes and a small store."""

import hashlib
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.blob_server import CHUNK_SIZE, BlobServer
from tests.system.http_client import DownloadThread, send_request
from tests.system.processes import eventually, run
from tests.system.servers import Daemon, resumable_bytes

pytestmark = pytest.mark.timeout(120)

MB = 1_000_000
MIB = 1 << 20
MakeDaemon = Callable[..., Daemon]


def blob_path(digest: str) -> str:
    return f"/v2/library/big/blobs/{digest}"


def random_bytes(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def test_many_clients_share_one_transfer_from_its_first_bytes_on(
    blobs: BlobServer, make_daemon: MakeDaemon
):
    digest = blobs.add(random_bytes(64 * MIB), hold_at=2 * CHUNK_SIZE)
    daemon = make_daemon(blobs.url)
    clients = [DownloadThread(daemon.url, blob_path(digest)) for _ in range(24)]
    try:
        eventually(
            lambda: all(client.first_byte.is_set() for client in clients),
            "all clients have bytes while upstream has sent 32 KiB of 64 MiB",
        )
        assert blobs.bytes_sent() == 2 * CHUNK_SIZE
    finally:
        blobs.release(digest)
    assert {client.finish().digest for client in clients} == {digest}
    assert {(client.status, client.error) for client in clients} == {(200, None)}
    # The transfer may have been split into pieces, but no byte was sent twice.
    assert sum(response.sent for response in blobs.responses_to_get(digest)) == 64 * MIB
    assert daemon.upstream_bytes() == 64 * MIB


def test_a_killed_daemon_resumes_its_download(blobs: BlobServer, make_daemon: MakeDaemon):
    size = 64 * MIB
    digest = blobs.add(random_bytes(size), hold_at=size // 2)
    daemon = make_daemon(blobs.url)
    interrupted = DownloadThread(daemon.url, blob_path(digest))
    eventually(lambda: interrupted.received > 0.45 * size, "nearly half of the blob at the client")
    # The client gets bytes from memory before they are written; a kill loses those in memory.
    eventually(lambda: resumable_bytes(daemon.store) > 0.45 * size, "nearly half on the disk")
    daemon.kill()
    assert not interrupted.finish().is_complete
    blobs.release(digest)
    before = blobs.responses_to_get(digest)
    daemon.start()
    again = DownloadThread(daemon.url, blob_path(digest)).finish()
    assert (again.status, again.digest) == (200, digest)
    resumed = [response for response in blobs.responses_to_get(digest) if response not in before]
    assert sum(response.sent for response in resumed) <= 0.6 * size
    assert all(response.range for response in resumed)
    assert daemon.stop() == 0
    check_files(daemon)


def test_a_daemon_killed_during_a_download_keeps_its_stored_blobs(
    blobs: BlobServer, make_daemon: MakeDaemon
):
    stored = blobs.add(random_bytes(3 * MIB, seed=2))
    digest = blobs.add(random_bytes(8 * MIB), hold_at=4 * MIB)
    daemon = make_daemon(blobs.url)
    assert send_request(daemon.url, blob_path(stored)).sha256 == stored
    # The client has the blob before it is committed.
    eventually(lambda: daemon.metric("pullcache_store_blobs") == 1, "the commit of the first blob")
    for _ in range(3):
        client = DownloadThread(daemon.url, blob_path(digest))
        client.first_byte.wait(20)
        daemon.kill()
        client.finish()
        daemon.start()
    blobs.release(digest)
    assert send_request(daemon.url, blob_path(digest)).sha256 == digest
    assert send_request(daemon.url, blob_path(stored)).sha256 == stored
    assert len(blobs.responses_to_get(stored)) == 1
    assert daemon.stop() == 0
    check_files(daemon)


def test_a_flipped_bit_never_makes_a_complete_blob(blobs: BlobServer, make_daemon: MakeDaemon):
    data = random_bytes(5 * MIB)
    digest = blobs.add(data)
    blobs.corrupt(digest)
    daemon = make_daemon(blobs.url)
    clients = [DownloadThread(daemon.url, blob_path(digest)) for _ in range(4)]
    for client in clients:
        client.finish()
        assert client.status != 200 or not client.is_complete
    assert daemon.metric("pullcache_digest_mismatches_total") >= 1
    assert not is_stored(daemon, digest)
    blobs.add(data)  # without the flipped bit
    assert eventually(
        lambda: send_request(daemon.url, blob_path(digest)).sha256 == digest,
        "the next pulls are correct",
    )


def test_a_small_store_never_exceeds_its_limit_and_keeps_the_latest_blob(
    blobs: BlobServer, make_daemon: MakeDaemon
):
    sizes = [2 * MB] * 5 + [40 * MB] + [1 * MB] * 6 + [4 * MB]
    digests = [blobs.add(random_bytes(size, seed)) for seed, size in enumerate(sizes)]
    assert sum(sizes) == 60 * MB
    daemon = make_daemon(blobs.url, max_size="20MB")
    done = threading.Event()
    monitor = DiskUsageMonitor(daemon.store, done)
    for digest in digests:
        response = send_request(daemon.url, blob_path(digest))
        assert (response.status, response.sha256) == (200, digest)
    done.set()
    monitor.join()
    assert monitor.samples > len(digests)
    assert monitor.peak_apparent_size <= 20 * MB
    assert monitor.peak_allocated_size <= 20 * MB
    requests = len(blobs.responses)
    assert send_request(daemon.url, blob_path(digests[-1])).sha256 == digests[-1]
    assert len(blobs.responses) == requests
    assert daemon.metric("pullcache_uncached_total") >= 1


class DiskUsageMonitor(threading.Thread):
    """Samples the size of the whole store, as `du -sb` and `du` measure it, and keeps the peaks."""

    def __init__(self, store: Path, done: threading.Event) -> None:
        super().__init__(daemon=True)
        self._store = store
        self._done = done
        self.peak_apparent_size = self.peak_allocated_size = self.samples = 0
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.005):
            self._measure()

    def _measure(self) -> None:
        apparent = allocated = 0
        for path in [self._store, *self._store.rglob("*")]:
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue  # it was removed after it was listed
            apparent += status.st_size
            allocated += status.st_blocks * 512
        self.peak_apparent_size = max(self.peak_apparent_size, apparent)
        self.peak_allocated_size = max(self.peak_allocated_size, allocated)
        self.samples += 1


def is_stored(daemon: Daemon, digest: str) -> bool:
    return (daemon.store / "blobs" / digest.replace(":", "/")).exists()


def check_files(daemon: Daemon) -> None:
    """Check that every stored file matches its digest, here and with `pullcache fsck`."""
    for file in (daemon.store / "blobs" / "sha256").iterdir():
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.name
    run(*daemon.program, "fsck", "--store", daemon.store)
