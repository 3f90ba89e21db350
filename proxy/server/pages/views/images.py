"""The list of images, and what can be done with one: pin, refresh, remove."""

from collections.abc import Mapping, Sequence

import msgspec

from proxy.cache.refresh import RefreshedTag
from proxy.errors import BusyError, DeniedError, InvalidRequestError
from proxy.images.manage import ImageBrief, ImageSummary, PinnedImages, RemovedImages
from proxy.server.admin.images import UnpinResponse
from proxy.server.admin.status import DaemonStatus
from proxy.server.pages.page import Done, JobLine, Model, NewJob, PageRequest
from proxy.server.pages.views import packages
from proxy.sizes import format_bytes

# Images of one page.
PAGE_SIZE = 100
# Each of these images is looked at as a whole: that takes 2 ms.
SHORT_PAGE_SIZE = 25

ORDERS: Mapping[str, str] = {
    "name": "Name",
    "size": "Size",
    "unique": "Size of its own",
    "pulled": "Last pull",
    "idle": "Not pulled for longest",
    "pulls": "Pulls",
}
BADGES: Mapping[str, str] = {
    "official": "Docker Official Image",
    "verified_publisher": "Verified publisher",
    "sponsored": "Sponsored open source",
    "community": "Community",
}
_FILTERS = ("upstream", "badge", "platform", "state")


class ImagesQuery(msgspec.Struct, frozen=True):
    """What the form of the page asks for; empty texts ask for nothing."""

    q: str = ""
    package: str = ""
    upstream: str = ""
    badge: str = ""
    platform: str = ""
    state: str = ""
    pinned: str = ""
    pulled: str = ""
    order: str = "name"
    after: str = ""

    @property
    def is_narrowed(self) -> bool:
        """Whether it leaves out images."""
        narrowing = (
            getattr(self, name) for name in (*_FILTERS, "q", "package", "pinned", "pulled")
        )
        return any(narrowing)


async def show(request: PageRequest) -> Model:
    """Return one page of images that fit the query."""
    known = {name: request.query.get(name, "") for name in ImagesQuery.__struct_fields__}
    query = ImagesQuery(**{name: text.strip() for name, text in known.items() if text.strip()})
    if query.package:
        return {
            **await packages.ask(request, query.package),
            "query": query,
            "images": [],
            "next": None,
            "upstreams": [],
            "platforms": [],
            "orders": ORDERS,
            "badges": BADGES,
        }
    images, page_size = await _find(request, query)
    status = await request.api.get("/api/v1/status", DaemonStatus)
    platforms = await request.api.get("/api/v1/images/platforms", list[str])
    shown = images[:page_size]
    has_more = len(images) > page_size
    return {
        "query": query,
        "images": shown,
        "next": msgspec.structs.replace(query, after=shown[-1].name) if has_more else None,
        "upstreams": [one.name for one in status.upstreams],
        "platforms": sorted({*platforms, *filter(None, [query.platform])}),
        "orders": ORDERS,
        "badges": BADGES,
    }


async def _find(request: PageRequest, query: ImagesQuery) -> tuple[Sequence[ImageBrief], int]:
    """Return the images of a page, and one more, and how many a page has.

    While there is no table of all images, the list is by name only, and its pages are shorter.
    """
    wanted = {
        "filter": query.q,
        "after": query.after,
        "order": query.order,
        "pinned": {"yes": True, "no": False}.get(query.pinned),
        "pulled": {"yes": True, "never": False}.get(query.pulled),
        **{name: getattr(query, name) for name in _FILTERS},
    }
    is_by_name = query == ImagesQuery(q=query.q, after=query.after)
    if is_by_name and set(query.q) & set("*?["):
        return await _find_by_name(request, wanted), SHORT_PAGE_SIZE
    try:
        limit = PAGE_SIZE + 1
        rows = await request.api.get("/api/v1/images/rows", list[ImageBrief], limit=limit, **wanted)
    except BusyError:
        if not is_by_name:
            raise
        return await _find_by_name(request, wanted), SHORT_PAGE_SIZE
    return rows, PAGE_SIZE


async def _find_by_name(request: PageRequest, wanted: Mapping[str, object]) -> list[ImageBrief]:
    limit = SHORT_PAGE_SIZE + 1
    found = await request.api.list("/api/v1/images", ImageSummary, limit, limit=limit, **wanted)
    return [ImageBrief.of(one) for one in found]


async def pin(request: PageRequest) -> Done:
    """Pin an image."""
    image = request.form.get("image", "")
    pinned = await request.api.post("/api/v1/images/pin", PinnedImages, {"images": [image]})
    return Done(f"{', '.join(pinned.images)} is pinned: it is not evicted.")


async def unpin(request: PageRequest) -> Done:
    """Unpin an image."""
    image = request.form.get("image", "")
    await request.api.post("/api/v1/images/unpin", UnpinResponse, {"images": [image]})
    return Done(f"{image} is not pinned any more.")


async def refresh(request: PageRequest) -> NewJob:
    """Ask the registry what a tag means now."""
    image = request.form.get("image", "")
    events = request.api.stream("POST", "/api/v1/images/refresh", {"images": [image]})
    back = request.form.get("back", "/images")
    return NewJob(f"Refresh {image}", events, _describe_refresh, back)


async def confirm_removal(request: PageRequest) -> Model:
    """Return what removing an image frees."""
    image = request.query.get("image", "").strip()
    if request.actor.role != "operate":
        raise DeniedError("your login may read only; removing images needs the role operate")
    if not image:
        raise InvalidRequestError("choose an image in the list, and Remove… beside it")
    body = {"images": [image], "dry_run": True, "force": True}
    removal = await request.api.post("/api/v1/images/remove", RemovedImages, body)
    return {"image": image, "removal": removal}


async def remove(request: PageRequest) -> Done:
    """Remove an image, pinned or not: the page before has said what goes."""
    body = {
        "images": [request.form.get("image", "")],
        "force": request.form.get("force") == "yes",
    }
    removed = await request.api.post("/api/v1/images/remove", RemovedImages, body)
    freed = format_bytes(removed.bytes)
    return Done(f"{', '.join(removed.images)} was removed; {freed} are free.", "/images")


def _describe_refresh(event: object) -> JobLine | None:
    if not isinstance(event, RefreshedTag):
        return None
    text = f"{event.image}: {event.outcome.replace('_', ' ')}"
    if event.reason:
        text += f" ({event.reason})"
    return JobLine(text, is_problem=event.outcome in ("failed", "not_found"))
