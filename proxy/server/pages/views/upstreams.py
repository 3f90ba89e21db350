"""Upstreams: the state of each registry, why it fails and when it is asked again."""

from proxy.server.admin.upstreams import UpstreamCheck, UpstreamDetail
from proxy.server.pages.page import Done, Model, PageRequest


async def show(request: PageRequest) -> Model:
    """Return the upstreams, those with a problem first."""
    upstreams = await request.api.get("/api/v1/upstreams", list[UpstreamDetail])
    return {"upstreams": upstreams}


async def check(request: PageRequest) -> Done:
    """Ask each registry for the version of its API."""
    checks = await request.api.post("/api/v1/upstreams/check", list[UpstreamCheck], None)
    return Done("; ".join(f"{one.name}: {one.problem or 'it answers'}" for one in checks)[:1000])
