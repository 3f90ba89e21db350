"""Receive buffers of up to 2 MiB, with a limit per download and one for all downloads.

A buffer is filled from the network, sent to readers, written and hashed, and then reused. If the disk is
slow, the transfer slows down with it: the connection waits for a buffer, and upstream for the connection.
"""

import mmap
from dataclasses import dataclass, field

from proxy.config import FetchSettings
from proxy.download.condition import BatchedCondition

# The usual size; smaller buffers cost the loop and the threads more calls.
BUFFER_SIZE = 2 << 20
# A limit holds at least so many buffers, so that bytes arrive while others are written and hashed.
MIN_BUFFERS = 4
# The buffer that a connection gets if all memory is in use and this connection holds it up.
SMALL_BUFFER_SIZE = 64 << 10
# Buffers kept for the next download when no download runs.
_SPARE_BUFFERS = 4


@dataclass(eq=False, slots=True)
class Chunk:
    """Bytes of a blob in memory, from `start` up to `stop`. Those before `written` are in the file too.

    While `is_open`, a connection appends to it. `is_in_page_cache` is False if the bytes were written
    past the page cache.
    """

    start: int
    buffer: memoryview
    stop: int = field(init=False)
    written: int = field(init=False)
    is_open: bool = True
    is_in_page_cache: bool = False

    def __post_init__(self) -> None:
        self.stop = self.written = self.start

    @property
    def is_full(self) -> bool:
        """Whether the buffer has no room left."""
        return self.stop - self.start == len(self.buffer)

    @property
    def is_aligned(self) -> bool:
        """Whether the buffer consists of whole pages of memory, so that it can be written past the page cache."""
        return len(self.buffer) > SMALL_BUFFER_SIZE

    def view(self, start: int, stop: int) -> memoryview:
        """Return the bytes between two offsets of the blob."""
        return self.buffer[start - self.start : stop - self.start]


class BufferPool:
    """The buffers of all downloads."""

    def __init__(self, settings: FetchSettings) -> None:
        self.changed = BatchedCondition()
        self._spare: list[memoryview] = []
        self._bytes_in_use = 0
        self.configure(settings)

    def configure(self, settings: FetchSettings) -> None:
        """Apply the limits of a configuration, in bytes, to buffers taken from now on."""
        self._limit = settings.memory
        self._limit_per_download = settings.memory_per_download
        self._buffer_size = _choose_buffer_size(min(self._limit, self._limit_per_download))
        self._spare.clear()
        self.changed.notify_all()

    @property
    def bytes_in_use(self) -> int:
        """Bytes in the buffers that downloads have taken."""
        return self._bytes_in_use

    def take(self, size: int, bytes_held: int) -> memoryview | None:
        """Return a buffer of up to `size` bytes for a download that already has `bytes_held`.

        Returns None if a limit is reached.
        """
        size = min(size, self._buffer_size)
        is_over_limit = (
            bytes_held + size > self._limit_per_download or self._bytes_in_use + size > self._limit
        )
        return None if is_over_limit else self._allocate(size)

    def take_small(self, size: int) -> memoryview:
        """Return a small buffer regardless of the limits, for a connection that cannot wait for one."""
        return self._allocate(min(size, SMALL_BUFFER_SIZE))

    def _allocate(self, size: int) -> memoryview:
        if size <= SMALL_BUFFER_SIZE:
            buffer = memoryview(bytearray(size))
        elif self._spare:
            buffer = self._spare.pop()
        else:
            # A mapping takes memory only for the pages that are filled.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            buffer = memoryview(mmap.mmap(-1, self._buffer_size, flags=flags))
        self._bytes_in_use += len(buffer)
        return buffer

    def give_back(self, buffer: memoryview) -> None:
        """Take back a buffer that is no longer read or written."""
        self._bytes_in_use -= len(buffer)
        if len(buffer) == self._buffer_size > SMALL_BUFFER_SIZE:
            self._spare.append(buffer)
        if not self._bytes_in_use:
            del self._spare[_SPARE_BUFFERS:]
        self.changed.notify_all()


def _choose_buffer_size(limit: int) -> int:
    """Return the size of buffers for a limit in bytes: whole pages."""
    size = limit // MIN_BUFFERS // mmap.PAGESIZE * mmap.PAGESIZE
    return min(max(size, SMALL_BUFFER_SIZE), BUFFER_SIZE)
