"""Search: repositories of Docker Hub and the other upstreams, and pulling one into the cache."""

from collections.abc import Mapping, Sequence

from proxy.cache.search import MAX_PAGE
from proxy.errors import InvalidRequestError, ProxyError
from proxy.names import normalize_repository
from proxy.oci.reference import is_host
from proxy.server.admin.search import SearchResponse
from proxy.server.admin.status import DaemonStatus
from proxy.server.pages.page import Model, NewJob, PageRequest
from proxy.server.pages.templating import with_query
from proxy.server.pages.views.preload_lines import PreloadLines

# Results of one page.
PAGE_SIZE = 25

TRUST: Mapping[str, str] = {
    "official": "Docker Official Images",
    "trusted": "Official or verified publisher",
}


async def show(request: PageRequest) -> Model:
    """Return one page of results."""
    text = request.query.get("q", "").strip()
    trust = request.query.get("trust", "")
    page = _to_int(request.query.get("page", "1"))
    status = await request.api.get("/api/v1/status", DaemonStatus)
    found: SearchResponse | None = None
    problem = ""
    if text:
        try:
            found = await request.api.get(
                "/api/v1/search", SearchResponse, text=text, trust=trust, page=page, limit=PAGE_SIZE
            )
        except ProxyError as error:
            problem = str(error)
    return {
        "q": text,
        "trust": trust,
        "trusts": TRUST,
        "page_number": page,
        "found": found,
        "problem": problem,
        "unknown": _find_unknown(text, [one.name for one in status.upstreams]),
        "has_more": bool(found and found.total > page * PAGE_SIZE and page < MAX_PAGE),
        "upstreams": [one.name for one in status.upstreams],
        "is_offline": status.offline,
    }


async def pull(request: PageRequest) -> NewJob:
    """Fetch an image before a client pulls it, and pin it if that was asked for."""
    name = request.form.get("image", "").strip()
    tag = request.form.get("tag", "").strip()
    if not name:
        raise InvalidRequestError("write the name of the image")
    image = f"{name}:{tag}" if tag and "@" not in name else name
    platforms = [*request.form_values.get("platform", ())]
    platforms += request.form.get("more", "").replace(",", " ").split()
    body = {
        "images": [{"image": image, "platforms": list(dict.fromkeys(filter(None, platforms)))}],
        "pin": request.form.get("pin") == "yes",
    }
    events = request.api.stream("POST", "/api/v1/preload", body)
    back = with_query("/search", q=request.form.get("q", ""))
    return NewJob(f"Pull {image[:200]} into the cache", events, PreloadLines().describe, back)


def _find_unknown(text: str, upstreams: Sequence[str]) -> str:
    """Return the registry that a name begins with, if this cache may not pull from it."""
    registry, slash, rest = text.partition("/")
    if not slash or not is_host(registry):
        return ""
    upstream = normalize_repository(registry.lower(), rest).upstream
    return "" if upstream in upstreams else upstream


def _to_int(text: str) -> int:
    return min(max(int(text), 1), MAX_PAGE) if text.isdecimal() and len(text) < 6 else 1
