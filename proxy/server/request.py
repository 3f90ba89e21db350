"""A parsed request, as a connection passes it to the handlers."""

import re
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import parse_qsl

from proxy.errors import InvalidReferenceError

# The number of cached queries, and the length of the longest: clients repeat `ns=docker.io`.
_MAX_CACHED_QUERIES = 1024
_MAX_CACHED_QUERY_LENGTH = 256

# RFC 9112 section 3.2.2, without the deprecated user name (RFC 9110 section 4.2.4).
_ABSOLUTE_FORM = re.compile(r"https?://(?:[^/?#@]*@)?([^/?#@]+)(.*)", re.IGNORECASE)
_ENCODED = re.compile(r"%([0-9A-Fa-f]{2})")
# RFC 3986 section 6.2.2.2, and the other characters of digests. An encoded slash stays: it is none.
_DECODED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~:+=")

NO_QUERY: Mapping[str, str] = {}


class Request:
    """One parsed request.

    `target` is the request target as sent; `path` is its path, in which characters that may stand as
    they are, such as `%61`, are decoded. `headers` holds the headers that the cache understands,
    by lower-case name; lines of one name are joined by a comma (RFC 9110 section 5.2). `client` is
    the address of the client, None on a Unix socket. `is_proxied` tells that a trusted proxy has sent
    the request, `is_peer` that another node of the fleet has.
    """

    __slots__ = (
        "client",
        "has_unread_body",
        "headers",
        "is_http_1_0",
        "is_peer",
        "is_proxied",
        "keep_alive",
        "method",
        "path",
        "query_string",
        "scheme",
        "target",
    )

    def __init__(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        client: str | None = None,
        scheme: str = "http",
        is_http_1_0: bool = False,
        keep_alive: bool = True,
        has_unread_body: bool = False,
        is_proxied: bool = False,
    ) -> None:
        self.method = method
        self.target = target
        if not target.startswith("/") and (absolute := _ABSOLUTE_FORM.fullmatch(target)):
            # RFC 9112 section 3.2.2: the target's authority replaces `Host`.
            headers = {**headers, "host": absolute[1]}
            target = absolute[2] if absolute[2].startswith("/") else f"/{absolute[2]}"
        path, _, self.query_string = target.partition("?")
        self.path = _ENCODED.sub(_decode, path) if "%" in path else path
        self.headers = headers
        self.client = client
        self.is_peer = False
        self.scheme = scheme
        self.is_http_1_0 = is_http_1_0
        self.keep_alive = keep_alive
        self.has_unread_body = has_unread_body
        self.is_proxied = is_proxied

    def for_client(self, client: str | None, scheme: str) -> "Request":
        """Return the same request, as sent by another connection."""
        if client == self.client and scheme == self.scheme:
            return self
        return Request(
            self.method,
            self.target,
            self.headers,
            client,
            scheme,
            self.is_http_1_0,
            is_proxied=self.is_proxied,
        )

    def with_headers(self, headers: Mapping[str, str]) -> "Request":
        """Return the same request with other headers."""
        return Request(
            self.method,
            self.target,
            headers,
            self.client,
            self.scheme,
            self.is_http_1_0,
            self.keep_alive,
            self.has_unread_body,
            self.is_proxied,
        )

    @property
    def query(self) -> Mapping[str, str]:
        """The decoded query, with the first value of a repeated name.

        Raises `InvalidReferenceError` if it names the upstream (`ns`) more than once.
        """
        text = self.query_string
        if not text:
            return NO_QUERY
        return _parse_cached(text) if len(text) <= _MAX_CACHED_QUERY_LENGTH else _parse_query(text)


def _decode(encoded: re.Match[str]) -> str:
    character = chr(int(encoded[1], 16))
    return character if character in _DECODED else encoded[0]


def _parse_query(text: str) -> Mapping[str, str]:
    values: dict[str, str] = {}
    for name, value in parse_qsl(text, keep_blank_values=True):
        if name == "ns" and name in values:
            raise InvalidReferenceError("the query names a registry (ns) more than once")
        values.setdefault(name, value)
    return values


_parse_cached = lru_cache(maxsize=_MAX_CACHED_QUERIES)(_parse_query)
