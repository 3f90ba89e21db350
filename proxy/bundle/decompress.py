"""Compressed streams, recognised by their first bytes: zstd, gzip, or neither.

Decompressed in threads, a step at a time: however much a few bytes stand for, no more than one step
of it is in memory, and whoever takes the steps decides when it is too much.
"""

import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import Protocol

from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError

from proxy.concurrency import run_in_thread
from proxy.errors import BundleError

CHUNK_SIZE = 1 << 20

# 128 MiB, what `zstd --ultra -22` needs; `--long=31` would have us hold 2 GiB.
_MAX_WINDOW_LOG = 27

_MAGIC_SIZE = 4


class Decompressor(Protocol):
    """The interface that the standard library's decompressors have, from `bz2` to `zstd`."""

    @property
    def eof(self) -> bool:
        """Whether the stream has ended."""

    @property
    def needs_input(self) -> bool:
        """Whether there is no more output without more input."""

    @property
    def unused_data(self) -> bytes:
        """What came after the end of the stream."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Return at most `max_length` bytes; what is left of `data` is kept."""


class _GzipDecompressor:
    """`zlib` in the form of the others."""

    def __init__(self) -> None:
        self._decompressor = zlib.decompressobj(wbits=31)
        self._is_output_full = False

    @property
    def eof(self) -> bool:
        return self._decompressor.eof

    @property
    def needs_input(self) -> bool:
        return not self._is_output_full and not self._decompressor.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._decompressor.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        piece = self._decompressor.decompress(self._decompressor.unconsumed_tail + data, max_length)
        self._is_output_full = len(piece) == max_length
        return piece


def _make_zstd_decompressor() -> Decompressor:
    return ZstdDecompressor(options={DecompressionParameter.window_log_max: _MAX_WINDOW_LOG})


_FORMATS: tuple[tuple[bytes, Callable[[], Decompressor]], ...] = (
    (b"\x28\xb5\x2f\xfd", _make_zstd_decompressor),
    (b"\x1f\x8b\x08", _GzipDecompressor),
)


async def decompress(chunks: AsyncIterator[bytes], executor: Executor) -> AsyncIterator[bytes]:
    """Yield the content of a stream that may be compressed. Raises `BundleError` if it is damaged."""
    head = b""
    while len(head) < _MAGIC_SIZE and (chunk := await anext(chunks, b"")):
        head += chunk
    make = next((make for magic, make in _FORMATS if head.startswith(magic)), None)
    whole = _prepend(head, chunks)
    try:
        async for piece in _decompress_streams(whole, make, executor) if make else whole:
            yield piece
    except (ZstdError, zlib.error) as error:
        raise BundleError(f"the compressed bundle is damaged: {error}") from error


async def _prepend(head: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if head:
        yield head
    async for chunk in chunks:
        yield chunk


async def _decompress_streams(
    chunks: AsyncIterator[bytes], make_decompressor: Callable[[], Decompressor], executor: Executor
) -> AsyncIterator[bytes]:
    """Yield what the streams stand for that follow one another, as `zstd` and `gzip` take them."""
    stream = make_decompressor()
    async for chunk in chunks:
        data = chunk
        while data:
            if stream.eof:
                stream = make_decompressor()
            while data or not (stream.eof or stream.needs_input):
                piece = await run_in_thread(executor, stream.decompress, data, CHUNK_SIZE)
                data = b""
                if piece:
                    yield piece
            data = stream.unused_data
    if not stream.eof:
        raise BundleError(
            "the compressed bundle ends in its midst: it was cut, or a part is missing"
        )
