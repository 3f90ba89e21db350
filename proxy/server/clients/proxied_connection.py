"""Connections of trusted proxies: the PROXY header is read before TLS and HTTP begin."""

import asyncio
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from proxy.server.clients.address import Networks
from proxy.server.clients.proxy_protocol import MAX_V2_SIZE, may_be_header, parse_header


class TrustedProxies:
    """The proxies that the configuration trusts; a reload replaces `networks`."""

    def __init__(self, networks: Sequence[str]) -> None:
        self.networks = Networks(networks)

    def update(self, networks: Sequence[str]) -> None:
        """Trust these networks from now on."""
        self.networks = Networks(networks)


class ReadHeader(NamedTuple):
    """The client that a PROXY header names, if any, and bytes of the connection that were read."""

    client: str | None
    rest: bytes


async def read_proxy_header(
    loop: asyncio.AbstractEventLoop, connection: socket.socket
) -> ReadHeader:
    """Read the PROXY header at the beginning of a connection, and nothing after it.

    Without a header, `rest` holds the bytes that were read to find out; over TLS these are none.
    Raises `ProxyHeaderError`, and `OSError` if the connection ends.
    """
    received = b""
    while True:
        await _wait_until_readable(loop, connection)
        try:
            peeked = connection.recv(MAX_V2_SIZE - len(received), socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            continue
        if not peeked:
            raise ConnectionResetError("the proxy has closed the connection")
        data = received + peeked
        if not may_be_header(data):
            return ReadHeader(None, received)
        header = parse_header(data)
        if header is not None:
            connection.recv(header.size - len(received))
            return ReadHeader(header.client, b"")
        # Taken, because bytes that stay would make the socket readable for ever.
        received += connection.recv(len(peeked))


async def _wait_until_readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    readable = loop.create_future()

    def on_readable() -> None:
        loop.remove_reader(connection)
        with suppress(asyncio.InvalidStateError):
            readable.set_result(None)

    loop.add_reader(connection, on_readable)
    try:
        await readable
    finally:
        loop.remove_reader(connection)
