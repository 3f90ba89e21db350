"""The state of a request while it is answered, and the response headers that depend on it."""

from collections.abc import Mapping
from functools import lru_cache

import msgspec

from proxy.metrics import CacheState, RequestKind
from proxy.oci.digest import Digest
from proxy.server.registry.router import TargetResource
from proxy.server.request import Request
from proxy.server.responses import API_VERSION, SharedHeaders

IMMUTABLE_CACHE_CONTROL = "public, max-age=31536000, immutable"

# RFC 9211: `fwd` is the reason for a request to upstream, `collapsed` means that requests shared it.
CACHE_STATUS: Mapping[CacheState, str] = {
    "hit": "pullcache; hit",
    "miss": "pullcache; fwd=miss; stored",
    "collapsed": "pullcache; fwd=miss; collapsed; stored",
    "peer": "pullcache; fwd=miss; stored; detail=peer",
    "revalidated": "pullcache; fwd=stale; fwd-status=200; detail=revalidated",
    "stale": "pullcache; fwd=stale; detail=stale-if-error",
    "bypass": "pullcache; fwd=miss",
    "none": "pullcache; fwd=bypass",
}


class RequestContext(msgspec.Struct):
    """A request and its outcome, until it is logged and counted.

    `started_at` is a time of `time.perf_counter`, in seconds. `digest` is that of the manifest served.
    `promised_bytes` are those that nginx was told to send, None if it was not; `bytes_sent` contains them.
    """

    request: Request
    started_at: float
    request_id: str
    kind: RequestKind = "other"
    upstream: str = "none"
    cache_state: CacheState = "none"
    bytes_sent: int = 0
    promised_bytes: int | None = None
    problem: str = ""
    target: TargetResource | None = None
    digest: Digest | None = None
    namespace: str = ""
    """The upstream, if the client has named it with `?ns=`."""
    user: str = ""
    """The user that has logged in."""
    is_peer: bool = False
    """Whether another node of the fleet has sent the request."""

    @property
    def shared_headers(self) -> dict[str, str]:
        """The headers of every response: the cache status, and the namespace if the client named one."""
        headers = {"Cache-Status": CACHE_STATUS[self.cache_state]}
        if self.namespace:
            headers["OCI-Namespace"] = self.namespace
        return headers


def digest_headers(cache_state: CacheState, namespace: str, digest: Digest) -> dict[str, str]:
    """Return the headers of every response about a digest."""
    headers = {
        "Docker-Distribution-Api-Version": API_VERSION,
        "Docker-Content-Digest": str(digest),
        "ETag": f'"{digest}"',
        "Cache-Status": CACHE_STATUS[cache_state],
    }
    if namespace:
        headers["OCI-Namespace"] = namespace
    return headers


# The nodes of a fleet request the same few blobs again and again.
@lru_cache(maxsize=4096)
def hit_headers(namespace: str, digest: Digest) -> SharedHeaders:
    """Return the headers of a response with the whole of a stored blob."""
    return SharedHeaders.of(_blob_headers("hit", namespace, digest))


@lru_cache(maxsize=4096)
def redirect_headers(
    location: str, cache_state: CacheState, namespace: str, digest: Digest
) -> SharedHeaders:
    """Return the headers that let nginx send a stored blob from below `location`."""
    path = f"{location}/{digest.algorithm}/{digest.hex}"
    headers = _blob_headers(cache_state, namespace, digest)
    del headers["Accept-Ranges"]  # nginx adds its own
    return SharedHeaders.of({**headers, "X-Accel-Redirect": path})


def blob_headers(context: RequestContext, digest: Digest) -> dict[str, str]:
    """Return the headers of every response about a blob."""
    return _blob_headers(context.cache_state, context.namespace, digest)


def _blob_headers(cache_state: CacheState, namespace: str, digest: Digest) -> dict[str, str]:
    return {
        **digest_headers(cache_state, namespace, digest),
        "Content-Type": "application/octet-stream",
        "Accept-Ranges": "bytes",
        "Cache-Control": IMMUTABLE_CACHE_CONTROL,
    }
