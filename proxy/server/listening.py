"""Listening sockets, bound here or passed in. Limits apply before TLS and before a byte is read."""

import asyncio
import errno
import math
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any, Protocol

from proxy.config import Address
from proxy.errors import AddressUnavailableError
from proxy.log import get_logger
from proxy.server.clients.connection_limit import ConnectionLimiter, ConnectionSlot
from proxy.server.clients.proxied_connection import TrustedProxies, read_proxy_header
from proxy.server.clients.proxy_protocol import ProxyHeaderError
from proxy.server.tls import TlsContext

BACKLOG = 1024
# Time limits for a TLS handshake, and for the client to confirm the end of a TLS connection, in seconds.
TLS_HANDSHAKE_TIMEOUT = 10.0
TLS_SHUTDOWN_TIMEOUT = 5.0
# Time in which a trusted proxy must send the first bytes of a connection, in seconds.
PROXY_HEADER_TIMEOUT = 75.0
# The same if the connection is over the limit.
REJECTED_TIMEOUT = 5.0
# On shutdown, idle connections get this many seconds to send one more request: one that was just
# accepted may already have a request in flight.
IDLE_DRAIN_TIMEOUT = 1.0
# Connections accepted in one callback, before the loop serves others.
ACCEPTS_PER_CALLBACK = 64
# The pause in accepting when the system has no descriptor or memory for a connection, in seconds.
ACCEPT_PAUSE = 0.5
# Connections for which there is no slot are closed this many seconds after their 429, so that their requests
# do not meet a closed socket and cause a reset; at most so many wait for that at a time.
TURN_AWAY_TIME = 1.0
MAX_TURNED_AWAY = 64

_TURN_AWAY_BODY = (
    b'{"errors":[{"code":"TOOMANYREQUESTS","message":"too many connections to this cache; '
    b'try again soon"}]}'
)
_TURN_AWAY_RESPONSE = (
    b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\n"
    b"X-Content-Type-Options: nosniff\r\nRetry-After: 5\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_TURN_AWAY_BODY), _TURN_AWAY_BODY)
)
_MAX_UNREAD = 64 << 10
_EXHAUSTED_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = get_logger(__name__)


class ConnectionServer(Protocol):
    """Creates the protocol of each connection, and closes all connections."""

    all_closed: asyncio.Event
    """Set when the last connection has closed after `close_gracefully`."""

    def __call__(self, slot: ConnectionSlot | None = None) -> asyncio.BaseProtocol:
        """Return the protocol of a new connection, which releases the slot when it closes."""

    def discard(self, connection: asyncio.BaseProtocol) -> None:
        """Remove a connection that was never established."""

    def close_gracefully(self, drain_timeout: float) -> None:
        """Close each connection after its current request, or one begun within `drain_timeout` seconds."""

    async def close(self) -> None:
        """Close all connections now."""


class Acceptor:
    """Accepts connections on one listening socket, and owns the socket.

    It replaces asyncio's server, which reports a client only after its TLS handshake: until then, any
    number of clients could occupy descriptors.
    """

    def __init__(
        self,
        server: ConnectionServer,
        listening_socket: socket.socket,
        group: asyncio.TaskGroup,
        limiter: ConnectionLimiter | None,
        tls: TlsContext | None,
        proxies: "TrustedProxies | None" = None,
    ) -> None:
        self._proxies = proxies
        self.address = format_address(listening_socket.getsockname())
        self._listening_socket = listening_socket
        self._server = server
        self._group = group
        self._limiter = limiter
        self._loop = asyncio.get_running_loop()
        self._resume_timer: asyncio.TimerHandle | None = None
        # Given up for a moment when no other descriptor is left, to answer a connection.
        self._spare_fd = _open_spare()
        self._turned_away: deque[socket.socket] = deque()
        self._logged_at = -math.inf
        self._tls_options: dict[str, Any] = {}
        if tls:
            self._tls_options = {
                "ssl": tls.context,
                "ssl_handshake_timeout": TLS_HANDSHAKE_TIMEOUT,
                "ssl_shutdown_timeout": TLS_SHUTDOWN_TIMEOUT,
            }
        listening_socket.setblocking(False)
        listening_socket.listen(BACKLOG)
        # Tells whether another client waits: an `accept` that fails would take longer.
        self._waiting = select.poll()
        self._waiting.register(listening_socket, select.POLLIN)
        self._loop.add_reader(listening_socket, self._accept)

    def close(self) -> None:
        """Stop accepting and close the socket."""
        if self._listening_socket.fileno() < 0:
            return
        if self._resume_timer:
            self._resume_timer.cancel()
        self._loop.remove_reader(self._listening_socket)
        self._listening_socket.close()
        while self._turned_away:
            self._turned_away.popleft().close()
        if self._spare_fd is not None:
            os.close(self._spare_fd)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_CALLBACK):
            try:
                connection, peer = self._listening_socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED_ERRNOS:
                    continue  # the client has already disconnected
                self._log_exhaustion(error)
                if not self._accept_with_spare():
                    self._pause_accepting()
                    return
                continue
            self._start_connection(connection, peer)
            if not self._waiting.poll(0):
                return

    def _accept_with_spare(self) -> bool:
        """Answer a client with the descriptor that was kept for this; return whether that worked."""
        if self._spare_fd is None:
            return False
        os.close(self._spare_fd)
        try:
            connection, _ = self._listening_socket.accept()
        except OSError:
            pass
        else:
            self._send_rejection(connection)
            connection.close()
            if self._limiter:
                self._limiter.count_rejected()
        self._spare_fd = _open_spare()
        return self._spare_fd is not None

    def _turn_away(self, connection: socket.socket) -> None:
        """Answer a connection that gets no slot, and close it a moment later."""
        self._send_rejection(connection)
        self._turned_away.append(connection)
        if len(self._turned_away) > MAX_TURNED_AWAY:
            self._turned_away.popleft().close()
        self._loop.call_later(TURN_AWAY_TIME, self._close_turned_away, connection)

    def _close_turned_away(self, connection: socket.socket) -> None:
        with suppress(ValueError):  # it was closed for another one
            self._turned_away.remove(connection)
            with suppress(OSError):
                connection.recv(_MAX_UNREAD)
            connection.close()

    def _send_rejection(self, connection: socket.socket) -> None:
        """Send a 429 without waiting; with TLS that is not possible."""
        connection.setblocking(False)
        if self._tls_options:
            return
        with suppress(OSError):
            # Unread bytes would make the kernel send a reset.
            connection.recv(_MAX_UNREAD)
        with suppress(OSError):
            connection.send(_TURN_AWAY_RESPONSE)
            connection.shutdown(socket.SHUT_WR)

    def _log_exhaustion(self, error: OSError) -> None:
        if self._loop.time() - self._logged_at > ACCEPT_PAUSE:
            self._logged_at = self._loop.time()
            log.warning("accept_failed", reason=error.strerror)

    def _pause_accepting(self) -> None:
        """Stop accepting for a moment; the loop would report the waiting clients again and again."""
        self._loop.remove_reader(self._listening_socket)
        self._resume_timer = self._loop.call_later(
            ACCEPT_PAUSE, self._loop.add_reader, self._listening_socket, self._accept
        )

    def _start_connection(self, connection: socket.socket, peer: Any) -> None:
        slot = None
        address = peer[0] if isinstance(peer, tuple) else ""
        is_proxy = self._proxies is not None and address in self._proxies.networks
        if self._limiter:
            slot = self._limiter.acquire(address, is_proxy=is_proxy)
            if slot is None:
                self._turn_away(connection)
                return
        if is_proxy and slot:
            connection.setblocking(False)
            self._group.create_task(self._connect_proxied(connection, slot))
        elif not self._tls_options:
            protocol = self._server(slot)
            _ConnectionStart(
                self._loop.connect_accepted_socket(lambda: protocol, connection),
                partial(self._give_up, protocol, slot),
            )
        else:
            self._group.create_task(self._connect(connection, self._server(slot), slot))

    async def _connect_proxied(self, connection: socket.socket, slot: ConnectionSlot) -> None:
        """Read the PROXY header of a connection of a trusted proxy, if it has one, and go on."""
        try:
            seconds = REJECTED_TIMEOUT if slot.is_rejected else PROXY_HEADER_TIMEOUT
            async with asyncio.timeout(seconds):
                header = await read_proxy_header(self._loop, connection)
        except BaseException as error:
            connection.close()
            slot.release()
            if not isinstance(error, Exception):
                raise
            if isinstance(error, ProxyHeaderError):
                log.warning("proxy_header_rejected", proxy=slot.address, reason=str(error))
            return
        if header.client:
            slot.identify(header.client)
        slot.received = header.rest
        await self._connect(connection, self._server(slot), slot)

    async def _connect(
        self, connection: socket.socket, protocol: asyncio.BaseProtocol, slot: ConnectionSlot | None
    ) -> None:
        try:
            await self._loop.connect_accepted_socket(
                lambda: protocol, connection, **self._tls_options
            )
        except BaseException as error:
            self._give_up(protocol, slot, error)
            if not isinstance(error, Exception):
                raise

    def _give_up(
        self, protocol: asyncio.BaseProtocol, slot: ConnectionSlot | None, error: BaseException
    ) -> None:
        self._server.discard(protocol)
        if slot:
            slot.release()
        # After a failed or slow handshake (an ssl.SSLError is an OSError), no response can be sent.
        if isinstance(error, Exception) and not isinstance(error, OSError):
            log.warning("connection_failed", reason=repr(error))


class _ConnectionStart:
    """Runs `connect_accepted_socket` of a plain connection, which waits once, for the next turn of the loop.

    A task for it would take a tenth of the time of a connection with one request.
    """

    __slots__ = ("_on_error", "_starting")

    def __init__(
        self, starting: Coroutine[Any, Any, object], on_error: Callable[[Exception], None]
    ) -> None:
        self._starting = starting
        self._on_error = on_error
        self._step()

    def _step(self, _: "asyncio.Future[object] | None" = None) -> None:
        try:
            waited_for = self._starting.send(None)
        except StopIteration:
            pass
        except Exception as error:  # noqa: BLE001 (a failed connection must not stop the others)
            self._on_error(error)
        else:
            waited_for.add_done_callback(self._step)


class Listener:
    """Listens on the addresses of the configuration key `config_key`, and on sockets bound elsewhere."""

    def __init__(
        self,
        server: ConnectionServer,
        config_key: str,
        group: asyncio.TaskGroup,
        limiter: ConnectionLimiter | None = None,
        proxies: "TrustedProxies | None" = None,
    ) -> None:
        self._proxies = proxies
        self._server = server
        self._config_key = config_key
        self._group = group
        self._limiter = limiter
        self._acceptors: list[Acceptor] = []

    async def open(
        self,
        stack: AsyncExitStack,
        addresses: Sequence[Address],
        sockets: Sequence[socket.socket] = (),
        tls: TlsContext | None = None,
    ) -> list[str]:
        """Accept clients until the stack closes; return the bound addresses.

        Raises `AddressUnavailableError` if an address cannot be bound.
        """
        stack.push_async_callback(self._force_close)
        bound = list(sockets)
        for address in addresses:
            try:
                bound += await _bind_address(address)
            except OSError as error:
                reason = error.strerror
                raise AddressUnavailableError(
                    f"{self._config_key}: {address} cannot be used ({reason}); "
                    "stop what uses it, or choose another"
                ) from error
        opened = [
            Acceptor(self._server, one, self._group, self._limiter, tls, self._proxies)
            for one in bound
        ]
        self._acceptors += opened
        return [acceptor.address for acceptor in opened]

    async def close(self) -> None:
        """Stop accepting, and close each connection after at most one more request.

        A client that connects to a socket passed in waits there for the next daemon.
        """
        for acceptor in self._acceptors:
            acceptor.close()
        self._server.close_gracefully(IDLE_DRAIN_TIMEOUT)

    async def drain(self, seconds: float) -> None:
        """Wait at most `seconds` until all connections have closed or `end_drain` is called."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._server.all_closed.wait()

    def end_drain(self) -> None:
        """End the current or next `drain` at once."""
        self._server.all_closed.set()

    async def _force_close(self) -> None:
        """Close all sockets and connections now."""
        for acceptor in self._acceptors:
            acceptor.close()
        await self._server.close()


def _open_spare() -> int | None:
    """Return a descriptor that can be given up, or None if there is none left."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


async def _bind_address(address: Address) -> list[socket.socket]:
    """Return sockets bound to all addresses of a host name. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(
        address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    bound: list[socket.socket] = []
    problem = OSError(errno.EADDRNOTAVAIL, "the host has no address")
    for family, kind, protocol, _, socket_address in dict.fromkeys(found):
        try:
            one = socket.socket(family, kind, protocol)
        except OSError as error:  # for example, the system has no IPv6
            problem = error
            continue
        bound.append(one)
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind(socket_address)
        except OSError:
            for other in bound:
                other.close()
            raise
    if not bound:
        raise problem
    return bound


def format_address(address: Any) -> str:
    """Return a socket's address as text: `host:port`, `unix:/path`, `unix:@name`."""
    if isinstance(address, bytes):
        return f"unix:@{address[1:].decode(errors='replace')}"
    if isinstance(address, str):
        return f"unix:{address}"
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
