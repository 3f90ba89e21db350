"""`pullcache fsck`: read every blob, remove what does not match its digest, rebuild the index.

Tags, pins, links and times of use exist only in the index, and are kept if it can be read. If it cannot
be read, the daemon requests tags from upstream again. Pins are kept if their table can be read, and so is
which upstream has sent which blob (it then proves that a repository has the blob, and need not send it again),
the totals of traffic and the audit trail.
"""

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from proxy.errors import InvalidDigestError, InvalidReferenceError, StorageError
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.storage import index_writes
from proxy.storage.blobs import BlobStore
from proxy.storage.index_size import vacuum
from proxy.storage.scan import parse_manifest

_READ_SIZE = 1 << 20
# What is kept of an index that is damaged elsewhere.
_PINS_SQL = "SELECT upstream, name, reference, p.digest FROM pins p JOIN repositories r ON r.id = repository"
_SENDERS_SQL = "SELECT digest, upstream FROM senders"
_COPIED_TABLES = ("traffic", "trail", "pulls")


@dataclass(frozen=True, slots=True)
class CorruptFile:
    """A file that does not match its name. `path` is relative to the store."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class FsckReport:
    """The result of a check: `checked` files with `bytes_read` bytes, of which `indexed` are intact."""

    checked: int
    bytes_read: int
    indexed: int
    corrupt: list[CorruptFile]


def check_store(
    root: Path,
    *,
    dry_run: bool,
    on_progress: Callable[[int, int], None],
    group_access: bool = False,
) -> FsckReport:
    """Verify every blob of the store at `root` and rebuild its index.

    Calls `on_progress(files_done, files_total)` before each file. With `dry_run`, nothing is changed. With
    `group_access`, intact blobs are opened to the group of the store.
    Raises `StorageError` if a daemon uses the store, or the disk fails.
    """
    if not root.is_dir():
        raise StorageError(f"there is no store at {root}; pass its directory with --store")
    store = BlobStore(root, group_access=group_access and not dry_run)
    try:
        return _check_blobs(store, dry_run=dry_run, on_progress=on_progress)
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"the store {root} cannot be checked: {error}") from error
    finally:
        store.close()


def _check_blobs(
    store: BlobStore, *, dry_run: bool, on_progress: Callable[[int, int], None]
) -> FsckReport:
    good: dict[Digest, tuple[int, oci.Manifest | None]] = {}
    corrupt: list[CorruptFile] = []
    total_bytes = 0
    # Only files that are named like a blob belong to the store; others stay.
    paths = [path for path in sorted(store.root.glob("blobs/*/*")) if _parse_path(path)]
    for done, path in enumerate(paths):
        on_progress(done, len(paths))
        reason, size, manifest = _verify_file(path)
        total_bytes += size
        if reason is None:
            digest = Digest.parse(f"{path.parent.name}:{path.name}")
            good[digest] = (size, manifest)
            store.keep_access(digest)
            continue
        corrupt.append(CorruptFile(str(path.relative_to(store.root)), reason))
        if not dry_run and not path.is_dir():
            path.unlink()
    on_progress(len(paths), len(paths))
    if not dry_run:
        _rebuild_index(store.root / "index.sqlite", good)
    return FsckReport(len(paths), total_bytes, len(good), corrupt)


def _parse_path(path: Path) -> Digest | None:
    try:
        return Digest.parse(f"{path.parent.name}:{path.name}")
    except InvalidDigestError:
        return None


def _verify_file(path: Path) -> tuple[str | None, int, oci.Manifest | None]:
    """Return what is wrong with a file, its size, and the manifest if it is one."""
    digest = Digest.parse(f"{path.parent.name}:{path.name}")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        # It may be intact: the user who owns the store can check it.
        raise
    except OSError as error:
        return f"cannot be opened: {error.strerror}", 0, None
    with open(fd, "rb", buffering=0) as file:  # noqa: PTH123 (opens a descriptor, not a path)
        if not path.is_file():
            return "not a regular file", 0, None
        hasher, head, size = digest.new_hasher(), b"", 0
        while chunk := file.read(_READ_SIZE):
            hasher.update(chunk)
            size += len(chunk)
            head = head + chunk if size <= oci.MAX_MANIFEST_SIZE else b""
    if not digest.matches(hasher):
        return "its content does not match its digest", size, None
    return None, size, parse_manifest(head)


def _rebuild_index(path: Path, valid_blobs: dict[Digest, tuple[int, oci.Manifest | None]]) -> None:
    """Make the index match the files, and keep the data that only the index has."""
    try:
        _update_index(path, valid_blobs)
    except (sqlite3.DatabaseError, StorageError, InvalidReferenceError):
        # The index is damaged or of a newer version: rename it and create a new one.
        pins, senders = _read_rows(path, _PINS_SQL), _read_rows(path, _SENDERS_SQL)
        copied = {name: _read_rows(path, f"SELECT * FROM {name}") for name in _COPIED_TABLES}
        for suffix in ("", "-wal", "-shm"):
            old = Path(f"{path}{suffix}")
            if old.exists():
                old.rename(f"{path}.broken{suffix}")
        _update_index(path, valid_blobs, pins, senders, copied)


def _read_rows(path: Path, query: str) -> list[tuple[str, ...]]:
    # sqlite3 cannot decode a message that quotes a damaged schema.
    with (
        suppress(sqlite3.Error, UnicodeDecodeError),
        closing(sqlite3.connect(path)) as connection,
    ):
        return connection.execute(query).fetchall()
    return []


def _update_index(
    path: Path,
    valid_blobs: dict[Digest, tuple[int, oci.Manifest | None]],
    pins: Iterable[tuple[str, ...]] = (),
    senders: Iterable[tuple[str, ...]] = (),
    copied: Mapping[str, list[tuple[str, ...]]] = MappingProxyType({}),
) -> None:
    with closing(index_writes.open_connection(path)) as connection, connection:
        now = time.time()
        uses = dict(connection.execute("SELECT digest, used FROM blobs"))
        gone = [digest for digest in map(Digest.parse, uses) if digest not in valid_blobs]
        index_writes.remove_blobs(connection, gone, lambda _: None)
        for digest, (size, manifest) in valid_blobs.items():
            index_writes.add_unlinked_blobs(
                connection, [(digest, size, manifest)], uses.get(str(digest), now)
            )
        index_writes.restore_pins(connection, pins)
        index_writes.restore_senders(connection, senders)
        index_writes.restore_rows(connection, copied)
        if connection.execute("PRAGMA integrity_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("damaged")
        connection.commit()
        vacuum(connection)
