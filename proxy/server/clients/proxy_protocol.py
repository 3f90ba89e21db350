"""The PROXY protocol, versions 1 and 2: the client's address before the first byte of a connection.

A load balancer that forwards TCP sends it (HAProxy's proxy-protocol.txt). Pure: bytes in, a header out.
"""

import re
from ipaddress import ip_address
from typing import NamedTuple

from proxy.errors import ProxyError

# Bytes of a header. Version 1 has at most 107 (section 2.1); version 2 may have more, of which the
# addresses take 36 and the rest are fields that the cache ignores.
MAX_V1_SIZE = 107
MAX_V2_SIZE = 4096

_V1_START = b"PROXY "
_V2_START = b"\r\n\r\n\x00\r\nQUIT\n"
_V2_FIXED_SIZE = 16
_V1 = re.compile(
    rb"PROXY (TCP[46]) ([0-9A-Fa-f.:]{2,39}) ([0-9A-Fa-f.:]{2,39})"
    rb" (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4})\r\n"
)
_V1_UNKNOWN = re.compile(rb"PROXY UNKNOWN(?: [\x20-\x7e]*)?\r\n")
# Family and transport of version 2, with the size of an address; none for those without one.
_TCP4, _TCP6, _UNSPECIFIED, _UNIX_STREAM = 0x11, 0x21, 0x00, 0x31
_ADDRESS_SIZES = {_TCP4: 4, _TCP6: 16}
_BLOCK_SIZES = {_TCP4: 12, _TCP6: 36, _UNSPECIFIED: 0, _UNIX_STREAM: 216}


class ProxyHeaderError(ProxyError):
    """A header is malformed, too long, or for another kind of connection."""


class ProxyHeader(NamedTuple):
    """A header of `size` bytes. `client` is None if the proxy speaks for itself or does not know."""

    size: int
    client: str | None


def may_be_header(data: bytes) -> bool:
    """Tell whether `data` is the beginning of a header, or of what may become one."""
    return any(data.startswith(start) or start.startswith(data) for start in (_V1_START, _V2_START))


def is_header_start(data: bytes) -> bool:
    """Tell whether `data` begins with the first line of a header, or with the signature of version 2."""
    return data.startswith((_V1_START, _V2_START))


def parse_header(data: bytes) -> ProxyHeader | None:
    """Return the header at the beginning of `data`; None if it is not complete yet.

    `data` is one for which `may_be_header` holds. Raises `ProxyHeaderError`.
    """
    if len(data) < len(_V1_START) or (
        not data.startswith(_V1_START) and len(data) < _V2_FIXED_SIZE
    ):
        return None
    return _parse_v1(data) if data.startswith(_V1_START) else _parse_v2(data)


def _parse_v1(data: bytes) -> ProxyHeader | None:
    line, end, _ = data[:MAX_V1_SIZE].partition(b"\r\n")
    if not end:
        if len(data) >= MAX_V1_SIZE:
            raise ProxyHeaderError(f"a PROXY header has more than {MAX_V1_SIZE} bytes")
        return None
    line += end
    if _V1_UNKNOWN.fullmatch(line):
        return ProxyHeader(len(line), None)
    match = _V1.fullmatch(line)
    if match is None or any(int(port) > 65535 for port in match.groups()[3:]):
        raise ProxyHeaderError("a PROXY header of version 1 is malformed")
    version = int(match[1][-1:])
    addresses = []
    for text in match.groups()[1:3]:
        try:
            address = ip_address(text.decode("ascii"))
        except ValueError as error:
            raise ProxyHeaderError("a PROXY header has an invalid address") from error
        if address.version != version:
            raise ProxyHeaderError("a PROXY header has an address of another family")
        addresses.append(str(address))
    return ProxyHeader(len(line), addresses[0])


def _parse_v2(data: bytes) -> ProxyHeader | None:
    version, command = data[12] >> 4, data[12] & 15
    family = data[13]
    size = _V2_FIXED_SIZE + int.from_bytes(data[14:16], "big")
    if version != 2 or command > 1:
        raise ProxyHeaderError("a PROXY header has an unknown version or command")
    if size > MAX_V2_SIZE:
        raise ProxyHeaderError(f"a PROXY header has more than {MAX_V2_SIZE} bytes")
    if command == 0:
        # LOCAL: a health check of the proxy. Family and addresses are to be ignored.
        return ProxyHeader(size, None) if len(data) >= size else None
    if family not in _BLOCK_SIZES:
        raise ProxyHeaderError("a PROXY header is for another kind of connection than TCP")
    if size < _V2_FIXED_SIZE + _BLOCK_SIZES[family]:
        raise ProxyHeaderError("a PROXY header is too short for its addresses")
    if len(data) < size:
        return None
    length = _ADDRESS_SIZES.get(family)
    packed = data[_V2_FIXED_SIZE : _V2_FIXED_SIZE + length] if length else b""
    return ProxyHeader(size, str(ip_address(packed)) if packed else None)
