"""A tar archive read as a stream: one entry after another, nothing unpacked to disk.

Entry names are compared but never used as paths. Everything held in memory, and everything skipped,
is bounded.
"""

import asyncio
from collections.abc import AsyncIterator

from proxy.errors import BundleError
from proxy.oci import tar

MAX_ENTRIES = 500_000
# Directories of an archive; an image layout has three.
MAX_DIRECTORIES = 10_000
# Bytes of all extended headers. Entries of an image layout need none.
MAX_EXTENDED_HEADERS_SIZE = 64 << 20
# Headers after which other tasks run: a compressed chunk may contain thousands.
_HEADERS_PER_TURN = 256
# Zeros after the end of the archive: GNU tar fills a record of 10 KiB, others a tape block.
_MAX_TRAILER = 1 << 20
# Extended headers in a row before one entry.
_MAX_EXTENDED_HEADERS = 8

_TRUNCATED = "the archive is truncated: its end or a part is missing"


class TarReader:
    """The files of an archive: call `next_file`, then `read_chunks` for its content, or not.

    Both raise `BundleError`.
    """

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._reader = ByteReader(chunks)
        self._remaining = 0
        self._padding = 0
        self._entry_count = 0
        self._directory_count = 0
        self._extended_size = 0

    async def next_file(self) -> tar.TarHeader | None:
        """Skip the rest of the current file and return the next one, or None at the end."""
        while True:
            async for _ in self.read_chunks():
                pass
            header = await self._read_header()
            if header is None:
                await self._check_trailer()
                return None
            self._entry_count += 1
            if self._entry_count > MAX_ENTRIES:
                raise BundleError(f"the archive has more than {MAX_ENTRIES} entries")
            if self._entry_count % _HEADERS_PER_TURN == 0:
                await asyncio.sleep(0)
            if header.kind == "file":
                self._remaining, self._padding = header.size, tar.padding_size(header.size)
                return header
            self._directory_count += 1
            if self._directory_count > MAX_DIRECTORIES:
                raise BundleError(f"the archive has more than {MAX_DIRECTORIES} directories")

    async def read_chunks(self) -> AsyncIterator[bytes]:
        """Yield the rest of the current file as it arrives."""
        while self._remaining:
            chunk = await self._reader.read(self._remaining)
            if not chunk:
                raise BundleError(_TRUNCATED)
            self._remaining -= len(chunk)
            yield chunk
        if self._padding:
            await self._reader.read_exactly(self._padding)
            self._padding = 0

    async def _read_header(self) -> tar.TarHeader | None:
        """Return the next header, with name and size from the extended headers before it."""
        name, size = "", ""
        for _ in range(_MAX_EXTENDED_HEADERS):
            header = tar.parse_header(await self._reader.read_exactly(tar.BLOCK_SIZE))
            if header is None:
                return None
            if header.kind in ("file", "directory"):
                actual_size = tar.parse_pax_size(size) if size else header.size
                return tar.TarHeader(_normalize_name(name or header.name), actual_size, header.kind)
            self._extended_size += tar.BLOCK_SIZE + header.size
            if self._extended_size > MAX_EXTENDED_HEADERS_SIZE:
                raise BundleError(
                    f"the archive has more than {MAX_EXTENDED_HEADERS_SIZE} bytes of extended headers"
                )
            content = await self._reader.read_exactly(header.size)
            await self._reader.read_exactly(tar.padding_size(header.size))
            if header.kind == "name":
                name = tar.parse_long_name(content)
            else:
                records = tar.parse_pax_records(content)
                if records and header.kind == "global":
                    raise BundleError("a global header sets the name or size of all entries")
                name, size = records.get("path", name), records.get("size", size)
        raise BundleError("too many extended headers in a row")

    async def _check_trailer(self) -> None:
        """Check that only zeros follow the first block of zeros, and not too many."""
        size = 0
        while chunk := await self._reader.read(_MAX_TRAILER):
            size += len(chunk)
            if size > _MAX_TRAILER or chunk.strip(b"\0"):
                raise BundleError("unexpected data after the end of the archive")


class ByteReader:
    """Reads exact amounts from chunks of any size."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = b""

    async def read(self, limit: int) -> bytes:
        """Return at most `limit` bytes; none only at the end."""
        while not self._buffer:
            try:
                self._buffer = await anext(self._chunks)
            except StopAsyncIteration:
                return b""
        # Most chunks are returned whole, without a copy.
        if len(self._buffer) <= limit:
            taken, self._buffer = self._buffer, b""
        else:
            taken, self._buffer = self._buffer[:limit], self._buffer[limit:]
        return taken

    async def read_exactly(self, size: int) -> bytes:
        """Return `size` bytes. Raises `BundleError` if there are fewer."""
        content = bytearray()
        while len(content) < size:
            taken = await self.read(size - len(content))
            if not taken:
                raise BundleError(_TRUNCATED)
            content += taken
        return bytes(content)


def _normalize_name(name: str) -> str:
    """Return the name without leading `./` and trailing `/`. Raises `BundleError`."""
    name = name.removeprefix("./").rstrip("/")
    parts = name.split("/")
    if len(name) > tar.MAX_NAME_SIZE or ".." in parts or name.startswith("/"):
        raise BundleError(f"the entry name {name[:80]!r} is too long or leads out of the archive")
    return name
