"""Unplug: could these images be pulled without a network? Fetch what is missing, and carry bundles."""

from urllib.parse import quote

from proxy.bundle.import_ import ImportReport
from proxy.errors import InvalidRequestError
from proxy.images.check import ImageCheck
from proxy.server.admin.api import ByteStream
from proxy.server.admin.preload import ParsedList
from proxy.server.admin.status import DaemonStatus
from proxy.server.pages.page import ActionResult, Done, Model, NewJob, PageRequest, View
from proxy.server.pages.views.preload_lines import PreloadLines
from proxy.sizes import format_bytes

# Rows of a checked list.
PAGE_SIZE = 100
# A list whose link is at most this long has a link, so that it can be looked at again.
MAX_LINK_LENGTH = 6000

_ORDER = {"absent": 0, "partial": 1, "complete": 2}


async def show(request: PageRequest) -> Model:
    """Return the check of the list in the link, if there is one."""
    return await _check(request, request.query.get("list", ""), request.query.get("platform", ""))


async def check(request: PageRequest) -> ActionResult:
    """Check the list of a form: its text, or the file."""
    text = request.form.get("file", "").strip() or request.form.get("text", "")
    if not text.strip():
        raise InvalidRequestError("paste a list of images, or choose a file")
    platform = request.form.get("platform", "").strip()
    link = _link(text, platform)
    if len(link) <= MAX_LINK_LENGTH:
        return Done("", link)
    return View("unplug.html", "Unplug", await _check(request, text, platform))


async def preload(request: PageRequest) -> NewJob:
    """Fetch the images of a list that are not complete."""
    text, platform = request.form.get("text", ""), request.form.get("platform", "")
    checks = await _check_images(request, await _read(request, text), platform)
    wanted: dict[str, list[str]] = {}
    for one in checks:
        if one.state != "complete":
            wanted.setdefault(one.image, []).append(one.platform)
    if not wanted:
        raise InvalidRequestError("nothing is missing")
    images = [
        {"image": image, "platforms": list(filter(None, platforms))}
        for image, platforms in wanted.items()
    ]
    body = {"images": images, "pin": request.form.get("pin") == "yes"}
    link = _link(text, platform)
    events = request.api.stream("POST", "/api/v1/preload", body)
    title = f"Preload {len(wanted)} image{'' if len(wanted) == 1 else 's'}"
    back = link if len(link) <= MAX_LINK_LENGTH else "/unplug"
    return NewJob(title, events, PreloadLines().describe, back)


async def export(request: PageRequest) -> ByteStream:
    """Send a bundle of the images of a list that are complete."""
    text, platform = request.form.get("text", ""), request.form.get("platform", "")
    checks = await _check_images(request, await _read(request, text), platform)
    partly = {one.image for one in checks if one.state != "complete"}
    images = list(dict.fromkeys(one.image for one in checks if one.image not in partly))
    if not images:
        raise InvalidRequestError("no image of the list is complete: preload it first")
    body = {"images": images, "compression": "zstd", "facts": True}
    return await request.api.post("/api/v1/export", ByteStream, body)


async def import_bundle(request: PageRequest) -> Done:
    """Add the images of an uploaded bundle to the store; show them if they are complete."""
    if request.upload is None:
        raise InvalidRequestError("choose a bundle")
    report: object = None
    events = request.api.stream("POST", "/api/v1/import", upload=request.upload, name="")
    async for event in events:
        report = event
    if not isinstance(report, ImportReport):
        raise InvalidRequestError("the bundle is empty")
    complete = [one.name for one in report.images if one.is_complete]
    added = f"{format_bytes(report.added_bytes)} in {report.added} blobs are new"
    said = [f"{len(complete)} of {len(report.images)} images are here now; {added}"]
    said += [
        f"{one.name}: {one.reason or f'{len(one.missing)} blobs are in neither bundle nor store'}"
        for one in report.images
        if not one.is_complete
    ]
    is_whole = len(complete) == len(report.images)
    return Done(". ".join(said)[:1500], "/images" if is_whole else "/unplug")


async def _check(request: PageRequest, text: str, platform: str) -> Model:
    status = await request.api.get("/api/v1/status", DaemonStatus)
    model: dict[str, object] = {
        "text": text,
        "platform": platform,
        "parsed": None,
        "checks": [],
        "counts": {},
        "free": max(0, status.store.limit - status.store.used),
        "is_offline": status.offline,
    }
    if text.strip():
        parsed = await _read(request, text)
        checks = await _check_images(request, parsed, platform)
        checks.sort(key=lambda one: _ORDER[one.state])
        states: list[str] = [one.state for one in checks]
        model |= {
            "parsed": {
                "format": parsed.format,
                "images": len(parsed.images),
                "problems": parsed.problems[:PAGE_SIZE],
                "more_problems": max(0, len(parsed.problems) - PAGE_SIZE),
            },
            "checks": checks[:PAGE_SIZE],
            "counts": {state: states.count(state) for state in _ORDER},
            "size": sum(one.size for one in checks if one.state == "complete"),
        }
    return model


async def _read(request: PageRequest, text: str) -> ParsedList:
    return await request.api.post("/api/v1/preload/list", ParsedList, {"text": text})


async def _check_images(
    request: PageRequest, parsed: ParsedList, platform: str
) -> list[ImageCheck]:
    """Return a check for each image and platform; `platform` replaces those of the list."""
    chosen = platform.replace(",", " ").split()
    images = [
        {"image": one.image, "platforms": chosen or list(one.platforms)} for one in parsed.images
    ]
    events = request.api.stream("POST", "/api/v1/images/check", {"images": images})
    return [one async for one in events]


def _link(text: str, platform: str) -> str:
    given = f"&platform={quote(platform, safe='')}" if platform else ""
    return f"/unplug?list={quote(text, safe='')}{given}"
