"""A request under way: what is known of it, and the headers that say so."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from proxy.metrics import CacheState, RequestKind
from proxy.oci.digest import Digest
from proxy.server.responses import API_VERSION

IMMUTABLE_CACHE_CONTROL = "public, max-age=31536000, immutable"

# RFC 9211. What upstream was asked for is `fwd`, whether it was shared is `collapsed`.
CACHE_STATUS: Mapping[CacheState, str] = {
    "hit": "pullcache; hit",
    "miss": "pullcache; fwd=miss; stored",
    "collapsed": "pullcache; fwd=miss; collapsed; stored",
    "revalidated": "pullcache; fwd=stale; fwd-status=200; detail=revalidated",
    "stale": "pullcache; fwd=stale; detail=stale-if-error",
    "bypass": "pullcache; fwd=miss",
    "none": "pullcache; fwd=bypass",
}


@dataclass(slots=True)
class RequestContext:
    """What is known of a request by the time it is logged and counted."""

    kind: RequestKind = "other"
    upstream: str = "none"
    cache_state: CacheState = "none"
    bytes_sent: int = 0
    problem: str = ""
    response_headers: dict[str, str] = field(default_factory=dict)


def digest_headers(context: RequestContext, digest: Digest) -> dict[str, str]:
    """Return the headers of every answer about a digest."""
    return {
        "Docker-Distribution-Api-Version": API_VERSION,
        "Docker-Content-Digest": str(digest),
        "ETag": f'"{digest}"',
        "Cache-Status": CACHE_STATUS[context.cache_state],
        **context.response_headers,
    }


def blob_headers(context: RequestContext, digest: Digest) -> dict[str, str]:
    """Return the headers of every answer about a blob."""
    return {
        **digest_headers(context, digest),
        "Content-Type": "application/octet-stream",
        "Accept-Ranges": "bytes",
        "Cache-Control": IMMUTABLE_CACHE_CONTROL,
    }
