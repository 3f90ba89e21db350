"""Settings: every key with the value that applies, and where it comes from."""

from itertools import groupby

from proxy.config.origins import KeyOrigin
from proxy.server.pages.page import Model, PageRequest


async def show(request: PageRequest) -> Model:
    """Return the keys by section; those that are not the default first in the mind, not in order."""
    keys = await request.api.get("/api/v1/config", list[KeyOrigin])
    wanted = request.query.get("q", "").strip()
    changed_only = request.query.get("changed") == "yes"
    shown = [
        one
        for one in keys
        if wanted.lower() in one.key.lower() and not (changed_only and one.source == "default")
    ]
    sections = {
        section: [*rows]
        for section, rows in groupby(shown, lambda one: one.key.rpartition(".")[0] or "top level")
    }
    return {"sections": sections, "q": wanted, "changed": changed_only, "total": len(keys)}
