"""Passing through a blob that cannot be stored: each reader fetches the rest in its own transfer."""

import asyncio
import random
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from proxy.errors import OfflineError, UpstreamDownError, UpstreamUnavailableError
from proxy.upstream.body import BlobBody
from proxy.upstream.network import retry

if TYPE_CHECKING:
    from proxy.download.download import Download

# Small, as there may be thousands of readers, each with a buffer.
_BUFFER_SIZE = 64 << 10


class PassThrough:
    """The bytes from `start` up to `stop`, hashed as they arrive.

    The last byte of the blob is withheld until the digest is verified.
    """

    def __init__(self, download: "Download", start: int, stop: int) -> None:
        self._parts = _fetch(download, start, stop)
        self._part = memoryview(b"")
        self._offset = start

    async def next(self, offset: int) -> memoryview:
        """Return the bytes at `offset`, which only moves forward; an empty view at the end.

        The view is valid until the next call. Raises `DigestMismatchError` and `UpstreamError`.
        """
        self._part = self._part[offset - self._offset :]
        self._offset = offset
        if not self._part:
            self._part = await anext(self._parts, memoryview(b""))
        return self._part

    async def close(self) -> None:
        """End the transfer."""
        await self._parts.aclose()


async def _fetch(download: "Download", start: int, stop: int) -> AsyncGenerator[memoryview, None]:
    """Yield the bytes from `start` up to `stop`; each part is valid until the next step."""
    source = download.source
    # All unhashed bytes are fetched, including any before `start`.
    hasher, position = download.copy_hasher(), download.hashed
    buffer = memoryview(bytearray(_BUFFER_SIZE))
    withheld = b""
    async with AsyncExitStack() as stack:
        body = await _open_with_retries(download, position, stack)
        if download.size is None:
            download.size = body.size
        is_tail = stop in (sys.maxsize, download.size)
        await source.skip_to(body, position)
        while count := await source.read_into(body, buffer):
            hasher.update(buffer[:count])
            data = buffer[max(0, start - position) : min(count, max(0, stop - position))]
            position += count
            if is_tail and data:
                data, withheld = memoryview(withheld + data[:-1]), bytes(data[-1:])
            if data:
                yield data
            if not is_tail and position >= stop:
                return
    if not download.digest.matches(hasher):
        raise source.record_mismatch()
    if withheld:
        yield memoryview(withheld)


async def _open_with_retries(
    download: "Download", position: int, stack: AsyncExitStack
) -> BlobBody:
    """Open the blob at `position`; repeat what fails before the first byte, such as an expired URL."""
    pauses = retry.backoff_delays(download.settings.attempts, iter(random.random, None))
    while True:
        try:
            return await stack.enter_async_context(download.source.open(position))
        except UpstreamUnavailableError as error:
            pause = next(pauses, None)
            if pause is None or isinstance(error, OfflineError | UpstreamDownError):
                raise
            download.source.record_retry(position, error)
        await asyncio.sleep(pause)
