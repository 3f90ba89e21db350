"""Compression of bundles with zstd, for those that nothing else compresses."""

from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from contextlib import aclosing

from backports.zstd import CompressionParameter, ZstdCompressor

from proxy.concurrency import run_in_thread

# Layers are compressed already: a higher level would only take longer.
COMPRESSION_LEVEL = 3


async def compress(
    chunks: AsyncGenerator[bytes, None], executor: Executor
) -> AsyncGenerator[bytes, None]:
    """Yield the chunks compressed, each in a thread; the frame ends only if they all came."""
    options: dict[int, int] = {CompressionParameter.compression_level: COMPRESSION_LEVEL}
    compressor = ZstdCompressor(options=options)
    async with aclosing(chunks):
        async for chunk in chunks:
            if compressed := await run_in_thread(executor, compressor.compress, chunk):
                yield compressed
    yield await run_in_thread(executor, compressor.flush)
