"""Where a redirect leads, and which redirects are refused. Pure."""

from yarl import URL

from proxy.errors import UpstreamError

REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 9


def redirect_target(url: URL, location: str) -> URL:
    """Return the target of a redirect, byte for byte: requoting would break a signed query.

    Raises `UpstreamError` if it is not http(s), or http after https.
    """
    try:
        target = url.join(URL(location, encoded=True))
    except ValueError as error:
        raise UpstreamError("upstream redirects to an invalid URL") from error
    if not location or target.scheme not in ("http", "https") or not target.host:
        raise UpstreamError("upstream redirects to a URL that is not http(s)")
    if url.scheme == "https" and target.scheme == "http":
        raise UpstreamError("upstream redirects from https to http, which is not allowed")
    return target
