"""Bundles in files of this machine that the daemon opens itself, so that no byte goes through a socket.

Whoever asks has opened the file before, and says which it is by device and inode: the same path may be another
file for the daemon, in a container for one. What it may not open, it is sent.
"""

import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import aclosing, asynccontextmanager

import msgspec

from proxy.concurrency import read_ahead, run_in_thread
from proxy.errors import FileUnreachableError, StorageError
from proxy.storage.ingest import WRITEBACK_SIZE, start_writeback

READ_SIZE = 1 << 20


class LocalFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A regular file, by an absolute path."""

    path: str
    device: int
    inode: int


async def read_files(files: Sequence[LocalFile], executor: Executor) -> AsyncGenerator[bytes, None]:
    """Yield the content of files, one behind the other.

    Raises `FileUnreachableError` before it yields anything, and `StorageError`.
    """
    async with (
        _open_files(files, os.O_RDONLY, executor) as fds,
        aclosing(read_ahead(_read_chunks(fds), executor)) as pieces,
    ):
        async for piece in pieces:
            yield piece


async def write_file(
    file: LocalFile, chunks: Iterator[bytes], executor: Executor, on_progress: Callable[[int], None]
) -> int:
    """Write the pieces into an empty file, say from time to time how many bytes are in, and return that.

    Raises `FileUnreachableError` and `StorageError`.
    """
    written, before = 0, -1
    async with _open_files([file], os.O_WRONLY, executor) as (fd,):
        while written > before:
            before = written
            written = await run_in_thread(executor, _write_batch, fd, written, chunks)
            on_progress(written)
    return written


@asynccontextmanager
async def _open_files(
    files: Sequence[LocalFile], flags: int, executor: Executor
) -> AsyncIterator[list[int]]:
    fds: list[int] = []
    try:
        await run_in_thread(executor, _open_all, files, flags, fds)
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def _open_all(files: Sequence[LocalFile], flags: int, fds: list[int]) -> None:
    for file in files:
        try:
            # A pipe is not waited for: it is not taken either.
            fds.append(os.open(file.path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
        except (OSError, ValueError) as error:
            raise FileUnreachableError(f"the daemon cannot open {file.path[:100]}") from error
        status = os.fstat(fds[-1])
        is_it = (status.st_dev, status.st_ino) == (file.device, file.inode)
        if not is_it or not stat.S_ISREG(status.st_mode):
            raise FileUnreachableError(f"to the daemon {file.path[:100]} is another file")


def _read_chunks(fds: Sequence[int]) -> Iterator[bytes]:
    try:
        for fd in fds:
            while piece := os.read(fd, READ_SIZE):
                yield piece
    except OSError as error:
        raise StorageError(f"the bundle cannot be read: {error.strerror}") from error


def _write_batch(fd: int, offset: int, chunks: Iterator[bytes]) -> int:
    """Write some of the pieces; return where they end. The rest is for another call: none can be cancelled."""
    start = offset
    for piece in chunks:
        rest = memoryview(piece)
        try:
            while rest:
                count = os.pwrite(fd, rest, offset)
                offset += count
                rest = rest[count:]
        except OSError as error:
            raise StorageError(f"the bundle cannot be written: {error.strerror}") from error
        if offset - start >= WRITEBACK_SIZE:
            break
    start_writeback(fd, start, offset - start)
    return offset
