"""Decompression of bundles: zstd or gzip, recognised by their first bytes, or neither.

Each step runs in a thread and returns at most `CHUNK_SIZE`, so a decompression bomb cannot fill the
memory; the consumer limits the total. Streams that contain little or nothing are limited in number,
because each costs time.
"""

import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import Protocol

from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError

from proxy.concurrency import run_in_thread
from proxy.errors import BundleError

CHUNK_SIZE = 1 << 20

# A compressed bundle may consist of `MAX_SMALL_STREAMS` concatenated streams, and one more per `MIN_STREAM_SIZE`
# bytes of content. bgzip writes one stream per 64 KiB, pzstd two per few MiB.
MAX_SMALL_STREAMS = 1000
MIN_STREAM_SIZE = 4096

# 128 MiB, which `zstd --ultra -22` needs; `--long=31` would need 2 GiB.
_MAX_WINDOW_LOG = 27

_MAGIC_SIZE = 4


class Decompressor(Protocol):
    """The interface of the standard library's decompressors, from `bz2` to `zstd`."""

    @property
    def eof(self) -> bool:
        """Whether the stream has ended."""

    @property
    def needs_input(self) -> bool:
        """Whether more output takes more input."""

    @property
    def unused_data(self) -> bytes:
        """The input after the end of the stream."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Return at most `max_length` bytes, and keep the rest of `data` for the next call."""


class _GzipDecompressor:
    """Adapts `zlib`, which has another interface."""

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
        output = self._decompressor.decompress(
            self._decompressor.unconsumed_tail + data, max_length
        )
        self._is_output_full = len(output) == max_length
        return output


def _make_zstd_decompressor() -> Decompressor:
    return ZstdDecompressor(options={DecompressionParameter.window_log_max: _MAX_WINDOW_LOG})


_FORMATS: tuple[tuple[bytes, Callable[[], Decompressor]], ...] = (
    (b"\x28\xb5\x2f\xfd", _make_zstd_decompressor),
    (b"\x1f\x8b\x08", _GzipDecompressor),
)


async def decompress(chunks: AsyncIterator[bytes], executor: Executor) -> AsyncIterator[bytes]:
    """Yield the content of a stream, compressed or not. Raises `BundleError` if it is damaged."""
    head = b""
    while len(head) < _MAGIC_SIZE and (chunk := await anext(chunks, b"")):
        head += chunk
    stream = _prepend(head, chunks)
    make_decompressor = next((make for magic, make in _FORMATS if head.startswith(magic)), None)
    if make_decompressor:
        stream = _decompress_streams(stream, make_decompressor, executor)
    try:
        async for chunk in stream:
            yield chunk
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
    """Yield the content of one or more concatenated streams, as the `zstd` and `gzip` tools do."""
    decompressor = make_decompressor()
    stream_count, size = 1, 0
    async for chunk in chunks:
        data = chunk
        while data:
            if decompressor.eof:
                decompressor = make_decompressor()
                stream_count += 1
                if stream_count > MAX_SMALL_STREAMS + size // MIN_STREAM_SIZE:
                    raise BundleError(
                        f"the compressed bundle consists of more than {MAX_SMALL_STREAMS} streams "
                        "with little or no content"
                    )
            while data or not (decompressor.eof or decompressor.needs_input):
                output = await run_in_thread(executor, decompressor.decompress, data, CHUNK_SIZE)
                data = b""
                size += len(output)
                if output:
                    yield output
            data = decompressor.unused_data
    if not decompressor.eof:
        raise BundleError("the compressed bundle is truncated: its end or a part is missing")
