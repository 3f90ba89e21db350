"""The downloads under way, with their rates."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import msgspec

from proxy.download.download import Download
from proxy.download.manager import DownloadManager
from proxy.names import display_name

# Downloads in one answer.
MAX_LISTED_DOWNLOADS = 1000
# A rate is that of the last seconds: between these bounds, as often as it is asked for.
MIN_RATE_WINDOW = 0.5
RATE_WINDOW = 5.0

DownloadPhase = Literal["waiting", "downloading", "verifying"]


class DownloadStatus(msgspec.Struct, frozen=True):
    """A blob that comes from upstream.

    `size` is None until upstream states it; `received` includes the `resumed` bytes of an earlier
    download. `rate` is in bytes a second, None before it is known. `readers` are the responses that wait for its
    bytes, `clients` the addresses that asked for it; without any it is a prefetch or a preload.
    """

    upstream: str
    repository: str
    digest: str
    phase: DownloadPhase
    size: int | None
    received: int
    resumed: int
    rate: int | None
    seconds: float
    readers: int
    clients: Sequence[str]


class DownloadMonitor:
    """Lists the running downloads of a manager, and measures their rates between the calls."""

    def __init__(self, downloads: DownloadManager) -> None:
        self._downloads = downloads
        self._samples: WeakKeyDictionary[Download, deque[tuple[float, int]]]
        self._samples = WeakKeyDictionary()
        self._now = asyncio.get_running_loop().time

    def list_downloads(self, limit: int = MAX_LISTED_DOWNLOADS) -> list[DownloadStatus]:
        """Return the downloads, those that clients wait for first, then the oldest first."""
        running = sorted(self._downloads.running(), key=lambda one: not one.is_requested)
        return [self._describe(one) for one in running[:limit]]

    def _describe(self, download: Download) -> DownloadStatus:
        phase: DownloadPhase = "downloading"
        if download.is_waiting:
            phase = "waiting"
        elif download.size is not None and download.is_received:
            phase = "verifying"
        return DownloadStatus(
            upstream=download.source.upstream_name,
            repository=display_name(download.repository),
            digest=str(download.digest),
            phase=phase,
            size=download.size,
            received=download.bytes_present,
            resumed=download.bytes_resumed,
            rate=self._measure(download),
            seconds=round(self._now() - download.created_at, 1),
            readers=download.reader_count,
            clients=download.ticket.clients[:10],
        )

    def _measure(self, download: Download) -> int | None:
        """Return the bytes a second since an earlier call, or since the download began."""
        now, received = self._now(), download.bytes_present
        samples = self._samples.setdefault(download, deque([(download.created_at, 0)]))
        while len(samples) > 1 and now - samples[1][0] >= RATE_WINDOW:
            samples.popleft()
        at, before = samples[0]
        before = max(before, download.bytes_resumed)
        if now - samples[-1][0] >= MIN_RATE_WINDOW:
            samples.append((now, received))
        if now - at < MIN_RATE_WINDOW or received < before:  # it has started over
            return None
        return int((received - before) / (now - at))
