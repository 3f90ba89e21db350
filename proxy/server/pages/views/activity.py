"""Activity: who pulls what now, with which result, and why a pull failed; and a test pull."""

from collections.abc import Mapping

from proxy.server.activity.downloads import DownloadStatus
from proxy.server.activity.pull_test import PullTestResult, PullTestStep
from proxy.server.activity.recent_pulls import ClientRecord, PullRecord
from proxy.server.admin.upstreams import UpstreamDetail
from proxy.server.pages.page import JobLine, Model, NewJob, PageRequest
from proxy.sizes import format_bytes

# Rows of each table.
PAGE_SIZE = 50
# Seconds that a step must take so that its rate says something.
MIN_RATED_SECONDS = 0.05

RESULTS: Mapping[str, str] = {
    "problems": "Failed or refused",
    "hit": "Hit: all from the store",
    "partial": "Partial",
    "miss": "Miss: all from upstream",
    "stale": "Stale: not checked upstream",
}


async def show(request: PageRequest) -> Model:
    """Return downloads, recent pulls and clients."""
    query = {
        name: request.query.get(name, "").strip()
        for name in ("image", "client", "result", "before")
    }
    pulls = await request.api.get(
        "/api/v1/pulls",
        list[PullRecord],
        limit=PAGE_SIZE + 1,
        **{name: text for name, text in query.items() if text},
    )
    upstreams = await request.api.get("/api/v1/upstreams", list[UpstreamDetail])
    shown = pulls[:PAGE_SIZE]
    return {
        "query": query,
        "is_narrowed": any(query.values()),
        "results": RESULTS,
        "pulls": shown,
        "next": shown[-1].number if len(pulls) > PAGE_SIZE else None,
        "downloads": await request.api.get(
            "/api/v1/downloads", list[DownloadStatus], limit=PAGE_SIZE
        ),
        "clients": await request.api.get(
            "/api/v1/pulls/clients", list[ClientRecord], limit=PAGE_SIZE
        ),
        "troubled": [one for one in upstreams if not one.up or one.credentials_problem],
        "is_offline": any(one.offline for one in upstreams),
    }


async def test_pull(request: PageRequest) -> NewJob:
    """Pull an image as a client does."""
    image = request.form.get("image", "").strip()
    body = {
        "image": image,
        "platform": request.form.get("platform", "").strip(),
        "layers": request.form.get("layers") == "yes",
    }
    events = request.api.stream("POST", "/api/v1/pulls/test", body)
    return NewJob(f"Test pull of {image[:200]}", events, _describe, "/activity")


def _describe(event: object) -> JobLine | None:
    if isinstance(event, PullTestStep):
        rate = (
            f", {format_bytes(int(event.bytes / event.seconds))}/s"
            if event.seconds >= MIN_RATED_SECONDS
            else ""
        )
        return JobLine(
            f"{event.kind} {event.digest[:19]}: {event.state}, {format_bytes(event.bytes)} "
            f"in {event.seconds:.2f} s{rate}"
        )
    if not isinstance(event, PullTestResult):
        return None
    if event.problem:
        advice = f" What helps: {event.advice}." if event.advice else ""
        return JobLine(f"It failed after {event.seconds:.2f} s: {event.problem}.{advice}", "", True)
    return JobLine(
        f"It works: {event.image}{f' for {event.platform}' if event.platform else ''}, "
        f"{format_bytes(event.bytes)} in {event.seconds:.2f} s."
    )
