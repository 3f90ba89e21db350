"""Bundles as files: whole or in parts, compressed or not, and layouts in directories as the tar they could be."""

import gzip
import io
import re
import stat
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from backports.zstd import ZstdError, ZstdFile

from proxy.errors import BundleError
from proxy.oci import layout, tar

CHUNK_SIZE = 1 << 20

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_GZIP_MAGIC = b"\x1f\x8b"

_PART_NAME = re.compile(r"(.+)\.(\d{3,})")


@dataclass(frozen=True, slots=True)
class BundleArgument:
    """A bundle as the command was given it: its files, in order, or a directory, or nothing for stdin."""

    name: str
    files: tuple[Path, ...] = ()
    directory: Path | None = None

    @property
    def size(self) -> int | None:
        """How many bytes `pieces` will yield, None if nobody knows before."""
        if self.directory:
            return sum(
                len(tar.encode_header(name, size)) + size + tar.padding_size(size)
                for name, _, size in _layout_entries(self.directory)
            ) + len(tar.END_OF_ARCHIVE)
        sizes = [path.stat() for path in self.files]
        is_known = sizes and all(stat.S_ISREG(one.st_mode) for one in sizes)
        return sum(one.st_size for one in sizes) if is_known else None

    def describe_files(self) -> list[dict[str, Any]] | None:
        """Return the files for a daemon that may open them itself, None if they are no regular files."""
        sizes = [path.stat() for path in self.files]
        if not sizes or not all(stat.S_ISREG(one.st_mode) for one in sizes):
            return None
        return [describe_file(path) for path in self.files]

    def iter_chunks(self) -> Iterator[bytes]:
        """Yield the bundle's bytes."""
        if self.directory:
            yield from _iter_tar(self.directory)
        elif not self.files:
            yield from _iter_chunks(sys.stdin.buffer)
        for path in self.files:
            with path.open("rb") as file:
                yield from _iter_chunks(file)


def describe_file(path: Path) -> dict[str, Any]:
    """Return a file as the admin API names it."""
    status = path.stat()
    return {"path": str(path.absolute()), "device": status.st_dev, "inode": status.st_ino}


def find_bundles(names: tuple[str, ...]) -> list[BundleArgument]:
    """Return the bundles that the arguments name; parts are put together. Raises `BundleError`.

    Of a bundle in parts any part will do, or the name before the number.
    """
    found: dict[str, BundleArgument] = {}
    for name in names:
        path = Path(name)
        part = _PART_NAME.fullmatch(name)
        if name == "-":
            found[name] = BundleArgument("stdin")
        elif path.is_dir():
            found[name] = BundleArgument(name, directory=path)
        elif part or (not path.exists() and Path(f"{name}.000").exists()):
            whole = part[1] if part else name
            found[whole] = BundleArgument(whole, find_parts(whole))
        else:
            found[name] = BundleArgument(name, (path,))
    return list(found.values())


def find_parts(name: str) -> tuple[Path, ...]:
    """Return the parts of a bundle in order. Raises `BundleError` if one is missing in their midst."""
    numbered = {}
    for path in Path(name).parent.iterdir():
        part = _PART_NAME.fullmatch(path.name)
        if part and part[1] == Path(name).name:
            numbered[int(part[2])] = path
    for number in range(max(numbered, default=0) + 1):
        if number not in numbered:
            raise BundleError(f"{name}.{number:03} is missing, and other parts are here")
    return tuple(numbered[number] for number in sorted(numbered))


def read_digests(bundle: BundleArgument) -> set[str]:
    """Return the digests of the blobs in a bundle. Raises `BundleError`."""
    if bundle.directory:
        names = [name for name, _, _ in _layout_entries(bundle.directory)]
    else:
        try:
            names = _entry_names(bundle)
        except (tarfile.TarError, EOFError, zlib.error, ZstdError) as error:
            raise BundleError(f"{bundle.name} is no bundle, or damaged: {error}") from error
    found = {str(digest) for name in names if (digest := layout.parse_blob_path(name))}
    if not found:
        raise BundleError(f"{bundle.name} holds no blobs: it is no bundle")
    return found


def _entry_names(bundle: BundleArgument) -> list[str]:
    with ExitStack() as stack:
        file = stack.enter_context(
            io.BufferedReader(_ChunkReader(bundle.iter_chunks()), CHUNK_SIZE)
        )
        head = file.peek(4)
        stream: Any = file
        if head.startswith(_ZSTD_MAGIC):
            stream = stack.enter_context(ZstdFile(file))
        elif head.startswith(_GZIP_MAGIC):
            stream = stack.enter_context(gzip.GzipFile(fileobj=file))
        elif len(bundle.files) == 1:
            # Sought through: a bundle of terabytes has but a few headers.
            archive = stack.enter_context(tarfile.open(bundle.files[0], "r:"))
            return [entry.name.removeprefix("./") for entry in archive]
        archive = stack.enter_context(tarfile.open(fileobj=stream, mode="r|"))
        return [entry.name.removeprefix("./") for entry in archive]


class _ChunkReader(io.RawIOBase):
    """Pieces as one file, to be read once."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._remainder = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if not self._remainder:
            self._remainder = next(self._chunks, b"")
        count = min(len(buffer), len(self._remainder))
        buffer[:count], self._remainder = self._remainder[:count], self._remainder[count:]
        return count


def _iter_chunks(file: BinaryIO) -> Iterator[bytes]:
    return iter(partial(file.read, CHUNK_SIZE), b"")


def _layout_entries(directory: Path) -> list[tuple[str, Path, int]]:
    """Return what a layout in a directory consists of: names, files and sizes, the documents first.

    Symbolic links are nobody's content and are left out. Raises `BundleError`.
    """
    paths = [directory / name for name in sorted(layout.LAYOUT_FILES)]
    paths += sorted(directory.glob("blobs/*/*"))
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                found.append((path.relative_to(directory).as_posix(), path, status.st_size))
    if layout.INDEX_FILE not in (name for name, _, _ in found):
        raise BundleError(f"{directory} is no OCI image layout: it has no {layout.INDEX_FILE}")
    return found


def _iter_tar(directory: Path) -> Iterator[bytes]:
    for name, path, size in _layout_entries(directory):
        yield tar.encode_header(name, size)
        left = size
        with path.open("rb") as file:
            while left and (piece := file.read(min(CHUNK_SIZE, left))):
                left -= len(piece)
                yield piece
        if left:
            raise BundleError(f"{path} has become shorter while it was read")
        yield bytes(tar.padding_size(size))
    yield tar.END_OF_ARCHIVE
