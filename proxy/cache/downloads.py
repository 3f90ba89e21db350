"""The downloads that run, at most one a digest."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from dataclasses import replace

from proxy.cache.download import Detached, Download, Tools
from proxy.cache.memory import Expiring
from proxy.cache.slots import Slots
from proxy.config import FetchSettings
from proxy.errors import DigestMismatchError, ProxyError
from proxy.oci.digest import Digest
from proxy.storage.tables import Repository
from proxy.upstream.client import Upstream

# A blob that came wrong twice in a row is not asked for again within so many seconds.
MISMATCH_MEMORY = 10.0


class Downloads:
    """Starts downloads and finds those that run. They are tasks of `group`, not of a request."""

    def __init__(
        self,
        tools: Tools,
        upstreams: Mapping[str, Upstream],
        group: asyncio.TaskGroup,
    ) -> None:
        self._tools = tools
        self._upstreams = upstreams
        self._group = group
        self._running: dict[Digest, Download] = {}
        self._mismatches: Expiring[tuple[Repository, Digest], int]
        self._mismatches = Expiring(1000, asyncio.get_running_loop().time)

    def renewed(self, settings: FetchSettings, upstreams: Mapping[str, Upstream]) -> "Downloads":
        """Return these downloads, with other settings and upstreams for those that start from there.

        What runs is the same for both, and goes on as it began.
        """
        other = copy(self)
        other._tools = replace(self._tools, settings=settings)  # noqa: SLF001 (our own)
        other._upstreams = upstreams  # noqa: SLF001 (our own)
        return other

    @property
    def slots(self) -> Slots:
        """What lets so many of them run at once."""
        return self._tools.slots

    def __len__(self) -> int:
        return len(self._running)

    def find(self, digest: Digest) -> Download | None:
        """Return the download of `digest` if one runs."""
        return self._running.get(digest)

    async def find_begun(self, digest: Digest) -> Download | None:
        """Return the download of `digest` once it has bytes; None if none runs, or none gets so far.

        Somebody else's download may be of what their repository does not even hold.
        """
        while download := self._running.get(digest):
            # As a reader: what was only announced becomes urgent.
            download.acquire()
            try:
                with suppress(ProxyError, Detached):
                    await download.available(0)
            finally:
                download.release()
            # While it runs its file is open, for who counts as a reader before anything else happens.
            if self._running.get(digest) is download:
                return download
        return None

    def start(self, repository: Repository, digest: Digest, *, is_urgent: bool = True) -> Download:
        """Start the download of a blob that none runs for; the urgent ones go first.

        Raises `DigestMismatchError` while upstream has just sent wrong bytes for it, twice.
        """
        age, wrong = self._mismatches.get((repository, digest)) or (0.0, 0)
        if wrong > 1 and age < MISMATCH_MEMORY:
            raise DigestMismatchError(
                f"{repository.upstream} keeps sending wrong bytes for {digest}"
            )
        upstream = self._upstreams[repository.upstream]
        download = Download(self._tools, upstream, repository, digest, is_urgent=is_urgent)
        self._running[digest] = download
        self._group.create_task(self._run(download))
        return download

    async def _run(self, download: Download) -> None:
        try:
            await download.run()
        finally:
            del self._running[download.digest]
        # What one repository's upstream sends says nothing of another's.
        key = (download.repository, download.digest)
        if isinstance(download.error, DigestMismatchError):
            _, wrong = self._mismatches.get(key) or (0.0, 0)
            self._mismatches.put(key, wrong + 1)
        elif not download.error:
            self._mismatches.drop(key)
