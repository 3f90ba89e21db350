"""Storage: what takes the space, what goes next, and removing images by a glob."""

from contextlib import suppress

from proxy.errors import BusyError, DeniedError, ProxyError
from proxy.images.manage import RemovedImages
from proxy.images.usage import StoreUsage
from proxy.server.admin.status import DaemonStatus
from proxy.server.pages.page import Done, Model, PageRequest
from proxy.sizes import format_bytes

# Rows of each table.
PAGE_SIZE = 100
# Seconds that the figures may be old.
REPORT_AGE = 60


async def show(request: PageRequest) -> Model:
    """Return the usage of the store, and what removing the images of a glob would free."""
    glob = request.query.get("glob", "").strip()
    with_pinned = request.query.get("pinned") == "yes"
    usage: StoreUsage | None = None
    with suppress(BusyError):  # it is being counted; the page looks again
        usage = await request.api.get("/api/v1/usage", StoreUsage, max_age=REPORT_AGE)
    removal: RemovedImages | None = None
    problem = ""
    if glob and request.actor.role == "operate":
        try:
            body = {"images": [glob], "dry_run": True, "force": with_pinned}
            removal = await request.api.post("/api/v1/images/remove", RemovedImages, body)
        except DeniedError as error:  # whose advice is an option of the command
            pinned = str(error).partition(";")[0]
            problem = f"{pinned}; unpin it first, or select Pinned ones too"
        except ProxyError as error:
            problem = str(error)
    status = await request.api.get("/api/v1/status", DaemonStatus)
    return {
        "usage": usage,
        "store": status.store,
        "scrub": status.scrub,
        "repositories": usage.repositories[:PAGE_SIZE] if usage else [],
        "glob": glob,
        "with_pinned": with_pinned,
        "removal": removal,
        "names": removal.images[:PAGE_SIZE] if removal else [],
        "problem": problem,
    }


async def remove(request: PageRequest) -> Done:
    """Remove the images of a glob, whose preview the page has shown."""
    body = {
        "images": [request.form.get("glob", "")],
        "force": request.form.get("pinned") == "yes",
    }
    removed = await request.api.post("/api/v1/images/remove", RemovedImages, body)
    count = len(removed.images)
    return Done(
        f"{count} image{'' if count == 1 else 's'} removed; {format_bytes(removed.bytes)} are free.",
        "/storage",
    )
