"""Big blobs through the real daemon: crowds, crashes, bad bytes and a store that is too small."""

import hashlib
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.blobserver import CHUNK, BlobServer
from tests.system.processes import eventually, run
from tests.system.servers import Daemon
from tests.system.wire import Reader, ask

pytestmark = pytest.mark.timeout(120)

MB = 1_000_000
MIB = 1 << 20
MakeDaemon = Callable[..., Daemon]


def path_of(digest: str) -> str:
    return f"/v2/library/big/blobs/{digest}"


def some_bytes(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def test_a_crowd_shares_one_transfer_and_its_first_bytes(
    blobs: BlobServer, make_daemon: MakeDaemon
):
    digest = blobs.add(some_bytes(64 * MIB), hold_at=2 * CHUNK)
    daemon = make_daemon(blobs.url)
    crowd = [Reader(daemon.url, path_of(digest)) for _ in range(24)]
    try:
        eventually(
            lambda: all(reader.first_byte.is_set() for reader in crowd),
            "all clients have bytes while upstream has sent 32 KiB of 64 MiB",
        )
        assert blobs.sent() == 2 * CHUNK
    finally:
        blobs.release(digest)
    assert {reader.finish().digest for reader in crowd} == {digest}
    assert {(reader.status, reader.error) for reader in crowd} == {(200, None)}
    # In pieces, none of them twice.
    assert sum(get.sent for get in blobs.gets(digest)) == 64 * MIB
    assert daemon.upstream_bytes() == 64 * MIB


def test_a_killed_daemon_goes_on_where_its_fill_was(blobs: BlobServer, make_daemon: MakeDaemon):
    size = 64 * MIB
    digest = blobs.add(some_bytes(size), hold_at=size // 2)
    daemon = make_daemon(blobs.url)
    cut_off = Reader(daemon.url, path_of(digest))
    eventually(lambda: cut_off.received > 0.45 * size, "nearly half of the blob at the client")
    daemon.kill()
    assert not cut_off.finish().complete
    blobs.release(digest)
    before = blobs.gets(digest)
    daemon.start()
    again = Reader(daemon.url, path_of(digest)).finish()
    assert (again.status, again.digest) == (200, digest)
    rest = [get for get in blobs.gets(digest) if get not in before]
    assert sum(get.sent for get in rest) <= 0.6 * size
    assert all(get.range for get in rest)
    assert daemon.stop() == 0
    fsck(daemon)


def test_a_daemon_killed_at_any_time_keeps_what_it_had(blobs: BlobServer, make_daemon: MakeDaemon):
    kept = blobs.add(some_bytes(3 * MIB, seed=2))
    digest = blobs.add(some_bytes(8 * MIB), hold_at=4 * MIB)
    daemon = make_daemon(blobs.url)
    assert ask(daemon.url, path_of(kept)).sha256 == kept
    for _ in range(3):
        reader = Reader(daemon.url, path_of(digest))
        reader.first_byte.wait(20)
        daemon.kill()
        reader.finish()
        daemon.start()
    blobs.release(digest)
    assert ask(daemon.url, path_of(digest)).sha256 == digest
    assert ask(daemon.url, path_of(kept)).sha256 == kept
    assert len(blobs.gets(kept)) == 1
    assert daemon.stop() == 0
    fsck(daemon)


def test_a_flipped_bit_never_makes_a_complete_blob(blobs: BlobServer, make_daemon: MakeDaemon):
    data = some_bytes(5 * MIB)
    digest = blobs.add(data)
    blobs.corrupt(digest)
    daemon = make_daemon(blobs.url)
    crowd = [Reader(daemon.url, path_of(digest)) for _ in range(4)]
    for reader in crowd:
        reader.finish()
        assert reader.status != 200 or not reader.complete
    assert daemon.metric("pullcache_digest_mismatches_total") >= 1
    assert not stored(daemon, digest)
    blobs.add(data)  # well again
    assert eventually(
        lambda: ask(daemon.url, path_of(digest)).sha256 == digest, "the next pulls are right"
    )


def test_a_small_store_stays_small_and_keeps_what_was_used_last(
    blobs: BlobServer, make_daemon: MakeDaemon
):
    sizes = [2 * MB] * 5 + [40 * MB] + [1 * MB] * 6 + [4 * MB]
    digests = [blobs.add(some_bytes(size, seed)) for seed, size in enumerate(sizes)]
    assert sum(sizes) == 60 * MB
    daemon = make_daemon(blobs.url, max_size="20MB")
    done = threading.Event()
    peaks = Peaks(daemon.store, done)
    for digest in digests:
        answer = ask(daemon.url, path_of(digest))
        assert (answer.status, answer.sha256) == (200, digest)
    done.set()
    peaks.join()
    assert peaks.samples > len(digests)
    assert peaks.apparent <= 20 * MB
    assert peaks.blocks <= 20 * MB
    asked = len(blobs.transfers)
    assert ask(daemon.url, path_of(digests[-1])).sha256 == digests[-1]
    assert len(blobs.transfers) == asked
    assert daemon.metric("pullcache_uncached_total") >= 1


class Peaks(threading.Thread):
    """Measures the whole store again and again, as `du -sb` and `du` would."""

    def __init__(self, store: Path, done: threading.Event) -> None:
        super().__init__(daemon=True)
        self._store = store
        self._done = done
        self.apparent = self.blocks = self.samples = 0
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.005):
            self._measure()

    def _measure(self) -> None:
        apparent = blocks = 0
        for path in [self._store, *self._store.rglob("*")]:
            try:
                found = path.lstat()
            except FileNotFoundError:
                continue  # it left between the two
            apparent += found.st_size
            blocks += found.st_blocks * 512
        self.apparent = max(self.apparent, apparent)
        self.blocks = max(self.blocks, blocks)
        self.samples += 1


def stored(daemon: Daemon, digest: str) -> bool:
    return (daemon.store / "blobs" / digest.replace(":", "/")).exists()


def fsck(daemon: Daemon) -> None:
    """Check every stored file against its name, by our own means and by the daemon's."""
    for file in (daemon.store / "blobs" / "sha256").iterdir():
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.name
    run(*daemon.python, "fsck", "--store", daemon.store)
