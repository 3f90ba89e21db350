"""Bundles in files of this machine that the daemon opens itself, so that no byte passes a socket.

The client opens each file first and states its device and inode, because the daemon may see another
file at the same path, for instance in a container. A bundle whose files the daemon cannot open is
sent through the socket instead.
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
    """A regular file by its absolute path, with the device and inode that the client sees there."""

    path: str
    device: int
    inode: int


async def read_files(files: Sequence[LocalFile], executor: Executor) -> AsyncGenerator[bytes, None]:
    """Yield the contents of files, one after another.

    Raises `FileUnreachableError` before the first byte, and `StorageError`.
    """
    async with (
        _open_files(files, os.O_RDONLY, executor) as fds,
        aclosing(read_ahead(_read_chunks(fds), executor)) as chunks,
    ):
        async for chunk in chunks:
            yield chunk


async def write_file(
    file: LocalFile, chunks: Iterator[bytes], executor: Executor, on_progress: Callable[[int], None]
) -> int:
    """Write the chunks into an empty file and return its size.

    `on_progress` is called with the number of bytes written so far. Raises `FileUnreachableError`
    and `StorageError`.
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
            # Without O_NONBLOCK, opening a pipe would wait for its other end before it is rejected.
            fds.append(os.open(file.path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
        except (OSError, ValueError) as error:
            raise FileUnreachableError(f"the daemon cannot open {file.path[:100]}") from error
        status = os.fstat(fds[-1])
        is_same = (status.st_dev, status.st_ino) == (file.device, file.inode)
        if not is_same or not stat.S_ISREG(status.st_mode):
            raise FileUnreachableError(f"the daemon sees a different file at {file.path[:100]}")


def _read_chunks(fds: Sequence[int]) -> Iterator[bytes]:
    try:
        for fd in fds:
            while chunk := os.read(fd, READ_SIZE):
                yield chunk
    except OSError as error:
        raise StorageError(f"the bundle cannot be read: {error.strerror}") from error


def _write_batch(fd: int, offset: int, chunks: Iterator[bytes]) -> int:
    """Write up to about `WRITEBACK_SIZE` of the chunks at `offset`, and return where they end.

    Only part of them, because a thread call cannot be cancelled.
    """
    start = offset
    for chunk in chunks:
        rest = memoryview(chunk)
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
