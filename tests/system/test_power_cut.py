"""Power cuts (D12, D13): a file system that is shut down and loses everything not synced to it."""

import fcntl
import hashlib
import json
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.blob_server import BlobServer
from tests.system.http_client import send_request
from tests.system.images import INDEX, MANIFEST, BuiltImage
from tests.system.processes import eventually, run
from tests.system.servers import Daemon, Registry

pytestmark = pytest.mark.timeout(180)

ACCEPT = {"Accept": f"{INDEX}, {MANIFEST}"}

# The disk is smaller than the default of store.min_free.
NO_MIN_FREE = {"PULLCACHE_STORE_MIN_FREE": "0"}

# Linux's EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH: writes stop at once, also those of the
# journal.
_SHUTDOWN, _WITHOUT_LOG_FLUSH = 0x8004587D, 2


class Disk:
    """An ext4 file system in the file `file`, mounted at `path`."""

    def __init__(self, file: Path, path: Path) -> None:
        self._file = file
        self._path = path
        with file.open("wb") as image:
            image.truncate(256 << 20)
        run("mkfs.ext4", "-q", "-b", "4096", file)
        path.mkdir(parents=True)
        run("mount", "-o", "loop", file, path)

    def cut_power(self, daemon: Daemon) -> None:
        """Shut down the file system, kill the daemon, and mount a copy of what is on the disk.

        Unmounting does not release the disk while a process of another test has a copy of our mounts in its own
        mount namespace. To mount the same disk would then show the file system that has been shut down.
        """
        # Stopped first, so that the daemon does not see the disk fail.
        daemon.process.signal(signal.SIGSTOP)
        state = Path(f"/proc/{daemon.process.pid}/status")
        eventually(lambda: "\nState:\tT" in state.read_text(), "the daemon is stopped")
        fd = os.open(self._path, os.O_RDONLY)
        fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG_FLUSH))
        os.close(fd)
        copy = self._file.with_name(f"{self._file.name}+")
        run("cp", "--sparse=always", self._file, copy)
        daemon.kill()
        run("umount", self._path)
        self._file.unlink()
        self._file = copy
        run("mount", "-o", "loop", copy, self._path)


@pytest.fixture
def disk(directory: Path) -> Disk:
    return Disk(directory / "disk", directory / "daemon" / "store")


@pytest.fixture
def daemon(directory: Path, disk: Disk, upstream: Registry) -> Iterator[Daemon]:
    """A daemon with `upstream` as docker.io and its store on the disk."""
    daemon = Daemon(directory / "daemon", upstream.url, env=NO_MIN_FREE)
    daemon.start()
    yield daemon
    daemon.finish()


def wait_for_commits(daemon: Daemon) -> None:
    """Wait until no download runs; all blobs are then in the store."""
    eventually(lambda: not daemon.metric("pullcache_downloads_in_progress"), "all commits")


def check_store(daemon: Daemon) -> float:
    """Check that each file matches its digest, and that the daemon counts the bytes of all files.

    Return how many more bytes the daemon counts: the index may still list evicted blobs after a
    power cut.
    """
    used = 0
    for path in daemon.store.glob("blobs/sha256/*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        used += path.stat().st_blocks * 512
    counted = daemon.metric("pullcache_store_bytes")
    assert used <= counted <= daemon.metric("pullcache_store_limit_bytes")
    return counted - used


def test_d12_a_power_cut_loses_no_blob_no_tag_and_no_pin(
    disk: Disk, daemon: Daemon, upstream: Registry, image: BuiltImage
):
    assert send_request(daemon.url, f"/v2/{image.repository}/blobs/{image.config}").status == 200
    wait_for_commits(daemon)
    # With one blob in the index: an empty index is rebuilt from the files, which would hide a loss.
    daemon.stop()
    daemon.start()
    by_tag = f"/v2/{image.repository}/manifests/{image.tag}"
    by_digest = [f"/v2/{image.repository}/manifests/{image.manifest}"]
    by_digest += [f"/v2/{image.repository}/blobs/{one}" for one in (image.config, *image.layers)]
    for path in (by_tag, *by_digest):
        assert send_request(daemon.url, path, headers=ACCEPT).status == 200
    wait_for_commits(daemon)
    daemon.run("pin", image.reference)
    disk.cut_power(daemon)
    upstream.stop()
    daemon.start()
    assert check_store(daemon) == 0
    assert send_request(daemon.url, by_tag, headers=ACCEPT).sha256 == image.index
    for path in by_digest:
        response = send_request(daemon.url, path, headers=ACCEPT)
        assert (response.status, response.sha256) == (200, f"sha256:{path.rpartition(':')[2]}")
    (listed,) = json.loads(daemon.run("images", "--json"))
    assert listed["pinned"]


@pytest.mark.parametrize("max_size", ["1GB", "2MB"])
def test_d13_after_power_cuts_during_commits_and_evictions_each_file_is_intact_and_counted(
    disk: Disk, directory: Path, blobs: BlobServer, max_size: str
):
    daemon = Daemon(directory / "daemon", blobs.url, env=NO_MIN_FREE, max_size=max_size)
    daemon.start()
    pull(daemon, blobs.add(os.urandom(200_000)))
    # With one blob in the index: an empty index is rebuilt from the files, which would hide a loss.
    daemon.stop()
    for pulls in range(1, 6):
        daemon.start()
        assert check_store(daemon) == 0 or max_size == "2MB"
        for _ in range(pulls):
            pull(daemon, blobs.add(os.urandom(200_000)))
        # The commit of the last blob may still be running.
        disk.cut_power(daemon)
    daemon.start()
    for digest in blobs.blobs:
        pull(daemon, digest)
    wait_for_commits(daemon)
    assert check_store(daemon) == 0
    assert (daemon.metric("pullcache_store_blobs") < len(blobs.blobs)) == (max_size == "2MB")
    daemon.finish()


def pull(daemon: Daemon, digest: str) -> None:
    assert send_request(daemon.url, f"/v2/library/app/blobs/{digest}").sha256 == digest
