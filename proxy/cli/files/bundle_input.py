"""Bundles that a command reads: files, parts of a split bundle, layout directories, or stdin."""

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
class BundleInput:
    """A bundle on the command line: `files` in order, or a `directory`, or neither for stdin."""

    name: str
    files: tuple[Path, ...] = ()
    directory: Path | None = None

    @property
    def size(self) -> int | None:
        """Number of bytes that `iter_chunks` will yield, None if unknown."""
        if self.directory:
            return sum(
                len(tar.encode_header(name, size)) + size + tar.padding_size(size)
                for name, _, size in _layout_entries(self.directory)
            ) + len(tar.END_OF_ARCHIVE)
        if not self._has_regular_files:
            return None
        return sum(path.stat().st_size for path in self.files)

    def describe_files(self) -> list[dict[str, Any]] | None:
        """Return the files as the admin API takes them; None if the daemon cannot open them."""
        if not self._has_regular_files:
            return None
        return [describe_file(path) for path in self.files]

    def iter_chunks(self) -> Iterator[bytes]:
        """Yield the bytes of the bundle; a directory becomes a tar."""
        if self.directory:
            yield from _iter_tar(self.directory)
        elif not self.files:
            yield from _iter_chunks(sys.stdin.buffer)
        for path in self.files:
            with path.open("rb") as file:
                yield from _iter_chunks(file)

    @property
    def _has_regular_files(self) -> bool:
        return bool(self.files) and all(stat.S_ISREG(path.stat().st_mode) for path in self.files)


def describe_file(path: Path) -> dict[str, Any]:
    """Return path, device and inode of a file, by which the daemon makes sure it opens the same."""
    status = path.stat()
    return {"path": str(path.absolute()), "device": status.st_dev, "inode": status.st_ino}


def find_bundles(names: tuple[str, ...]) -> list[BundleInput]:
    """Return the bundles that the arguments name, parts combined. Raises `BundleError`.

    A split bundle may be named by any of its parts, or by the name without the part number.
    """
    bundles: dict[str, BundleInput] = {}
    for name in names:
        path = Path(name)
        part = _PART_NAME.fullmatch(name)
        if name == "-":
            bundles[name] = BundleInput("stdin")
        elif path.is_dir():
            bundles[name] = BundleInput(name, directory=path)
        elif part or (not path.exists() and Path(f"{name}.000").exists()):
            whole = part[1] if part else name
            bundles[whole] = BundleInput(whole, _find_parts(whole))
        else:
            bundles[name] = BundleInput(name, (path,))
    return list(bundles.values())


def _find_parts(name: str) -> tuple[Path, ...]:
    """Return the parts of a bundle in order. Raises `BundleError` if there is a gap."""
    numbered = {}
    for path in Path(name).parent.iterdir():
        part = _PART_NAME.fullmatch(path.name)
        if part and part[1] == Path(name).name:
            numbered[int(part[2])] = path
    for number in range(max(numbered, default=0) + 1):
        if number not in numbered:
            raise BundleError(f"{name}.{number:03} is missing; a bundle needs all its parts")
    return tuple(numbered[number] for number in sorted(numbered))


def read_digests(bundle: BundleInput) -> set[str]:
    """Return the digests of the blobs in a bundle. Raises `BundleError`."""
    if bundle.directory:
        names = [name for name, _, _ in _layout_entries(bundle.directory)]
    else:
        try:
            names = _entry_names(bundle)
        except (tarfile.TarError, EOFError, zlib.error, ZstdError) as error:
            raise BundleError(f"{bundle.name} is not a bundle or is damaged: {error}") from error
    digests = {str(digest) for name in names if (digest := layout.parse_blob_path(name))}
    if not digests:
        raise BundleError(f"{bundle.name} is not a bundle: it contains no blobs")
    return digests


def _entry_names(bundle: BundleInput) -> list[str]:
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
            # Seek over the content: a bundle may have terabytes of it, but few headers.
            archive = stack.enter_context(tarfile.open(bundle.files[0], "r:"))
            return [entry.name.removeprefix("./") for entry in archive]
        archive = stack.enter_context(tarfile.open(fileobj=stream, mode="r|"))
        return [entry.name.removeprefix("./") for entry in archive]


class _ChunkReader(io.RawIOBase):
    """A readable file over an iterator of chunks."""

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
    """Return name, path and size of the files of a layout directory, its documents first.

    Symbolic links are left out: they may lead anywhere. Raises `BundleError`.
    """
    paths = [directory / name for name in sorted(layout.LAYOUT_FILES)]
    paths += sorted(directory.glob("blobs/*/*"))
    entries = []
    for path in paths:
        with suppress(FileNotFoundError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                entries.append((path.relative_to(directory).as_posix(), path, status.st_size))
    if layout.INDEX_FILE not in (name for name, _, _ in entries):
        raise BundleError(f"{directory} is not an OCI image layout: it has no {layout.INDEX_FILE}")
    return entries


def _iter_tar(directory: Path) -> Iterator[bytes]:
    for name, path, size in _layout_entries(directory):
        yield tar.encode_header(name, size)
        left = size
        with path.open("rb") as file:
            while left and (chunk := file.read(min(CHUNK_SIZE, left))):
                left -= len(chunk)
                yield chunk
        if left:
            raise BundleError(f"{path} was truncated while it was read")
        yield bytes(tar.padding_size(size))
    yield tar.END_OF_ARCHIVE
