"""A tar archive as it comes: one entry after another, nothing kept, nothing unpacked.

Names are only compared: none of them ever becomes a path. The sizes of everything that is held in
memory, and of everything that nobody takes, are bounded.
"""

from collections.abc import AsyncIterator

from proxy.errors import BundleError
from proxy.oci import tar

MAX_ENTRIES = 500_000
# Zeros that may follow the end: GNU tar fills a record of 10 KiB, others a tape's.
_MAX_TRAILER = 1 << 20
# Extended headers in a row, before one entry.
_MAX_EXTENDED_HEADERS = 8


class ByteReader:
    """Bytes that come in chunks, taken in the amounts that a format has."""

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
        if len(self._buffer) <= limit:
            taken, self._buffer = self._buffer, b""
        else:
            taken, self._buffer = self._buffer[:limit], self._buffer[limit:]
        return taken

    async def read_exactly(self, size: int) -> bytes:
        """Return `size` bytes. Raises `BundleError` if there are fewer."""
        parts = bytearray()
        while len(parts) < size:
            taken = await self.read(size - len(parts))
            if not taken:
                raise BundleError("the archive ends in its midst: it was cut, or a part is missing")
            parts += taken
        return bytes(parts)


class TarReader:
    """The entries of an archive: `next_file`, then its `pieces`, or not. Both raise `BundleError`."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._reader = ByteReader(chunks)
        self._remaining = 0
        self._padding = 0
        self._entry_count = 0

    async def next_file(self) -> tar.TarHeader | None:
        """Return the next file, past what is left of the last; None after the last one."""
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
            if header.kind == "file":
                self._remaining, self._padding = header.size, tar.padding_size(header.size)
                return header

    async def read_chunks(self) -> AsyncIterator[bytes]:
        """Yield what is left of the file, as it comes."""
        while self._remaining:
            piece = await self._reader.read(self._remaining)
            if not piece:
                raise BundleError("the archive ends in its midst: it was cut, or a part is missing")
            self._remaining -= len(piece)
            yield piece
        if self._padding:
            await self._reader.read_exactly(self._padding)
            self._padding = 0

    async def _read_header(self) -> tar.TarHeader | None:
        """Return the next header, with what extended headers before it say."""
        name, size = "", ""
        for _ in range(_MAX_EXTENDED_HEADERS):
            header = tar.parse_header(await self._reader.read_exactly(tar.BLOCK_SIZE))
            if header is None:
                return None
            if header.kind in ("file", "directory"):
                actual = tar.parse_pax_size(size) if size else header.size
                return tar.TarHeader(_normalize_name(name or header.name), actual, header.kind)
            content = await self._reader.read_exactly(header.size)
            await self._reader.read_exactly(tar.padding_size(header.size))
            if header.kind == "name":
                name = tar.parse_long_name(content)
            else:
                records = tar.parse_pax_records(content)
                if records and header.kind == "global":
                    raise BundleError("a global header gives names or sizes to all entries")
                name, size = records.get("path", name), records.get("size", size)
        raise BundleError("too many extended headers in a row")

    async def _check_trailer(self) -> None:
        """Read what follows the first block of zeros: more of them, and not many."""
        seen = 0
        while piece := await self._reader.read(_MAX_TRAILER):
            seen += len(piece)
            if seen > _MAX_TRAILER or piece.strip(b"\0"):
                raise BundleError("something follows the end of the archive")


def _normalize_name(name: str) -> str:
    """Return the name without `./` before and `/` behind it. Raises `BundleError`."""
    name = name.removeprefix("./").rstrip("/")
    parts = name.split("/")
    if len(name) > tar.MAX_NAME_SIZE or ".." in parts or name.startswith("/"):
        raise BundleError(f"an entry is named {name[:80]!r}, which leads out of the archive")
    return name
