"""`/api/v1/schedules`: the scheduled preloads, their last and next runs."""

from collections.abc import Sequence

import msgspec

from proxy.preload.schedule import PreloadScheduler, Schedule
from proxy.server.admin.api import AdminRequest, RequestModel, Route
from proxy.timestamps import to_seconds


class RunScheduleRequest(RequestModel, frozen=True):
    """The schedule to run now."""

    name: str


class FailedImage(msgspec.Struct, frozen=True):
    """An image that is not complete after a run, and why."""

    image: str
    reason: str


class ScheduleStatus(msgspec.Struct, frozen=True):
    """A scheduled preload and its last run. Times are Unix time; `every` is in seconds, with jitter.

    `done` and `failed` count images of the run. `problem` is why a run did not take place, or what is
    wrong with its list.
    """

    name: str
    images: Sequence[str]
    file: str
    platforms: Sequence[str]
    pin: bool
    every: int
    running: bool
    started_at: int | None
    ended_at: int | None
    next_at: int | None
    total: int
    done: int
    failed: int
    fetched_bytes: int
    failures: Sequence[FailedImage]
    problem: str


def routes(scheduler: PreloadScheduler) -> list[Route]:
    """Return the routes."""

    async def list_schedules(_request: AdminRequest) -> list[ScheduleStatus]:
        return [_describe(one) for one in scheduler.schedules]

    async def run(request: AdminRequest) -> ScheduleStatus:
        name = (await request.read_json(RunScheduleRequest)).name
        return _describe(scheduler.run_now(name))

    return [
        Route("GET", "/api/v1/schedules", list_schedules),
        Route("POST", "/api/v1/schedules/run", run),
    ]


def _describe(schedule: Schedule) -> ScheduleStatus:
    settings = schedule.settings
    return ScheduleStatus(
        name=schedule.name,
        images=settings.images,
        file=settings.file,
        platforms=settings.platforms,
        pin=settings.pin,
        every=int(settings.every),
        running=schedule.is_running,
        started_at=to_seconds(schedule.started_at),
        ended_at=to_seconds(schedule.ended_at),
        next_at=to_seconds(schedule.next_at),
        total=schedule.images,
        done=schedule.done,
        failed=schedule.failed,
        fetched_bytes=schedule.fetched,
        failures=[FailedImage(*one) for one in schedule.failures.items()],
        problem=schedule.problem,
    )
