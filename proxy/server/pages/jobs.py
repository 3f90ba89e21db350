"""Jobs: operations that take long, started by a page and shown on a page of their own."""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from proxy.errors import NotFoundError, ProxyError, TooManyRequestsError
from proxy.server.pages.page import JobLine, NewJob

# Jobs that run at a time, and that are remembered.
MAX_RUNNING_JOBS = 8
MAX_JOBS = 64
# The last lines of a job that are kept.
MAX_JOB_LINES = 100

JobState = Literal["running", "done", "failed", "cancelled"]


class JobLineView(msgspec.Struct, frozen=True):
    """A line of a job: a `JobLine` without its key."""

    text: str
    is_problem: bool
    share: float | None
    image: str


class JobView(msgspec.Struct, frozen=True):
    """A job as its page shows it; `lines` are the last ones, times are Unix time."""

    id: str
    title: str
    back: str
    state: JobState
    error: str
    started: int
    ended: int | None
    events: int
    lines: list[JobLineView]


@dataclass(eq=False)
class _Job:
    new: NewJob
    started: float
    state: JobState = "running"
    error: str = ""
    ended: float | None = None
    events: int = 0
    lines: OrderedDict[str, JobLine] = field(default_factory=OrderedDict)
    task: asyncio.Task[None] | None = None

    def add(self, line: JobLine) -> None:
        self.lines[line.key or f"#{self.events}"] = line
        while len(self.lines) > MAX_JOB_LINES:
            self.lines.popitem(last=False)


class JobRunner:
    """Runs jobs in a group of tasks, and remembers the last ones."""

    def __init__(
        self, group: asyncio.TaskGroup, to_proxy_error: Callable[[Exception], ProxyError]
    ) -> None:
        self._group = group
        self._to_proxy_error = to_proxy_error
        self._jobs: OrderedDict[str, _Job] = OrderedDict()

    def start(self, new: NewJob) -> str:
        """Start a job; return its id. Raises `TooManyRequestsError`."""
        if sum(job.state == "running" for job in self._jobs.values()) >= MAX_RUNNING_JOBS:
            raise TooManyRequestsError(
                f"{MAX_RUNNING_JOBS} jobs are running; wait until one has ended"
            )
        job, job_id = _Job(new, time.time()), secrets.token_urlsafe(8)
        self._jobs[job_id] = job
        job.task = self._group.create_task(self._run(job))
        for old_id in [key for key, one in self._jobs.items() if one.state != "running"]:
            if len(self._jobs) <= MAX_JOBS:
                break
            del self._jobs[old_id]
        return job_id

    def view(self, job_id: str) -> JobView:
        """Return a job. Raises `NotFoundError`."""
        job = self._find(job_id)
        return JobView(
            job_id,
            job.new.title,
            job.new.back,
            job.state,
            job.error,
            int(job.started),
            int(job.ended) if job.ended else None,
            job.events,
            [
                JobLineView(one.text, one.is_problem, one.share, one.image)
                for one in job.lines.values()
            ],
        )

    def running(self) -> list[JobView]:
        """Return the jobs that run, the latest first."""
        return [
            self.view(job_id)
            for job_id, job in reversed(self._jobs.items())
            if job.state == "running"
        ]

    def cancel(self, job_id: str) -> None:
        """Cancel a job. Raises `NotFoundError`."""
        task = self._find(job_id).task
        if task:
            task.cancel()

    def _find(self, job_id: str) -> _Job:
        if (job := self._jobs.get(job_id)) is None:
            raise NotFoundError("there is no such job; the daemon forgets old ones")
        return job

    async def _run(self, job: _Job) -> None:
        try:
            async with aclosing(job.new.events) as events:
                async for event in events:
                    job.events += 1
                    if line := job.new.describe(event):
                        job.add(line)
            job.state = "done"
        except asyncio.CancelledError:
            job.state = "cancelled"
            raise
        except Exception as error:  # noqa: BLE001 (a bug must not end the daemon)
            job.state, job.error = "failed", str(self._to_proxy_error(error))
        finally:
            job.ended = time.time()
