"""The overview: how the cache is, what it saved, and what is wrong."""

from proxy.server.admin.status import DaemonStatus, OfflineState
from proxy.server.pages.page import Done, Model, PageRequest


async def show(request: PageRequest) -> Model:
    """Return the state of the daemon."""
    return {"status": await request.api.get("/api/v1/status", DaemonStatus)}


async def switch_offline(request: PageRequest) -> Done:
    """Go offline or online, until the daemon stops."""
    offline = request.form.get("offline") == "on"
    await request.api.put("/api/v1/offline", OfflineState, {"offline": offline})
    return Done("Offline: no registry is asked." if offline else "Online again.")
