"""The files of a store: committed blobs, and ingests, which are blobs being written.

    lock                     flock: one daemon per store
    blobs/sha256/<hex>       committed blobs, as in an OCI image layout: `sha256sum` verifies them
    ingest/sha256-<hex>      blobs being written, each with a `.state` file
    ingest/put-sha256-<hex>  small content being committed
    ingest/import-*/         ingests of one import

A blob becomes visible by rename or link, after its digest was verified and its bytes were synced, so
a file under `blobs/` is whole even after a power cut. Everything here blocks; callers use a thread
for anything beyond one small file.
"""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from types import TracebackType
from typing import Self

import aiofiles
import msgspec

from proxy.concurrency import run_uncancelled
from proxy.errors import InvalidDigestError, StorageError, StoreInUseError
from proxy.oci.digest import Digest
from proxy.storage.ingest import STATE_FILE_SIZE, Ingest, storage_error, write_atomically
from proxy.storage.permissions import (
    GROUP_MODE,
    PRIVATE_MODE,
    open_blob_to_group,
    open_to_group,
    secure_store,
)

BLOCK_SIZE = 4096

# Errors that mean that the file does not exist. With others (no permission, no descriptor, a failing
# disk) it may exist.
_ABSENT_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)


def allocated_size(size: int) -> int:
    """Return the bytes that a file of `size` bytes takes on disk: whole blocks."""
    return -(-size // BLOCK_SIZE) * BLOCK_SIZE


class OpenBlob:
    """A committed blob, open for reading. It stays readable after an eviction."""

    __slots__ = ("fd", "size")

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class FileRange(msgspec.Struct, frozen=True):
    """Bytes of an open file, from `start` up to `stop`. Its creator keeps the file open."""

    fd: int
    start: int
    stop: int


class BlobStore:
    """The directory of a store. The constructor takes its lock, `close` releases it.

    `was_unclean` tells that the last process did not get to `close`: it was killed, or power was cut.
    With `group_access`, the group of the store may read its blobs.
    """

    def __init__(self, root: Path, *, group_access: bool = False) -> None:
        self.root = root
        self._group_access = group_access
        self._blob_mode = GROUP_MODE if group_access else PRIVATE_MODE
        self._ingest_directory = root / "ingest"
        try:
            _make_private_directory(root)
            secure_store(root)
            self._lock_fd, self.was_unclean = _acquire_lock(root)
            for name in ("blobs", "blobs/sha256", "blobs/sha512"):
                (root / name).mkdir(mode=0o700, exist_ok=True)
            self._ingest_directory.mkdir(mode=0o700, exist_ok=True)
            if group_access:
                open_to_group(root)
            self._remove_abandoned_files()
        except OSError as error:
            raise StorageError(
                f"the store {root} cannot be used: {error.strerror}; choose another with --store"
            ) from error

    def _remove_abandoned_files(self) -> None:
        """Remove files of a killed process: of small commits and imports, and ingests without a state."""
        for path in self._ingest_directory.iterdir():
            state = path.with_suffix(".state")
            has_state = state.exists() and state.stat().st_size > 0
            if _parse_ingest_name(path.name) and path.is_file() and not has_state:
                path.unlink()
                state.unlink(missing_ok=True)
        for put in self._ingest_directory.glob("put-*"):
            digest = _parse_put_name(put.name)
            # If its blob exists, it marks a commit that the index may not know.
            if not digest or not Path(self.blob_path(digest)).exists():
                put.unlink()
        for folder in self._ingest_directory.glob("import-*"):
            for state in folder.glob("*.state"):
                # A state without data marks a commit that the index may not know.
                if not state.with_suffix("").exists():
                    (self._ingest_directory / state.stem).unlink(missing_ok=True)
                    state.rename(self._ingest_directory / state.name)
            shutil.rmtree(folder)

    def close(self) -> None:
        """Release the lock of the store."""
        with suppress(OSError):
            os.ftruncate(self._lock_fd, 0)
        os.close(self._lock_fd)

    def blob_path(self, digest: Digest) -> str:
        """Return the path of a committed blob."""
        return f"{self.root}/blobs/{digest.algorithm}/{digest.hex}"

    def open(self, digest: Digest, size: int) -> OpenBlob | None:
        """Open a committed blob, or return None if there is no regular file of `size` bytes.

        Raises `StorageError` if the file may exist but cannot be opened.
        """
        try:
            fd = _open_for_reading(self.blob_path(digest))
        except OSError as error:
            if error.errno in _ABSENT_ERRNOS:
                return None
            raise _unreadable_error(digest, error) from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            os.close(fd)
            return None
        return OpenBlob(fd, size)

    def exists(self, digest: Digest, size: int) -> bool:
        """Tell whether the file of a committed blob is there, with `size` bytes; not whether it can be read."""
        try:
            status = os.lstat(self.blob_path(digest))
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == size

    async def read(self, digest: Digest) -> bytes | None:
        """Return the content of a small blob, verified; None if it is gone or damaged.

        Raises `StorageError` if the file may exist but cannot be read.
        """
        try:
            content = await run_uncancelled(self._read(digest))
        except OSError as error:
            if error.errno in _ABSENT_ERRNOS:
                return None
            raise _unreadable_error(digest, error) from error
        return content if Digest.from_content(content, digest.algorithm) == digest else None

    async def _read(self, digest: Digest) -> bytes:
        # If `open` were cancelled, its thread would open the file all the same.
        async with aiofiles.open(self.blob_path(digest), "rb", opener=_open_for_reading) as file:
            content: bytes = await file.read()
            return content

    def read_sync(self, digest: Digest, size: int) -> bytes | None:
        """Return the verified content of a small blob; None if it is gone, damaged or unreadable. Blocks."""
        try:
            opened = self.open(digest, size)
            if opened is None:
                return None
            with opened:
                content = os.pread(opened.fd, size, 0)
        except (OSError, StorageError):
            return None
        return content if Digest.from_content(content, digest.algorithm) == digest else None

    def committed_at(self, digest: Digest) -> float | None:
        """Return when the blob was written, in Unix time; None if it is gone."""
        try:
            return Path(self.blob_path(digest)).stat(follow_symlinks=False).st_mtime
        except OSError:
            return None

    def bytes_since(self, time: float) -> int:
        """Return the bytes of the blobs that were written at `time` (Unix time) or later."""
        total = 0
        for algorithm in ("sha256", "sha512"):
            with suppress(OSError), os.scandir(self.root / "blobs" / algorithm) as entries:
                for entry in entries:
                    with suppress(OSError):  # evicted meanwhile
                        status = entry.stat(follow_symlinks=False)
                        total += status.st_size if status.st_mtime >= time else 0
        return total

    def blob_inode(self, digest: Digest) -> int:
        """Return the inode of the blob's file; 0 if there is none. A new file has another one."""
        try:
            return Path(self.blob_path(digest)).stat(follow_symlinks=False).st_ino
        except OSError:
            return 0

    def commit_bytes(self, digest: Digest, content: bytes) -> None:
        """Make small content durable and visible; the caller has verified it.

        A second name in `ingest/` stays until `settle_bytes`: after a kill it marks a blob that the
        index may not know. Raises `StorageError`.
        """
        try:
            path = Path(self.blob_path(digest))
            write_atomically(self._put_path(digest), path, content, self._blob_mode)
        except OSError as error:
            raise storage_error("write", error) from error

    def settle_bytes(self, digest: Digest) -> None:
        """Remove the second name; one that cannot be removed is removed at the next start."""
        with suppress(OSError):
            self._put_path(digest).unlink(missing_ok=True)

    def _put_path(self, digest: Digest) -> Path:
        return self._ingest_directory / f"put-{digest.algorithm}-{digest.hex}"

    def open_ingest(self, digest: Digest, directory: Path | None = None) -> Ingest:
        """Open the ingest of `digest`, new or interrupted. Raises `StorageError`.

        An import uses its own directory, as it may contain a blob that is being downloaded.
        """
        path = Path(self.blob_path(digest))
        return Ingest(directory or self._ingest_directory, digest, path, self._blob_mode)

    def keep_access(self, digest: Digest) -> None:
        """Restore the mode of a blob's file, if the group is to read it. Blocks."""
        if self._group_access:
            open_blob_to_group(self.blob_path(digest))

    def make_import_directory(self) -> Path:
        """Create and return a directory for the ingests of an import. Raises `StorageError`."""
        try:
            return Path(mkdtemp(dir=self._ingest_directory, prefix="import-"))
        except OSError as error:
            raise storage_error("create", error) from error

    def remove_import_directory(self, directory: Path) -> None:
        """Remove the directory of an import; the next start removes files that could not be removed."""
        shutil.rmtree(directory, ignore_errors=True)

    def delete(self, digest: Digest) -> None:
        """Remove the file of a blob if it exists. Raises `StorageError`."""
        try:
            Path(self.blob_path(digest)).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot remove {digest}: {error.strerror}") from error

    def iter_blobs(self) -> Iterator[tuple[Digest, int]]:
        """Yield digest and size of every file under `blobs/` that is named like a blob."""
        for algorithm in ("sha256", "sha512"):
            with os.scandir(self.root / "blobs" / algorithm) as entries:
                for entry in entries:
                    digest = _parse_digest(algorithm, entry.name)
                    with suppress(FileNotFoundError):  # evicted after it was listed
                        if digest and entry.is_file(follow_symlinks=False):
                            yield digest, entry.stat(follow_symlinks=False).st_size

    def list_ingests(self) -> list[tuple[Digest, int, float]]:
        """Return digest, allocated bytes and time of the last write of every ingest.

        Raises `StorageError`.
        """
        found = []
        try:
            with os.scandir(self._ingest_directory) as entries:
                for entry in entries:
                    digest = _parse_ingest_name(entry.name)
                    with suppress(FileNotFoundError):  # committed after it was listed
                        if digest and entry.is_file(follow_symlinks=False):
                            status = entry.stat(follow_symlinks=False)
                            size = status.st_blocks * 512 + STATE_FILE_SIZE
                            found.append((digest, size, status.st_mtime))
        except OSError as error:
            raise storage_error("list", error) from error
        return found

    def list_committed_ingests(self) -> list[Digest]:
        """Return digests that were committed but may not be indexed, because a kill came in between.

        Raises `StorageError`.
        """
        found = []
        try:
            for state in self._ingest_directory.glob("*.state"):
                digest = _parse_ingest_name(state.stem)
                if digest and not state.with_suffix("").exists():
                    found.append(digest)
            put_names = [put.name for put in self._ingest_directory.glob("put-*")]
            found += [digest for name in put_names if (digest := _parse_put_name(name))]
        except OSError as error:
            raise storage_error("list", error) from error
        return found

    def delete_ingest(self, digest: Digest) -> None:
        """Remove an interrupted ingest and every marker of the digest. Raises `StorageError`."""
        path = self._ingest_directory / f"{digest.algorithm}-{digest.hex}"
        try:
            path.unlink(missing_ok=True)
            path.with_suffix(".state").unlink(missing_ok=True)
            self._put_path(digest).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error("remove", error) from error

    def check_writable(self) -> None:
        """Write and remove a small file. Raises `StorageError` if that fails."""
        try:
            with TemporaryFile(dir=self._ingest_directory) as file:
                file.write(b"ready")
        except OSError as error:
            raise StorageError(f"the store {self.root} cannot be written: {error}") from error

    def free_bytes(self) -> int:
        """Return the free bytes of the file system that this user may use."""
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    def total_bytes(self) -> int:
        """Return the size of the file system."""
        status = os.statvfs(self.root)
        return status.f_blocks * status.f_frsize


def _open_for_reading(path: str, _flags: int = 0) -> int:
    """Open a file, without following symbolic links or waiting for pipes.

    So nothing that was put in a blob's place is served.
    """
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _unreadable_error(digest: Digest, error: OSError) -> StorageError:
    return StorageError(f"cannot read {digest}: {error.strerror}")


def _make_private_directory(path: Path) -> None:
    """Create a directory for this user alone, and its parents so that no other may write to them."""
    for parent in reversed(path.parents):
        if not parent.exists():
            parent.mkdir(mode=0o755, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)


def _acquire_lock(root: Path) -> tuple[int, bool]:
    """Return the descriptor of the locked file, and whether its last owner left it in use."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(root / "lock", flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        raise StoreInUseError(
            f"the store {root} is in use by process {owner or 'unknown'}; stop it first"
        ) from None
    was_unclean = os.fstat(fd).st_size > 0
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    os.fsync(fd)  # a power cut must not make it look clean
    return fd, was_unclean


def _parse_ingest_name(name: str) -> Digest | None:
    algorithm, _, encoded = name.partition("-")
    return _parse_digest(algorithm, encoded)


def _parse_put_name(name: str) -> Digest | None:
    return _parse_ingest_name(name.removeprefix("put-"))


def _parse_digest(algorithm: str, encoded: str) -> Digest | None:
    try:
        return Digest.parse(f"{algorithm}:{encoded}")
    except InvalidDigestError:
        return None
