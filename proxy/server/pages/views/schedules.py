"""Schedules: the preloads of the configuration, their last and next runs."""

from proxy.server.activity.schedules import ScheduleStatus
from proxy.server.pages.page import Done, Model, PageRequest


async def show(request: PageRequest) -> Model:
    """Return the schedules."""
    found = await request.api.get("/api/v1/schedules", list[ScheduleStatus])
    return {"schedules": found[:100]}


async def run(request: PageRequest) -> Done:
    """Run a schedule now."""
    body = {"name": request.form.get("name", "")}
    schedule = await request.api.post("/api/v1/schedules/run", ScheduleStatus, body)
    when = "runs again after this run" if schedule.running else "runs now"
    return Done(f"{schedule.name} {when}.")
