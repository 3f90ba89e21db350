"""Power cuts (D12, D13): a file system that ends at once, with all that was not synced to it."""

import fcntl
import hashlib
import json
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.blobserver import BlobServer
from tests.system.images import INDEX, MANIFEST, Image
from tests.system.processes import eventually, run
from tests.system.servers import Daemon, Registry
from tests.system.wire import ask

WANTED = {"Accept": f"{INDEX}, {MANIFEST}"}

# The disk has less room than a daemon usually leaves free.
SMALL = {"PULLCACHE_STORE_MIN_FREE": "0"}

# Linux's EXT4_IOC_SHUTDOWN and its EXT4_GOING_FLAGS_NOLOGFLUSH: nothing is written any more, the journal neither.
_SHUTDOWN, _AT_ONCE = 0x8004587D, 2


class Disk:
    """A file system of its own at `path`, in a file."""

    def __init__(self, file: Path, path: Path) -> None:
        self._file = file
        self._path = path
        with file.open("wb") as image:
            image.truncate(256 << 20)
        run("mkfs.ext4", "-q", "-b", "4096", file)
        path.mkdir(parents=True)
        self._mount()

    def _mount(self) -> None:
        run("mount", "-o", "loop", self._file, self._path)

    def cut_power(self, daemon: Daemon) -> None:
        """End the file system, and the daemon with it, and mount what is left."""
        # It does not live to see the disk fail.
        daemon.process.signal(signal.SIGSTOP)
        state = Path(f"/proc/{daemon.process.pid}/status")
        eventually(lambda: "\nState:\tT" in state.read_text(), "that it stands still")
        folder = os.open(self._path, os.O_RDONLY)
        fcntl.ioctl(folder, _SHUTDOWN, struct.pack("I", _AT_ONCE))
        os.close(folder)
        daemon.kill()
        run("umount", self._path)
        self._mount()


@pytest.fixture
def disk(place: Path) -> Disk:
    return Disk(place / "disk", place / "daemon" / "store")


@pytest.fixture
def daemon(place: Path, disk: Disk, upstream: Registry) -> Iterator[Daemon]:
    """A daemon in front of `upstream` whose store is the disk."""
    daemon = Daemon(place / "daemon", upstream.url, env=SMALL)
    daemon.start()
    yield daemon
    daemon.finish()


def settle(daemon: Daemon) -> None:
    """Wait until no download runs: what was sent is then in the store."""
    eventually(lambda: not daemon.metric("pullcache_downloads_in_progress"), "all commits")


def check(daemon: Daemon) -> float:
    """Look whether each file in the store is what its name says, and all of them are counted.

    Return how many bytes are counted that no file has: of what was evicted the index may still know.
    """
    taken = 0
    for path in daemon.store.glob("blobs/sha256/*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        taken += path.stat().st_blocks * 512
    counted = daemon.metric("pullcache_store_bytes")
    assert taken <= counted <= daemon.metric("pullcache_store_limit_bytes")
    return counted - taken


def test_d12_a_power_cut_loses_no_blob_no_tag_and_no_pin(
    disk: Disk, daemon: Daemon, upstream: Registry, image: Image
):
    assert ask(daemon.url, f"/v2/{image.repository}/blobs/{image.config}").status == 200
    settle(daemon)
    # An index that has nothing is made anew from the files, and would hide what it has lost.
    daemon.stop()
    daemon.start()
    pulled = f"/v2/{image.repository}/manifests/{image.tag}"
    parts = [f"/v2/{image.repository}/manifests/{image.manifest}"]
    parts += [f"/v2/{image.repository}/blobs/{one}" for one in (image.config, *image.layers)]
    for path in (pulled, *parts):
        assert ask(daemon.url, path, headers=WANTED).status == 200
    settle(daemon)
    daemon.run("pin", image.reference)
    disk.cut_power(daemon)
    upstream.stop()
    daemon.start()
    assert check(daemon) == 0
    assert ask(daemon.url, pulled, headers=WANTED).sha256 == image.index
    for path in parts:
        answer = ask(daemon.url, path, headers=WANTED)
        assert (answer.status, answer.sha256) == (200, f"sha256:{path.rpartition(':')[2]}")
    (kept,) = json.loads(daemon.run("images", "--json"))
    assert kept["pinned"]


@pytest.mark.parametrize("room", ["1GB", "2MB"])
def test_d13_after_power_cuts_while_blobs_come_and_go_each_file_is_whole_and_counted(
    disk: Disk, place: Path, blobs: BlobServer, room: str
):
    daemon = Daemon(place / "daemon", blobs.url, env=SMALL, max_size=room)
    daemon.start()
    pull(daemon, blobs.add(os.urandom(200_000)))
    # An index that has nothing is made anew from the files, and would hide what it has lost.
    daemon.stop()
    for stop in range(1, 6):
        daemon.start()
        assert check(daemon) == 0 or room == "2MB"
        for _ in range(stop):
            pull(daemon, blobs.add(os.urandom(200_000)))
        # Of the last nobody knows how far its commit has come.
        disk.cut_power(daemon)
    daemon.start()
    for digest in blobs.blobs:
        pull(daemon, digest)
    settle(daemon)
    assert check(daemon) == 0
    assert (daemon.metric("pullcache_store_blobs") < len(blobs.blobs)) == (room == "2MB")
    daemon.finish()


def pull(daemon: Daemon, digest: str) -> None:
    assert ask(daemon.url, f"/v2/library/app/blobs/{digest}").sha256 == digest
