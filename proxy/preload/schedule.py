"""The scheduled preloads (`[[preload]]` in the configuration), which keep images up to date."""

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path

from proxy.concurrency import run_in_thread, sleep_until
from proxy.config import PreloadSettings
from proxy.errors import ProxyError
from proxy.images.selection import ImageSelection
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.preload.events import ImageFailed
from proxy.preload.lists import MAX_CHARACTERS, ImageList, parse_list
from proxy.preload.preload import Preloader
from proxy.preload.report import PreloadRecord
from proxy.storage.records.trail import Act, AuditTrail
from proxy.upstream.offline import OfflineSwitch

# Share by which an interval varies at random, so that many caches do not all preload in one second.
JITTER = 0.1

log = get_logger(__name__)


class PreloadScheduler:
    """Runs the scheduled preloads.

    `get_preloader` is called for each run, as a reload replaces the preloader; `clock` is Unix
    time.
    """

    def __init__(
        self,
        get_preloader: Callable[[], Preloader],
        offline: OfflineSwitch,
        metrics: Metrics,
        executor: Executor,
        clock: Callable[[], float],
        trail: AuditTrail,
    ) -> None:
        self._get_preloader = get_preloader
        self._offline = offline
        self._metrics = metrics
        self._executor = executor
        self._clock = clock
        self._trail = trail
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, group: asyncio.TaskGroup, preloads: Iterable[PreloadSettings]) -> None:
        """Start these preloads as tasks of the group; cancel those of an earlier call."""
        for task in self._tasks:
            task.cancel()
        self._tasks = [
            group.create_task(self._run_periodically(f"preload[{number}]", settings))
            for number, settings in enumerate(preloads, 1)
        ]

    async def _run_periodically(self, name: str, settings: PreloadSettings) -> None:
        """Run a preload now and at each interval, never twice at once.

        An image that failed is tried again in the next run.
        """
        while True:
            started_at = self._clock()
            try:
                await self._run_preload(name, settings)
            except ProxyError as error:
                log.warning("preload_failed", preload=name, reason=str(error))
            except Exception:
                self._metrics.count_internal_error()
                log.exception("preload_crashed", preload=name)
            jitter = random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 (no secret)
            await sleep_until(started_at + settings.every * jitter, self._clock)

    async def _run_preload(self, name: str, settings: PreloadSettings) -> None:
        if self._offline:
            log.info("preload_skipped", preload=name, reason="this cache is offline")
            return
        selections = [ImageSelection(image, settings.platforms) for image in settings.images]
        if settings.file:
            selections += await self._read_selections(name, settings.file, settings.platforms)
        preloader = self._get_preloader()
        record = PreloadRecord(Act("preload", f"schedule {name}"), preloader.names)
        async for event in preloader.preload(selections, pin=settings.pin):
            if isinstance(event, ImageFailed):
                log.warning("preload_failed", preload=name, image=event.image, reason=event.reason)
            record.add(event)
        if record.failure:
            await self._trail.add(record.failure)
        if record.has_changes:
            await self._trail.add(record.act)

    async def _read_selections(
        self, name: str, file: str, platforms: Sequence[str]
    ) -> list[ImageSelection]:
        try:
            image_list = await run_in_thread(self._executor, _read_image_list, Path(file))
        except OSError as error:
            log.warning("preload_failed", preload=name, reason=f"{file}: {error.strerror}")
            return []
        for problem in image_list.problems:
            if problem.kind == "error":
                reason = f"{file}:{problem.line}: {problem.message}"
                log.warning("preload_failed", preload=name, reason=reason)
        return [
            ImageSelection(entry.reference, tuple(platforms) or entry.platforms)
            for entry in image_list.entries
        ]


def _read_image_list(path: Path) -> ImageList:
    with path.expanduser().open(encoding="utf-8", errors="replace") as file:
        return parse_list(file.read(MAX_CHARACTERS + 1))
