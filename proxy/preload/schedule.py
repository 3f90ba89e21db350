"""The scheduled preloads (`[[preload]]` in the configuration), which keep images up to date."""

import asyncio
import hashlib
import random
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

from proxy.concurrency import background, run_in_thread, sleep_until
from proxy.config import PreloadSettings
from proxy.errors import NotFoundError, ProxyError
from proxy.fleet.directory import Directory
from proxy.images.selection import ImageSelection
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.preload.events import ImageDone, ImageFailed, PreloadEvent
from proxy.preload.lists import MAX_CHARACTERS, ImageList, parse_list
from proxy.preload.preload import Preloader
from proxy.preload.report import PreloadRecord
from proxy.storage.records.trail import Act, AuditTrail
from proxy.upstream.offline import OfflineSwitch

# Share by which an interval varies at random, so that many caches do not all preload in one second.
JITTER = 0.1

# Failed images that are named of a run.
MAX_NAMED_FAILURES = 20

log = get_logger(__name__)


@dataclass(eq=False)
class Schedule:
    """A scheduled preload, and its last run. Times are Unix time, None if there is none.

    `done` and `failed` count images of the run, `failures` says why. `problem` is why a run did not take place,
    or what is wrong with its list.
    """

    name: str
    settings: PreloadSettings
    is_running: bool = False
    started_at: float | None = None
    ended_at: float | None = None
    next_at: float | None = None
    images: int = 0
    done: int = 0
    fetched: int = 0
    failed: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    problem: str = ""
    wanted: asyncio.Event = field(default_factory=asyncio.Event)

    def begin(self, now: float) -> None:
        """Record the begin of a run."""
        self.is_running, self.started_at, self.ended_at = True, now, None
        self.images = self.done = self.fetched = self.failed = 0
        self.failures, self.problem = {}, ""
        self.wanted.clear()

    def add(self, event: PreloadEvent) -> None:
        """Add an event of the run."""
        if isinstance(event, ImageDone):
            self.done += 1
            self.fetched += event.fetched
        elif isinstance(event, ImageFailed):
            self.failed += 1
            if len(self.failures) < MAX_NAMED_FAILURES:
                self.failures[event.image] = event.reason


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
        directory: Directory,
    ) -> None:
        self._get_preloader = get_preloader
        self._offline = offline
        self._metrics = metrics
        self._executor = executor
        self._clock = clock
        self._trail = trail
        self._directory = directory
        self._tasks: list[asyncio.Task[None]] = []
        self.schedules: list[Schedule] = []

    def start(self, group: asyncio.TaskGroup, preloads: Iterable[PreloadSettings]) -> None:
        """Start these preloads as tasks of the group; cancel those of an earlier call."""
        for task in self._tasks:
            task.cancel()
        self.schedules = [
            Schedule(f"preload[{number}]", settings) for number, settings in enumerate(preloads, 1)
        ]
        self._tasks = [group.create_task(self._run_periodically(one)) for one in self.schedules]

    def run_now(self, name: str) -> Schedule:
        """Start the next run of a schedule now, or right after the one that runs. Raises `NotFoundError`."""
        for schedule in self.schedules:
            if schedule.name == name:
                schedule.wanted.set()
                return schedule
        raise NotFoundError(
            f"there is no schedule {name[:40]}; [[preload]] in the configuration is"
        )

    async def _run_periodically(self, schedule: Schedule) -> None:
        """Run a preload now and at each interval, never twice at once.

        An image that failed is tried again in the next run.
        """
        name = schedule.name
        while True:
            started_at = self._clock()
            jitter = random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 (no secret)
            schedule.next_at = started_at + schedule.settings.every * jitter
            run = self._run_preload if schedule.wanted.is_set() else self._lead_preload
            schedule.begin(started_at)
            try:
                await run(schedule)
            except ProxyError as error:
                schedule.problem = str(error)
                log.warning("preload_failed", preload=name, reason=str(error))
            except Exception:
                schedule.problem = "internal error; see the daemon's log"
                self._metrics.count_internal_error()
                log.exception("preload_crashed", preload=name)
            schedule.is_running, schedule.ended_at = False, self._clock()
            await self._wait_for_next(schedule)

    async def _wait_for_next(self, schedule: Schedule) -> None:
        assert schedule.next_at is not None
        async with (
            background(sleep_until(schedule.next_at, self._clock)) as due,
            background(schedule.wanted.wait()) as wanted,
        ):
            await asyncio.wait((due, wanted), return_when=asyncio.FIRST_COMPLETED)

    async def _lead_preload(self, schedule: Schedule) -> None:
        """Run a preload, unless another node of the fleet has begun it in this interval."""
        settings = schedule.settings
        # The others begin theirs up to a tenth of the interval earlier or later.
        keep = settings.every * (1 - 2 * JITTER)
        job = f"{schedule.name} {_fingerprint(settings)}"
        async with self._directory.lead(job, keep) as is_leader:
            if is_leader:
                await self._run_preload(schedule)
            else:
                schedule.problem = "skipped: another node of the fleet does it"
                log.info("preload_skipped", preload=schedule.name, reason=schedule.problem[9:])

    async def _run_preload(self, schedule: Schedule) -> None:
        name, settings = schedule.name, schedule.settings
        if self._offline:
            schedule.problem = "skipped: this cache is offline"
            log.info("preload_skipped", preload=name, reason="this cache is offline")
            return
        selections = [ImageSelection(image, settings.platforms) for image in settings.images]
        if settings.file:
            selections += await self._read_selections(schedule)
        schedule.images = len(selections)
        preloader = self._get_preloader()
        record = PreloadRecord(Act("preload", f"schedule {name}"), preloader.names)
        async for event in preloader.preload(selections, pin=settings.pin):
            if isinstance(event, ImageFailed):
                log.warning("preload_failed", preload=name, image=event.image, reason=event.reason)
            schedule.add(event)
            record.add(event)
        if record.failure:
            await self._trail.add(record.failure)
        if record.has_changes:
            await self._trail.add(record.act)

    async def _read_selections(self, schedule: Schedule) -> list[ImageSelection]:
        name, file, platforms = schedule.name, schedule.settings.file, schedule.settings.platforms
        try:
            image_list = await run_in_thread(self._executor, _read_image_list, Path(file))
        except OSError as error:
            schedule.problem = f"{file}: {error.strerror}"
            log.warning("preload_failed", preload=name, reason=schedule.problem)
            return []
        for problem in image_list.problems:
            if problem.kind == "error":
                reason = f"{file}:{problem.line}: {problem.message}"
                schedule.problem = schedule.problem or reason
                log.warning("preload_failed", preload=name, reason=reason)
        return [
            ImageSelection(entry.reference, tuple(platforms) or entry.platforms)
            for entry in image_list.entries
        ]


def _fingerprint(settings: PreloadSettings) -> str:
    """Return what differs if schedules with the same number on two nodes are not the same."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def _read_image_list(path: Path) -> ImageList:
    with path.expanduser().open(encoding="utf-8", errors="replace") as file:
        return parse_list(file.read(MAX_CHARACTERS + 1))
