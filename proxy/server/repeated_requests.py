"""Requests by the bytes they were parsed from: the nodes of a fleet send the same bytes.

A trusted proxy adds the client's address to each request. nginx writes it as `config/nginx/pullcache.conf`
says, in a line of its own, so the rest of the bytes is the same for all clients.
"""

import re

from proxy.server.clients.address import Networks, resolve_client
from proxy.server.request import Request

# The number of requests that are remembered with their bytes, and the size of the longest, in bytes.
MAX_REPEATED_REQUESTS = 4096
MAX_REPEATED_SIZE = 2 << 10
# A request with one of these headers has a body, or may have one.
BODY_HEADERS = frozenset(("content-length", "transfer-encoding"))

_HEAD_END = b"\r\n\r\n"
_CLIENT_LINE = re.compile(rb"\r\nX-Forwarded-For: ([0-9A-Fa-f.:]+)(?=\r\n[^ \t])")


class RepeatedRequests:
    """Remembers requests that each arrived alone in one read, without a body, on a connection that stays open."""

    def __init__(self) -> None:
        self._requests: dict[bytes, Request] = {}
        # Without the line that names the client.
        self._proxied: dict[bytes, Request] = {}

    def find(
        self, data: bytes, client: str | None, scheme: str, proxies: Networks | None
    ) -> Request | None:
        """Return the request that exactly these bytes were parsed to before, if it is remembered.

        `client` has sent them; `proxies` are the trusted ones, if it is one of them.
        """
        if proxies is None or client is None:
            repeated = self._requests.get(data)
            return repeated.for_client(client, scheme) if repeated else None
        rest, address = _split(data)
        repeated = self._proxied.get(rest)
        if repeated is None:
            return None
        if address:
            client = resolve_client(client, {"x-forwarded-for": address}, proxies)
        return repeated.for_client(client, scheme)

    def remember(self, data: bytes, request: Request) -> None:
        """Remember what `data` was parsed to."""
        if len(data) > MAX_REPEATED_SIZE or not request.keep_alive:
            return
        if not (data.endswith(_HEAD_END) and BODY_HEADERS.isdisjoint(request.headers)):
            return
        requests = self._requests
        if request.is_proxied:
            data, address = _split(data)
            headers = {**request.headers}
            # Written in any other way, it stands in what is compared, and counts when it is parsed.
            if headers.pop("x-forwarded-for", "") != address or "forwarded" in headers:
                return
            requests, request = self._proxied, request.with_headers(headers)
        if len(requests) >= MAX_REPEATED_REQUESTS:
            del requests[next(iter(requests))]
        requests[data] = request


def _split(data: bytes) -> tuple[bytes, str]:
    """Return the bytes of a request without the line that names its client, and the address; "" if it has none."""
    found = _CLIENT_LINE.search(data)
    if found is None:
        return data, ""
    return data[: found.start()] + data[found.end() :], found[1].decode("ascii")
