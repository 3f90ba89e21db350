"""The header of the PROXY protocol as bytes: valid ones, and hostile ones."""

import struct

import pytest
from hypothesis import given, strategies as st

from proxy.server.clients.proxy_protocol import (
    MAX_V1_SIZE,
    MAX_V2_SIZE,
    ProxyHeader,
    ProxyHeaderError,
    may_be_header,
    parse_header,
)

V2 = b"\r\n\r\n\x00\r\nQUIT\n"
IPV4 = bytes([192, 0, 2, 1, 203, 0, 113, 9]) + struct.pack(">HH", 50000, 443)
IPV6 = bytes.fromhex("20010db8" + "00" * 11 + "01") * 2 + struct.pack(">HH", 1, 2)


def v2(command: int, family: int, block: bytes, *, length: int | None = None) -> bytes:
    size = len(block) if length is None else length
    return V2 + bytes([command, family]) + struct.pack(">H", size) + block


VALID = [
    (b"PROXY TCP4 192.0.2.1 203.0.113.9 56324 443\r\n", "192.0.2.1"),
    (b"PROXY TCP4 192.0.2.1 203.0.113.9 0 65535\r\n", "192.0.2.1"),
    (b"PROXY TCP6 2001:db8::1 2001:db8::2 4124 443\r\n", "2001:db8::1"),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n", None),
    (v2(0x21, 0x11, IPV4), "192.0.2.1"),
    (v2(0x21, 0x21, IPV6), "2001:db8::1"),
    (v2(0x21, 0x11, IPV4 + b"\x04\x00\x03abc"), "192.0.2.1"),
    (v2(0x21, 0x00, b""), None),
    (v2(0x21, 0x31, bytes(216)), None),
    (v2(0x20, 0x00, b""), None),
    (v2(0x20, 0x11, b"ignored"), None),
]


@pytest.mark.parametrize(("data", "client"), VALID)
@pytest.mark.parametrize("rest", [b"", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01"])
def test_a_header_says_who_the_client_is_and_where_it_ends(data, client, rest):
    assert may_be_header(data + rest)
    assert parse_header(data + rest) == ProxyHeader(len(data), client)


@pytest.mark.parametrize(("data", "client"), VALID)
def test_a_truncated_header_is_not_complete_at_any_length(data, client):
    for size in range(1, len(data)):
        assert may_be_header(data[:size])
        assert parse_header(data[:size]) is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"PROXY TCP4 2001:db8::1 192.0.2.1 1 2\r\n", "another family"),
        (b"PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n", "another family"),
        (b"PROXY TCP4 192.0.2.256 192.0.2.1 1 2\r\n", "invalid address"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 65536 2\r\n", "malformed"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n", "malformed"),
        (b"PROXY TCP4  192.0.2.1 192.0.2.2 1 2\r\n", "malformed"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n", "malformed"),
        (b"PROXY UDP4 192.0.2.1 192.0.2.2 1 2\r\n", "malformed"),
        (b"PROXY UNKNOWNX\r\n", "malformed"),
        (b"PROXY \r\n", "malformed"),
        (b"PROXY TCP4 1\xff.0.2.1 192.0.2.2 1 2\r\n", "malformed"),
        (b"PROXY " + b"A" * MAX_V1_SIZE, "more than 107 bytes"),
        (b"PROXY UNKNOWN " + b"A" * 200 + b"\r\n", "more than 107 bytes"),
        (v2(0x11, 0x11, IPV4), "unknown version or command"),
        (v2(0x22, 0x11, IPV4), "unknown version or command"),
        (v2(0x21, 0x12, IPV4), "another kind of connection"),
        (v2(0x21, 0x22, IPV6), "another kind of connection"),
        (v2(0x21, 0xFF, IPV4), "another kind of connection"),
        (v2(0x21, 0x11, IPV4[:-1]), "too short"),
        (v2(0x21, 0x21, IPV4), "too short"),
        (v2(0x21, 0x31, IPV4), "too short"),
        (v2(0x21, 0x11, b"", length=65535), f"more than {MAX_V2_SIZE} bytes"),
        (v2(0x20, 0x00, b"", length=65535), f"more than {MAX_V2_SIZE} bytes"),
    ],
)
def test_a_hostile_header_is_rejected(data, reason):
    assert may_be_header(data)
    with pytest.raises(ProxyHeaderError, match=reason):
        parse_header(data)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1", b"PROPFIND /", b"\x16\x03", b"\r\nGET", b"X"])
def test_other_bytes_are_no_header(data):
    assert not may_be_header(data)


@given(st.binary(max_size=300), st.sampled_from([b"PROXY ", V2, V2 + b"\x21", V2 + b"\x20"]))
def test_random_bytes_are_a_header_or_an_error_and_never_a_crash(noise, start):
    try:
        header = parse_header(start + noise)
    except ProxyHeaderError:
        return
    assert header is None or 0 < header.size <= MAX_V2_SIZE
