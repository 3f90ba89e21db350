"""Layers as archives: gzip, zstd or plain tar, read once from the front.

Runs in the worker. Nothing is written, and no name of an entry is ever used as a path: names are only
compared. Every count and size has a limit, because layers are strangers' files.
"""

import zlib
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError

from proxy.errors import LayerError

# Limits of one layer: bytes after decompression, and how many times as many as before it, once there are
# `MIN_RATIO_SIZE`; gzip reaches 1,032 with zeros only.
MAX_LAYER_SIZE = 64 << 30
MAX_LAYER_RATIO = 1000
MIN_RATIO_SIZE = 256 << 20
# Streams that are concatenated, beyond one per `MIN_LAYER_STREAM_SIZE` bytes of content: eStargz has one per file.
MAX_LAYER_STREAMS = 1_000_000
MAX_LAYER_ENTRIES = 1_000_000
MAX_PATH_LENGTH = 4096
# Bytes of an extended header. Attributes of files are there too.
MAX_LAYER_HEADER_SIZE = 1 << 20

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_CHUNK = 256 << 10
# `zstd --long=27`; more would not fit into the worker's memory.
_MAX_WINDOW_LOG = 27

EntryType = Literal["file", "directory", "hard link", "other"]
_TYPES: dict[bytes, EntryType] = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"5": "directory",
    b"1": "hard link",
}
_NO_CONTENT_TYPES = frozenset({b"1", b"2", b"3", b"4", b"5", b"6"})


class LayerEntry(NamedTuple):
    """An entry with a normalized path, `usr/bin/env`; the content is read with `LayerStream.read`."""

    path: str
    kind: EntryType
    size: int
    link: str


def normalize_path(name: str) -> str | None:
    """Return the path of an entry below the root; None if it leads out of it, or is the root."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if ".." in parts or not parts else "/".join(parts)


class LayerStream:
    """The decompressed bytes of a layer. Methods raise `LayerError`."""

    def __init__(self, file: BinaryIO) -> None:
        self._chunks = _decompress(file)
        self._buffer = b""
        self._position = 0
        self._size = 0

    @property
    def position(self) -> int:
        """The number of bytes that were read or skipped."""
        return self._size - len(self._buffer) + self._position

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        data = self._take(size)
        if len(data) == size:
            return data
        parts, left = [data], size - len(data)
        while left:
            self._next_chunk()
            parts.append(self._take(left))
            left -= len(parts[-1])
        return b"".join(parts)

    def skip(self, size: int) -> None:
        """Skip the next `size` bytes."""
        left = size - len(self._buffer) + self._position
        if left <= 0:
            self._position += size
            return
        while left > 0:
            self._next_chunk()
            left -= len(self._buffer)
        self._position = len(self._buffer) + left

    def is_at_end(self) -> bool:
        """Tell whether all bytes were read."""
        while self._position == len(self._buffer):
            try:
                self._next_chunk()
            except _EndOfLayerError:
                return True
        return False

    def _take(self, size: int) -> bytes:
        data = self._buffer[self._position : self._position + size]
        self._position += len(data)
        return data

    def _next_chunk(self) -> None:
        for chunk in self._chunks:
            self._buffer, self._position = chunk, 0
            self._size += len(chunk)
            return
        raise _EndOfLayerError("the layer is truncated: its end is missing")


class _EndOfLayerError(LayerError):
    """The layer has no more bytes."""


def _decompress(file: BinaryIO) -> Iterator[bytes]:
    head = file.read(_CHUNK)
    if head.startswith(b"\x1f\x8b"):
        chunks = _gunzip(file, head)
    elif head.startswith(b"\x28\xb5\x2f\xfd"):
        chunks = _unzstd(file, head)
    else:
        chunks = _read_plain(file, head)
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > MAX_LAYER_SIZE:
            raise LayerError(f"the layer has more than {MAX_LAYER_SIZE} bytes when decompressed")
        if size > MIN_RATIO_SIZE and size > MAX_LAYER_RATIO * file.tell():
            raise LayerError(f"the layer grows more than {MAX_LAYER_RATIO} times when decompressed")
        yield chunk


def _read_plain(file: BinaryIO, data: bytes) -> Iterator[bytes]:
    while data:
        yield data
        data = file.read(_CHUNK)


def _gunzip(file: BinaryIO, data: bytes) -> Iterator[bytes]:
    decoder = zlib.decompressobj(wbits=31)
    streams = 1
    try:
        while True:
            if decoder.eof:
                data = decoder.unused_data or file.read(_CHUNK)
                if not data.strip(b"\0"):
                    return  # padding
                decoder, streams = zlib.decompressobj(wbits=31), streams + 1
                _check_streams(streams)
            elif not data and not (data := file.read(_CHUNK)):
                raise LayerError("the layer is truncated: its gzip data has no end")
            output = decoder.decompress(data, _CHUNK)
            data = decoder.unconsumed_tail
            if output:
                yield output
    except zlib.error as error:
        raise LayerError(f"the layer is damaged: {error}") from error


def _unzstd(file: BinaryIO, data: bytes) -> Iterator[bytes]:
    options = {int(DecompressionParameter.window_log_max): _MAX_WINDOW_LOG}
    decoder, streams = ZstdDecompressor(options=options), 1
    try:
        while True:
            if decoder.eof:
                data = decoder.unused_data or file.read(_CHUNK)
                if not data:
                    return
                decoder, streams = ZstdDecompressor(options=options), streams + 1
                _check_streams(streams)
            elif decoder.needs_input and not data and not (data := file.read(_CHUNK)):
                raise LayerError("the layer is truncated: its zstd data has no end")
            output, data = decoder.decompress(data, _CHUNK), b""
            if output:
                yield output
    except ZstdError as error:
        raise LayerError(f"the layer is damaged: {error}") from error


def _check_streams(count: int) -> None:
    if count > MAX_LAYER_STREAMS:
        raise LayerError(f"the layer consists of more than {MAX_LAYER_STREAMS} streams")


def iter_entries(stream: LayerStream) -> Iterator[LayerEntry]:
    """Yield the entries of a layer; what is left of the content of each is skipped. Raises `LayerError`.

    The consumer reads the content of an entry, whole or not at all, before it asks for the next.
    Entries whose path leads out of the root are left out.
    """
    count = 0
    extended: dict[str, str] = {}
    while not stream.is_at_end():
        block = stream.read(_BLOCK)
        if block == _ZEROS:
            return
        count += 1
        if count > MAX_LAYER_ENTRIES:
            raise LayerError(f"the layer has more than {MAX_LAYER_ENTRIES} entries")
        _check_sum(block)
        size, kind = _parse_number(block[124:136]), block[156:157]
        if kind in (b"x", b"X", b"g", b"L", b"K"):
            _read_extended(stream, kind, size, extended)
            continue
        if kind == b"S" and block[482]:
            while stream.read(_BLOCK)[504]:  # maps of a sparse file in GNU's old format
                pass
        size = 0 if kind in _NO_CONTENT_TYPES else _content_size(size, extended)
        path = normalize_path(extended.get("path") or _header_name(block))
        link = normalize_path(extended.get("linkpath") or _text(block[157:257])) or ""
        is_sparse = kind == b"S" or any(key.startswith("GNU.sparse") for key in extended)
        entry_type = "other" if is_sparse else _TYPES.get(kind, "other")
        extended = {}
        end = stream.position + -(-size // _BLOCK) * _BLOCK
        if path is not None:
            yield LayerEntry(path, entry_type, size, link)
        stream.skip(end - stream.position)


def _read_extended(stream: LayerStream, kind: bytes, size: int, extended: dict[str, str]) -> None:
    """Read an extended header into `extended`: pax records, or a long name in GNU's format."""
    if size > MAX_LAYER_HEADER_SIZE:
        raise LayerError(f"the layer has an extended header of {size} bytes")
    content = stream.read(size)
    stream.skip(-size % _BLOCK)
    if kind in (b"L", b"K"):
        extended["path" if kind == b"L" else "linkpath"] = _text(content)
    elif kind != b"g":
        extended |= _parse_pax(content)


def _parse_pax(content: bytes) -> dict[str, str]:
    records, offset = {}, 0
    while offset < len(content):
        digits, _, _ = content[offset : offset + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = content[offset + len(digits) + 1 : offset + length]
        if (
            length <= len(digits) + 1
            or not record.endswith(b"\n")
            or offset + length > len(content)
        ):
            raise LayerError("the layer has a damaged extended header")
        key, _, value = record[:-1].partition(b"=")
        if key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse"):
            records[key.decode(errors="replace")[:100]] = _text(value)
        offset += length
    return records


def _content_size(size: int, extended: dict[str, str]) -> int:
    text = extended.get("size", "")
    if not text:
        return size
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise LayerError("the layer has an entry with an invalid size")
    return int(text)


def _header_name(block: bytes) -> str:
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0][:MAX_PATH_LENGTH].decode(errors="replace")


def _check_sum(block: bytes) -> None:
    expected = _parse_number(block[148:156])
    if expected != 256 + sum(block) - sum(block[148:156]):
        raise LayerError("the layer is no tar archive, or damaged: an invalid header")


def _parse_number(field: bytes) -> int:
    """Return a number in octal, or in GNU's binary form."""
    if field[0] & 0x80:
        number = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        if field[0] & 0x40 or number > MAX_LAYER_SIZE:
            raise LayerError("the layer has an entry with an invalid size")
        return number
    digits = field.partition(b"\0")[0].strip()
    if not all(48 <= digit < 56 for digit in digits):
        raise LayerError("the layer is no tar archive, or damaged: an invalid header")
    return int(digits, 8) if digits else 0
