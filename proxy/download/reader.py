"""The reader through which a response gets the bytes of a running download.

    async with download.attach() as reader:
        await reader.wait_ready()          # upstream has answered; raises its error
        while offset < stop:
            part = await reader.next(offset, stop)
            ...                            # send as much of it as the client takes now
            offset += sent

`next` returns bytes from `offset` on that may be sent, in one of two forms:

- a `memoryview`: bytes that have arrived and are not in the file yet. **It is valid until the caller
  awaits anything**: send as much of it as the kernel takes at once, or copy it; then call `next` again
  at the first unsent byte (by then the bytes may be in the file).
- a `FileRange(fd, start, stop)`: bytes of the file, `start == offset`. It is valid until `attach` ends.

The last byte of the blob is withheld until the digest is verified. An empty `memoryview` marks the end of
a blob of unknown size. `next` raises the download's error, and the response body is then cut short. The
same calls read a blob that cannot be stored.
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
        # The attempt whose bytes this reader has returned.
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
    def path(self) -> tuple[str, ...]:
        """The nodes of the fleet that the bytes come through, this one first; empty without a fleet."""
        return self._download.source.path

    @property
    def is_from_peer(self) -> bool:
        """Whether another node of the fleet has sent bytes of the blob."""
        return self._download.source.origin == "peer"

    @property
    def is_uncached(self) -> bool:
        """Whether the blob is passed through without being stored."""
        return self._download.has_stopped_storing

    async def wait_ready(self) -> None:
        """Wait until upstream has sent the first bytes. Raises the error of a download that failed before."""
        download = self._download
        await download.wait_started()
        if download.error:
            raise copy(download.error)

    async def wait_verified(self) -> None:
        """Wait until the digest is verified, and the size known.

        Raises the download's error, and `UpstreamUnavailableError` if the blob is not being stored.
        """
        download = self._download
        while not download.is_verified:
            if download.error:
                raise copy(download.error)
            if download.has_stopped_storing:
                raise UpstreamUnavailableError(
                    "the size of this blob is unknown and it is not stored; request it with HTTP/1.1"
                )
            await download.readable.wait()

    def require_stored(self) -> None:
        """Disable reading ahead and passing through, for a response with several ranges.

        Without the store, each range would cost a transfer from upstream. `next` then raises
        `UpstreamUnavailableError` if the download stops storing.
        """
        self._must_be_stored = True
        self._may_read_ahead = False

    async def next(self, offset: int, stop: int = sys.maxsize) -> memoryview | FileRange:
        """Return bytes from `offset` up to `stop` at most; see the module's docstring.

        Waits until there are any. A range that the connections would reach later is fetched out of turn.
        """
        download = self._download
        if self._may_read_ahead is None:
            self._may_read_ahead = download.is_read_ahead(offset, stop)
        while self._pass_through is None:
            if self._generation not in (None, download.generation):
                raise DigestMismatchError(f"{self.upstream_name} sent wrong bytes before")
            part = download.readable_part(offset, stop, may_include_last=self._may_read_ahead)
            if part:
                self._generation = download.generation
                return part
            if download.is_verified:
                return END
            if download.error:
                # Each reader raises a copy, since exceptions collect tracebacks and contexts.
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
                "this blob is not stored, so request its ranges one at a time"
            )
        return PassThrough(self._download, offset, stop)

    async def close(self) -> None:
        """End the reader's own transfer, if it has one."""
        if self._pass_through:
            await self._pass_through.close()
