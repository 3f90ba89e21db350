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
_MAX_PREFIXES = 8


class Source:
    """Bytes that come in chunks, taken in the amounts that a format has."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    async def some(self, limit: int) -> bytes:
        """Return at most `limit` bytes; none only at the end."""
        while not self._rest:
            try:
                self._rest = await anext(self._chunks)
            except StopAsyncIteration:
                return b""
        if len(self._rest) <= limit:
            taken, self._rest = self._rest, b""
        else:
            taken, self._rest = self._rest[:limit], self._rest[limit:]
        return taken

    async def exactly(self, size: int) -> bytes:
        """Return `size` bytes. Raises `BundleError` if there are fewer."""
        parts = bytearray()
        while len(parts) < size:
            taken = await self.some(size - len(parts))
            if not taken:
                raise BundleError("the archive ends in its midst: it was cut, or a part is missing")
            parts += taken
        return bytes(parts)


class TarStream:
    """The entries of an archive: `next_file`, then its `pieces`, or not. Both raise `BundleError`."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._source = Source(chunks)
        self._left = 0
        self._padding = 0
        self._entries = 0

    async def next_file(self) -> tar.Header | None:
        """Return the next file, past what is left of the last; None after the last one."""
        while True:
            async for _ in self.pieces():
                pass
            header = await self._next_header()
            if header is None:
                await self._check_end()
                return None
            self._entries += 1
            if self._entries > MAX_ENTRIES:
                raise BundleError(f"the archive has more than {MAX_ENTRIES} entries")
            if header.kind == "file":
                self._left, self._padding = header.size, tar.padding(header.size)
                return header

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield what is left of the file, as it comes."""
        while self._left:
            piece = await self._source.some(self._left)
            if not piece:
                raise BundleError("the archive ends in its midst: it was cut, or a part is missing")
            self._left -= len(piece)
            yield piece
        if self._padding:
            await self._source.exactly(self._padding)
            self._padding = 0

    async def _next_header(self) -> tar.Header | None:
        """Return the next header, with what extended headers before it say."""
        name, size = "", ""
        for _ in range(_MAX_PREFIXES):
            header = tar.parse_header(await self._source.exactly(tar.BLOCK))
            if header is None:
                return None
            if header.kind in ("file", "directory"):
                actual = tar.parse_size(size) if size else header.size
                return tar.Header(_normal(name or header.name), actual, header.kind)
            content = await self._source.exactly(header.size)
            await self._source.exactly(tar.padding(header.size))
            if header.kind == "name":
                name = tar.parse_name(content)
            else:
                records = tar.parse_pax(content)
                if records and header.kind == "global":
                    raise BundleError("a global header gives names or sizes to all entries")
                name, size = records.get("path", name), records.get("size", size)
        raise BundleError("too many extended headers in a row")

    async def _check_end(self) -> None:
        """Read what follows the first block of zeros: more of them, and not many."""
        seen = 0
        while piece := await self._source.some(_MAX_TRAILER):
            seen += len(piece)
            if seen > _MAX_TRAILER or piece.strip(b"\0"):
                raise BundleError("something follows the end of the archive")


def _normal(name: str) -> str:
    """Return the name without `./` before and `/` behind it. Raises `BundleError`."""
    name = name.removeprefix("./").rstrip("/")
    parts = name.split("/")
    if len(name) > tar.MAX_NAME or ".." in parts or name.startswith("/"):
        raise BundleError(f"an entry is named {name[:80]!r}, which leads out of the archive")
    return name
