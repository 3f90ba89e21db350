"""The overview: how the cache is, what it saved, what is wrong, and what comes in just now."""

from collections import defaultdict
from contextlib import suppress
from datetime import date, timedelta

from proxy.errors import InvalidRequestError, ProxyError
from proxy.server.activity.downloads import DownloadStatus
from proxy.server.activity.recent_pulls import PullRecord
from proxy.server.admin.fleet import FleetState
from proxy.server.admin.status import DaemonStatus, OfflineState
from proxy.server.admin.traffic import TrafficSummary
from proxy.server.pages.page import Done, Model, PageRequest
from proxy.server.pages.views.connect import registry_address
from proxy.server.pages.views.problems import Problem, find_problems
from proxy.sizes import format_bytes

_SHOWN_DOWNLOADS = 20
_SHOWN_MEMBERS = 50
_CHART_DAYS = 30


async def show(request: PageRequest) -> Model:
    """Return the state of the daemon, its problems, traffic and downloads."""
    api = request.api
    status = await api.get("/api/v1/status", DaemonStatus)
    downloads = await api.get("/api/v1/downloads", list[DownloadStatus], limit=_SHOWN_DOWNLOADS)
    failed = await api.get("/api/v1/pulls", list[PullRecord], result="problems", limit=50)
    days: list[TrafficSummary] = []
    with suppress(ProxyError):  # the problem of the store says why
        days = await api.get("/api/v1/traffic", list[TrafficSummary], days=_CHART_DAYS)
    fleet: FleetState | None = None
    with suppress(InvalidRequestError):  # the node belongs to none
        fleet = await api.get("/api/v1/fleet", FleetState)
    problems = find_problems(status, failed, request.now)
    return {
        "status": status,
        "sentence": describe_state(status, problems),
        "problems": problems,
        "downloads": downloads,
        "fleet": fleet,
        "member_count": len(fleet.members) if fleet else 0,
        "members": fleet.members[:_SHOWN_MEMBERS] if fleet else [],
        "is_empty": not status.store.blobs and not downloads,
        "registry": registry_address(request.origin, status),
        "days": _sum_days(days, request.now),
    }


def describe_state(status: DaemonStatus, problems: list[Problem]) -> str:
    """Return the state of the cache in one sentence."""
    down = [one.name for one in status.upstreams if not one.up]
    match status.state:
        case "offline":
            return "Offline: cached images are served, and no registry is asked."
        case "degraded" if status.store.problem:
            return "Degraded: the store cannot be used."
        case "degraded":
            return f"Degraded: {', '.join(down)} cannot be reached; cached images are served."
        case _ if problems:
            return f"Serving, but {problems[0].title[:1].lower()}{problems[0].title[1:]}."
        case _:
            return "Serving, and nothing is wrong."


async def switch_offline(request: PageRequest) -> Done:
    """Go offline or online, until the daemon stops."""
    offline = request.form.get("offline") == "on"
    await request.api.put("/api/v1/offline", OfflineState, {"offline": offline})
    return Done("Offline: no registry is asked." if offline else "Online again.")


def _sum_days(days: list[TrafficSummary], now: float) -> list[dict[str, object]]:
    """Return the bytes that clients got on each day, the oldest first, for a chart."""
    sent: dict[str, int] = defaultdict(int)
    for one in days:
        sent[one.day] += one.sent_bytes
    if not sent:
        return []
    last = max(date.fromisoformat(max(sent)), date.fromtimestamp(now))  # noqa: DTZ012 (days are local)
    shown = [str(last - timedelta(number)) for number in reversed(range(_CHART_DAYS))]
    return [{"name": day, "value": sent[day], "text": format_bytes(sent[day])} for day in shown]
