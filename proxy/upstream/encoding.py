"""Undo gzip that upstream has applied to a body although no encoding was requested. Pure.

Only a body that has another form of its own is passed here: a manifest, a list, a token, a config.
"""

import zlib
from collections.abc import Mapping

from proxy.errors import UpstreamError

_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_WBITS = 31
# Members of one gzip encoding. Servers send one; each costs time, also an empty one.
MAX_MEMBERS = 100


def is_gzip_encoded(headers: Mapping[str, str]) -> bool:
    """Tell whether a response calls its body gzip-encoded, which need not be true."""
    return "gzip" in headers.get("Content-Encoding", "").lower()


def gunzip(content: bytes, limit: int) -> bytes:
    """Return the decoded body, or `content` itself if it is not in gzip format.

    Raises `UpstreamError` if it is damaged, or has more than `limit` bytes or `MAX_MEMBERS` members.
    """
    decoded = bytearray()
    rest = content
    members = 0
    # There may be several members (RFC 1952 section 2.2).
    while rest.startswith(_GZIP_MAGIC):
        members += 1
        if members > MAX_MEMBERS:
            raise UpstreamError(f"upstream sent a gzip encoding of more than {MAX_MEMBERS} members")
        decompressor = zlib.decompressobj(wbits=_GZIP_WBITS)
        try:
            decoded += decompressor.decompress(rest, limit + 1 - len(decoded))
        except zlib.error as error:
            raise UpstreamError("upstream sent a damaged gzip encoding") from error
        if len(decoded) > limit:
            raise UpstreamError(f"upstream sent more than the allowed {limit} bytes")
        if not decompressor.eof:
            raise UpstreamError("upstream sent a gzip encoding that ends early")
        rest = decompressor.unused_data
    return bytes(decoded) if rest is not content else content
