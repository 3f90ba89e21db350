"""Only its owner may write to a store. What others could have written is refused, with what helps."""

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.errors import StorageError
from proxy.oci.digest import Digest
from proxy.storage.blobs import BlobStore
from proxy.storage.fsck import check_store
from proxy.storage.index import Index
from tests.fakes.clock import Clock

FILES = ("lock", "index.sqlite", "index.sqlite-wal", "index.sqlite-shm", "scrub.json")
DIRECTORIES = (".", "blobs", "blobs/sha256", "blobs/sha512", "ingest")


def open_and_close(root: Path) -> None:
    store = BlobStore(root)
    Index(root / "index.sqlite", Clock()).close()
    store.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with each of its files, as a killed daemon leaves it."""
    root = tmp_path / "store"
    store = BlobStore(root)
    store.commit_bytes(Digest.from_content(b"x"), b"x")
    store.close()
    Index(root / "index.sqlite", Clock()).close()
    for name in FILES:
        with (root / name).open("ab"):
            (root / name).chmod(0o600)
    return root


def modes(root: Path) -> dict[str, int]:
    return {
        str(path.relative_to(root)): stat.S_IMODE(path.lstat().st_mode)
        for path in (root, *root.rglob("*"))
    }


@pytest.fixture(params=[0o000, 0o022, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_new_store_is_closed_to_others_whatever_the_umask_is(tmp_path, umask):
    root = tmp_path / "new" / "parents" / "store"
    open_and_close(root)
    store = BlobStore(root)
    store.commit_bytes(Digest.from_content(b"x"), b"x")
    ingest = store.open_ingest(Digest.from_content(b"y"))
    ingest.append([b"y"])
    ingest.close()
    index = Index(root / "index.sqlite", Clock())
    found = modes(root)
    index.close()
    store.close()
    assert {name: mode for name, mode in found.items() if mode & 0o077} == {}
    for parent in (root.parent, root.parent.parent):
        assert not parent.stat().st_mode & 0o022


@pytest.mark.parametrize("name", [*DIRECTORIES, *FILES])
@pytest.mark.parametrize("bits", [0o777, 0o722, 0o770, 0o702, 0o720])
def test_what_others_may_write_to_is_refused_with_the_command_that_helps(root, name, bits):
    path = root / name
    root.chmod(0o750)
    path.chmod(bits)
    before = modes(root)
    with pytest.raises(StorageError) as caught:
        BlobStore(root)
    message = str(caught.value)
    assert message.endswith(f"chmod go-w {path}")
    assert f"{bits:04o}" in message
    assert modes(root) == before
    subprocess.run(message.rpartition(": ")[2].split(), check=True)
    open_and_close(root)


@pytest.mark.parametrize("name", [*DIRECTORIES, *FILES])
def test_what_others_may_only_read_is_closed_to_them(root, name):
    path = root / name
    path.chmod(0o755 if path.is_dir() else 0o644)
    open_and_close(root)
    if path.exists():
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640)


def test_a_group_may_read_a_store(root):
    for name in DIRECTORIES:
        (root / name).chmod(0o2750)
    for name in FILES:
        (root / name).chmod(0o640)
    before = modes(root)
    BlobStore(root).close()
    assert modes(root) == before


def opened_to_the_group(root: Path) -> set[str]:
    return {name for name, mode in modes(root).items() if mode & 0o077}


BLOBS = (".", "blobs", "blobs/sha256", "blobs/sha512")


def test_on_request_the_group_may_read_blobs_and_nothing_else(root, umask):
    digests = [Digest.from_content(content) for content in (b"x", b"y", b"z")]
    paths = [f"blobs/sha256/{digest.hex}" for digest in digests]
    store = BlobStore(root, group_access=True)
    store.settle_bytes(digests[0])
    assert opened_to_the_group(root) == {*BLOBS, paths[0]}
    store.commit_bytes(digests[1], b"y")
    store.settle_bytes(digests[1])
    ingest = store.open_ingest(digests[2])
    ingest.append([b"z"])
    assert opened_to_the_group(root) == {*BLOBS, *paths[:2]}
    ingest.commit()
    ingest.delete_state()
    ingest.close()
    found = modes(root)
    assert {found[path] for path in paths} == {0o640}
    assert [found[name] for name in BLOBS] == [0o710, 0o710, 0o750, 0o750]
    assert opened_to_the_group(root) == {*BLOBS, *paths}
    store.close()


def test_a_directory_that_was_closed_in_between_is_opened_again(root):
    (blob,) = (root / "blobs" / "sha256").iterdir()
    for _ in range(2):  # as systemd closes the store's directory at each start of a unit
        root.chmod(0o700)
        BlobStore(root, group_access=True).close()
        assert modes(root)["."] == 0o710
    # A start without the key keeps what the group may read, and commits private blobs.
    store = BlobStore(root)
    store.commit_bytes(Digest.from_content(b"y"), b"y")
    store.close()
    assert stat.S_IMODE(blob.stat().st_mode) == 0o640
    assert modes(root)[f"blobs/sha256/{Digest.from_content(b'y').hex}"] == 0o600


def test_fsck_restores_the_access_of_the_group(root):
    BlobStore(root, group_access=True).close()
    (blob,) = (root / "blobs" / "sha256").iterdir()
    for dry_run, mode in ((True, 0o600), (False, 0o640)):
        blob.chmod(0o600)
        check_store(root, dry_run=dry_run, on_progress=lambda *_: None, group_access=True)
        assert stat.S_IMODE(blob.stat().st_mode) == mode


def test_a_link_among_the_blobs_is_not_followed(root, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch(0o600)
    elsewhere.chmod(0o600)
    (root / "blobs" / "sha256" / ("a" * 64)).symlink_to(elsewhere)
    BlobStore(root, group_access=True).close()
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", [*DIRECTORIES[1:], *FILES])
@pytest.mark.parametrize("target", ["whole", "missing"])
def test_a_symbolic_link_in_a_store_is_refused_and_not_followed(root, tmp_path, name, target):
    path, elsewhere = root / name, tmp_path / "elsewhere"
    if target == "whole":
        path.rename(elsewhere)
    else:
        path.rename(tmp_path / "away")
    path.symlink_to(elsewhere)
    before = elsewhere.stat() if target == "whole" else None
    with pytest.raises(StorageError, match="and no link: move it away"):
        open_and_close(root)
    assert (elsewhere.stat() if elsewhere.exists() else None) == before


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["fifo", "directory", "socket"])
def test_what_is_no_regular_file_is_refused_at_once(root, name, kind):
    path = root / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind == "directory":
        path.mkdir(0o700)
    else:
        with socket.socket(socket.AF_UNIX) as one:
            # The path of a socket is limited to 107 bytes.
            directory = os.open(root, os.O_PATH)
            one.bind(f"/proc/self/fd/{directory}/{name}")
            os.close(directory)
        path.chmod(0o600)
    with pytest.raises(StorageError, match="must be a regular file"):
        open_and_close(root)


def test_a_store_behind_a_link_of_this_user_is_used_and_checked(root, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(root)
    open_and_close(link)
    root.chmod(0o777)
    with pytest.raises(StorageError, match="other users may write to"):
        BlobStore(link)


def test_a_link_that_is_put_in_the_place_of_the_index_is_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"")
    (tmp_path / "index.sqlite").symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError, match="cannot be opened"):
        Index(tmp_path / "index.sqlite", Clock())
    assert (tmp_path / "precious").read_bytes() == b""


def test_fsck_refuses_what_the_daemon_refuses(root):
    (root / "index.sqlite").chmod(0o666)
    with pytest.raises(StorageError, match="chmod go-w"):
        check_store(root, dry_run=True, on_progress=lambda *_: None)


@pytest.mark.parametrize("umask_left", [None, 0o755, 0o775, 0o777])
def test_a_store_of_0_1_0_is_opened_and_closed_to_others(tmp_path, umask_left):
    root = tmp_path / "store"
    # 0.1.0 created the directories with 0700 unless they existed, the index as umask 022 left it.
    (root / "blobs" / "sha256").mkdir(parents=True)
    (root / "ingest").mkdir(mode=0o700)
    for path in (root, root / "blobs", root / "blobs" / "sha256"):
        path.chmod(0o755)
    (root / "lock").touch(0o600)
    (root / "index.sqlite").touch()
    (root / "index.sqlite").chmod(0o644)
    if umask_left is not None:
        root.chmod(0o700)
        (root / "blobs").chmod(umask_left)
    open_and_close(root)
    assert not {name for name, mode in modes(root).items() if mode & 0o027}


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="chown needs root: tests/run has it")


@needs_root
@pytest.mark.parametrize("name", [*DIRECTORIES, *FILES])
def test_what_belongs_to_another_user_is_refused(root, name):
    os.chown(root / name, 12345, -1, follow_symlinks=False)
    with pytest.raises(StorageError, match="belongs to user 12345, and this is root"):
        open_and_close(root)


@needs_root
@pytest.mark.parametrize(("owner", "account"), [(1, "daemon"), (12345, "'#12345'")])
def test_root_is_told_the_command_of_the_owner(root, owner, account):
    for path in (root, *root.rglob("*")):
        os.chown(path, owner, -1)
    with pytest.raises(StorageError, match=f"its owner: sudo -u {account} pullcache …$"):
        open_and_close(root)


@needs_root
def test_a_link_of_another_user_to_a_store_is_refused(root, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(root)
    os.chown(link, 12345, -1, follow_symlinks=False)
    with pytest.raises(StorageError, match="belongs to user 12345"):
        BlobStore(link)


@needs_root
def test_a_user_cannot_be_led_into_a_store_of_another(root):
    for path in (root, *root.rglob("*")):
        os.chown(path, 12345, 12345)
    code = (
        "import os, sys; from pathlib import Path; from proxy.storage.blobs import BlobStore\n"
        "os.setgroups([]); os.setgid(54321); os.setuid(54321); BlobStore(Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "StorageError" in done.stderr
