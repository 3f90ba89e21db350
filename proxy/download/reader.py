"""What an answer reads a running download with.

    async with download.attach() as reader:
        await reader.wait_ready()          # upstream has answered; raises its no
        while offset < stop:
            part = await reader.next(offset, stop)
            ...                            # send as much of it as the client takes now
            offset += sent

`next` returns what may be sent from `offset` on, as one of two things:

- a `memoryview`: bytes that have arrived and are not in the file yet. **It is valid until the caller
  awaits anything**: send from it what the kernel takes at once, or copy it; then call `next` again
  from where the sending has stopped (by then the bytes may be in the file).
- a `FileRange(fd, start, stop)`: bytes of the file, `start == offset`. It is valid until `attach` ends.

Neither ever goes beyond what may be sent: the last byte of the blob is withheld until the digest is
verified. An empty `memoryview` is the end of a blob of unknown size. `next` raises the download's error;
the body then stays short. A blob that cannot be stored comes through the same calls.
"""

import sys
from copy import copy
from typing import TYPE_CHECKING

from proxy.download.pass_through import PassThrough
from proxy.errors import DigestMismatchError, UpstreamUnavailableError
from proxy.storage.blobs import FileRange

if TYPE_CHECKING:
    from proxy.download.download import Download

END = memoryview(b"")


class DownloadReader:
    """One reader of a download. Made by `Download.attach`."""

    def __init__(self, download: "Download") -> None:
        self._download = download
        # The attempt whose bytes this reader has been given.
        self._generation: int | None = None
        self._may_read_ahead: bool | None = None
        self._pass_through: PassThrough | None = None
        self._must_be_stored = False

    @property
    def size(self) -> int | None:
        """The size of the blob; None until upstream states it."""
        return self._download.size

    @property
    def upstream_name(self) -> str:
        """The upstream that the blob comes from."""
        return self._download.source.upstream_name

    @property
    def is_uncached(self) -> bool:
        """Whether the blob is passed through without being stored."""
        return self._download.has_stopped_storing

    async def wait_ready(self) -> None:
        """Wait until upstream has sent the first bytes. Raises what ended the download before."""
        download = self._download
        await download.wait_started()
        if download.error:
            raise copy(download.error)

    async def wait_verified(self) -> None:
        """Wait until the digest is verified, and the size known."""
        download = self._download
        while not download.is_verified:
            if download.error:
                raise copy(download.error)
            if download.has_stopped_storing:
                raise UpstreamUnavailableError(
                    "its size is not known and it is not stored; ask for it by HTTP/1.1"
                )
            await download.readable.wait()

    def require_stored(self) -> None:
        """Read several ranges: none of them ahead, and none by a transfer of its own.

        Each range of a blob that is not stored would cost upstream a transfer.
        """
        self._must_be_stored = True
        self._may_read_ahead = False

    async def next(self, offset: int, stop: int = sys.maxsize) -> memoryview | FileRange:
        """Return what may be sent from `offset` on, and before `stop`; see the module's docstring.

        A range that connections would reach only later is fetched before its turn.
        """
        download = self._download
        if self._may_read_ahead is None:
            self._may_read_ahead = download.is_read_ahead(offset, stop)
        while self._pass_through is None:
            if self._generation not in (None, download.generation):
                raise DigestMismatchError(f"{self.upstream_name} sent other content before")
            part = download.readable_part(offset, stop, may_include_last=self._may_read_ahead)
            if part:
                self._generation = download.generation
                return part
            if download.is_verified:
                return END
            if download.error:
                # Each reader raises its own: tracebacks and contexts are not for sharing.
                raise copy(download.error)
            if download.has_stopped_storing:
                self._pass_through = self._begin_pass_through(offset, stop)
            else:
                download.prioritize(offset, stop)
                await download.readable.wait()
        return await self._pass_through.next(offset)

    def _begin_pass_through(self, offset: int, stop: int) -> PassThrough:
        if self._must_be_stored:
            raise UpstreamUnavailableError(
                "it is not stored, so only one range at a time can be had; ask for each"
            )
        return PassThrough(self._download, offset, stop)

    async def close(self) -> None:
        """End a transfer of the reader's own."""
        if self._pass_through:
            await self._pass_through.close()
