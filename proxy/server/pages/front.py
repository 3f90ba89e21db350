"""The answer to a browser at the registry's address: what this is, and where the pages are."""

from collections.abc import Sequence
from html import escape

from proxy.server.responses import Response

_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>pullcache</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"></head>
<body><h1>pullcache</h1>
<p>This is a cache of container images, for docker, containerd, podman and other clients. It has no
pages at this address.</p>
{where}
<p>To point a client here: <code>pullcache client-config</code>.</p>
</body></html>
"""
_BY_ADDRESS = "<p>Its pages are at <code>{addresses}</code>.</p>"
_BY_COMMAND = (
    "<p>To see what it holds, run <code>pullcache ui</code> on the machine that it runs on.</p>"
)


def is_browser(method: str, path: str, accepted: str) -> bool:
    """Tell whether a request for `/` is that of a browser."""
    return path == "/" and method in ("GET", "HEAD") and "text/html" in accepted


def front_page(page_addresses: Sequence[str]) -> Response:
    """Return the answer; `page_addresses` are those at which pages are served, if any."""
    addresses = [one for one in page_addresses if not one.startswith("unix:")]
    where = _BY_ADDRESS.format(addresses=escape(", ".join(addresses))) if addresses else _BY_COMMAND
    return Response(200, dict(_HEADERS), _PAGE.format(where=where).encode())
