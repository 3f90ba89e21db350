"""The downloads that run, at most one a digest."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from copy import copy
from dataclasses import replace

from proxy.concurrency import run_uncancelled
from proxy.config import FetchSettings
from proxy.download.download import Download, DownloadDeps, NotStoring
from proxy.download.queue import DownloadQueue
from proxy.errors import DigestMismatchError, ProxyError
from proxy.lru import TTLCache
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.tracing import span
from proxy.upstream.client import Upstream

# A blob that came wrong twice in a row is not asked for again within so many seconds.
MISMATCH_BACKOFF = 10.0


class DownloadManager:
    """Starts downloads and finds those that run. They are tasks of `group`, not of a request."""

    def __init__(
        self,
        deps: DownloadDeps,
        upstreams: Mapping[str, Upstream],
        group: asyncio.TaskGroup,
    ) -> None:
        self._deps = deps
        self._upstreams = upstreams
        self._group = group
        self._running: dict[Digest, Download] = {}
        self._tasks: dict[Digest, asyncio.Task[None]] = {}
        self._attached_counts: Counter[Download] = Counter()
        self._mismatch_counts: TTLCache[tuple[Repository, Digest], int]
        self._mismatch_counts = TTLCache(1000, asyncio.get_running_loop().time)

    def with_settings(
        self, settings: FetchSettings, upstreams: Mapping[str, Upstream]
    ) -> "DownloadManager":
        """Return these downloads, with other settings and upstreams for those that start from there.

        What runs is the same for both, and goes on as it began.
        """
        other = copy(self)
        other._deps = replace(self._deps, settings=settings)  # noqa: SLF001 (our own)
        other._upstreams = upstreams  # noqa: SLF001 (our own)
        return other

    @property
    def queue(self) -> DownloadQueue:
        """What lets so many of them run at once."""
        return self._deps.queue

    def __len__(self) -> int:
        return len(self._running)

    def get(self, digest: Digest) -> Download | None:
        """Return the download of `digest` if one runs."""
        return self._running.get(digest)

    async def wait_first_byte(self, digest: Digest) -> Download | None:
        """Return the download of `digest` once it has bytes; None if none runs, or none gets so far.

        Somebody else's download may be of what their repository does not even hold.
        """
        while download := self._running.get(digest):
            # As a reader: what was only announced becomes urgent.
            download.add_reader()
            try:
                with suppress(ProxyError, NotStoring):
                    await download.wait_readable(0)
            finally:
                download.remove_reader()
            # While it runs its file is open, for who counts as a reader before anything else happens.
            if self._running.get(digest) is download:
                return download
        return None

    def start(self, repository: Repository, digest: Digest, *, is_urgent: bool = True) -> Download:
        """Start the download of a blob that none runs for; the urgent ones go first.

        Raises `DigestMismatchError` while upstream has just sent wrong bytes for it, twice.
        """
        age, wrong = self._mismatch_counts.get_with_age((repository, digest)) or (0.0, 0)
        if wrong > 1 and age < MISMATCH_BACKOFF:
            raise DigestMismatchError(
                f"{repository.upstream} keeps sending wrong bytes for {digest}"
            )
        upstream = self._upstreams[repository.upstream]
        download = Download(self._deps, upstream, repository, digest, is_urgent=is_urgent)
        self._running[digest] = download
        # What was abandoned may still be closing its files, which are the same.
        before = self._tasks.get(digest)
        self._tasks[digest] = self._group.create_task(self._run(download, before))
        return download

    @asynccontextmanager
    async def attach(self, repository: Repository, digest: Digest) -> AsyncIterator[Download]:
        """Yield the download of a blob; one that is begun for this comes behind what clients wait for.

        It is abandoned, to be resumed, when the last who follows it leaves and no client has asked for it.
        Raises `DigestMismatchError` as `start` does.
        """
        download = self._running.get(digest)
        if download is None:
            download = self.start(repository, digest, is_urgent=False)
            self._attached_counts[download] = 0
        is_counted = download in self._attached_counts
        if is_counted:
            self._attached_counts[download] += 1
        try:
            yield download
        finally:
            if is_counted:
                self._attached_counts[download] -= 1
                if not self._attached_counts[download]:
                    del self._attached_counts[download]
                    await self._abandon(download)

    async def _abandon(self, download: Download) -> None:
        """End a download that nobody waits for, and wait until what it has is kept."""
        if self._running.get(download.digest) is not download or download.is_requested:
            return
        # From now on nobody finds it: who asks begins anew, behind it.
        del self._running[download.digest]
        task = self._tasks[download.digest]
        task.cancel()
        await run_uncancelled(asyncio.wait((task,)))
        if self._tasks.get(download.digest) is task:  # it had not even begun
            del self._tasks[download.digest]

    async def _run(self, download: Download, predecessor: asyncio.Task[None] | None) -> None:
        digest = download.digest
        try:
            with span("download") as noted:
                noted["pullcache.digest"] = str(digest)
                await download.run(predecessor)
                noted["pullcache.bytes"] = download.bytes_present
                if download.error:
                    noted["error.type"] = type(download.error).__qualname__
        finally:
            if self._running.get(digest) is download:
                del self._running[digest]
            if self._tasks.get(digest) is asyncio.current_task():
                del self._tasks[digest]
        # What one repository's upstream sends says nothing of another's.
        key = (download.repository, download.digest)
        if isinstance(download.error, DigestMismatchError):
            _, wrong = self._mismatch_counts.get_with_age(key) or (0.0, 0)
            self._mismatch_counts.set(key, wrong + 1)
        elif not download.error:
            self._mismatch_counts.discard(key)
