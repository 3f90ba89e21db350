"""The listeners of the admin API, and which requests they accept.

On `admin.sock` in the store, the mode of the file restricts access to the daemon's user. On TCP a
token is required, whose role says what it permits, or, on loopback without a token, a request that no web page can send: browsers
let any site send requests to loopback addresses.
"""

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import hdrs
from aiohttp.web import BaseRequest, Response, StreamResponse

from proxy.config import Address, ServerSettings
from proxy.config.schema import AdminToken
from proxy.config.values import is_loopback
from proxy.errors import ConfigError, ProxyError, StorageError, UnauthorizedError
from proxy.log import LogWriter
from proxy.server.admin.actor import unix_actor
from proxy.server.admin.handler import COMMON_HEADERS, AdminApiHandler, api_error_response
from proxy.server.admin.server import AdminServer
from proxy.server.clients.connection_limit import create_admin_limiter
from proxy.server.clients.token_auth import TokenAuth
from proxy.server.health import HealthEndpoints
from proxy.server.listening import Listener, format_address
from proxy.server.pages.links import PageAddress, PageLinks
from proxy.server.tls import TlsContext

if TYPE_CHECKING:
    from proxy.server.pages.site import PageSite

SOCKET_NAME = "admin.sock"


class AdminListener:
    """The handler of an admin listener: the API, after authentication, health, metrics and pages."""

    def __init__(
        self,
        api: AdminApiHandler,
        health: HealthEndpoints,
        token_auth: TokenAuth | None,
        pages: "PageSite | None" = None,
        *,
        has_metrics: bool = True,
    ) -> None:
        self._api = api
        self._health = health
        self._token_auth = token_auth
        self.pages = pages
        self._has_metrics = has_metrics

    async def __call__(self, request: BaseRequest) -> StreamResponse:
        """Respond to a request."""
        try:
            path = request.raw_path.partition("?")[0]
            if self._health.has_path(path) and (self._has_metrics or path != "/metrics"):
                if self._token_auth and path == "/metrics":
                    self._token_auth.check_metrics(request)
                response = await self._health.handle(request.method, path)
                assert isinstance(response.body, bytes)
                headers = {**COMMON_HEADERS, **response.headers}
                return Response(status=response.status, headers=headers, body=response.body)
            if self.pages and self._token_auth and not path.startswith("/api/"):
                return await self.pages.handle(request, self._token_auth)
            actor = self._token_auth.check(request) if self._token_auth else unix_actor(request)
        except ProxyError as error:
            return _rejection_response(error)
        return await self._api.handle(request, actor)


def _rejection_response(error: ProxyError) -> Response:
    response = api_error_response(error)
    if isinstance(error, UnauthorizedError):
        response.headers[hdrs.WWW_AUTHENTICATE] = 'Bearer realm="pullcache"'
    # The body of a rejected request is not read.
    response.force_close()
    return response


@dataclass(frozen=True, slots=True)
class AdminServices:
    """What the admin listeners serve, and what they need for it."""

    settings: ServerSettings
    api: AdminApiHandler
    health: HealthEndpoints
    page_links: PageLinks
    group: asyncio.TaskGroup
    access_log: LogWriter | None = None
    clock: Callable[[], float] = time.time


async def listen(
    stack: AsyncExitStack,
    store_path: Path,
    services: AdminServices,
    sockets: Sequence[socket.socket] = (),
    tls: TlsContext | None = None,
) -> list[str]:
    """Listen on the socket in the store, which must be locked, and on TCP; return the addresses.

    Passed `sockets` replace the configured addresses; anyone who can connect to a passed Unix
    socket is trusted. With `tls`, addresses off loopback use https, to protect the token. The
    addresses returned are all except `admin.sock`. Raises `ConfigError` and `StorageError`.
    """
    settings, api = services.settings, services.api
    tokens = settings.read_admin_tokens()
    unix_sockets = [each for each in sockets if each.family == socket.AF_UNIX]
    tcp_sockets = [each for each in sockets if each.family != socket.AF_UNIX]
    for each in tcp_sockets:
        if not tokens and not _is_bound_to_loopback(each):
            raise ConfigError(
                f"the passed admin socket {format_address(each.getsockname())} is reachable from "
                "other machines (set server.admin_token_file)"
            )
    hosts = [*settings.admin_hosts, *(address.host for address in settings.admin_listen)]
    port = PagePort(services, stack, tokens)
    trusted = _make_listener(services, AdminListener(api, services.health, None))
    handler = AdminListener(api, services.health, TokenAuth(tokens, hosts))
    checked = _make_listener(services, handler)
    admin_socket = _bind_admin_socket(store_path, stack)
    _, *addresses = await trusted.open(stack, (), [admin_socket, *unix_sockets])
    configured = () if sockets else settings.admin_listen
    if settings.pages:
        services.page_links.find_address = port.find_address
        if configured or tcp_sockets:
            handler.pages = await port.make_site()
    for address in configured:
        found = await checked.open(stack, [address], tls=None if address.is_loopback else tls)
        port.add(found, is_local=address.is_loopback)
        addresses += found
    for each in tcp_sockets:
        is_local = _is_bound_to_loopback(each)
        found = await checked.open(stack, (), [each], None if is_local else tls)
        port.add(found, is_local=is_local)
        addresses += found
    stack.push_async_callback(api.close)
    for listener in (trusted, checked):
        stack.push_async_callback(listener.close)
    return addresses


class PagePort:
    """The address at which a browser of this machine finds the pages; opened when it is asked for."""

    def __init__(
        self, services: AdminServices, stack: AsyncExitStack, tokens: Sequence[AdminToken]
    ) -> None:
        self._services = services
        self._stack = stack
        self._tokens = tokens
        self._site: PageSite | None = None
        self._address: PageAddress | None = None
        self._opening = asyncio.Lock()

    def add(self, addresses: Sequence[str], *, is_local: bool) -> None:
        """Take an address of the admin API, if only this machine reaches it."""
        if is_local and addresses and self._address is None:
            self._address = PageAddress(addresses[0], needs_login=bool(self._tokens))

    async def make_site(self) -> "PageSite":
        """Return the pages, with all templates read."""
        if self._site is None:
            # Most daemons without an admin address never need jinja2.
            from proxy.server.pages.site import PageSite  # noqa: PLC0415

            services = self._services
            self._site = await asyncio.to_thread(
                PageSite,
                services.api,
                services.page_links.sessions,
                services.group,
                services.access_log,
                anonymous_read=services.settings.pages_anonymous_read,
                clock=services.clock,
            )
            self._stack.callback(self._site.close)
        return self._site

    async def find_address(self) -> PageAddress:
        """Return an address on loopback; open a port if there is none.

        Every user of this machine can connect to such a port: its pages need a login by a link of
        `pullcache ui`, its API a token, and it has no metrics.
        """
        async with self._opening:
            if self._address is None:
                secret = AdminToken("pullcache-ui", secrets.token_urlsafe(32), "operate")
                handler = AdminListener(
                    self._services.api,
                    self._services.health,
                    TokenAuth([*self._tokens, secret]),
                    await self.make_site(),
                    has_metrics=False,
                )
                listener = _make_listener(self._services, handler)
                found = await listener.open(self._stack, [Address("127.0.0.1:0")])
                self._stack.push_async_callback(listener.close)
                self._address = PageAddress(found[0], needs_login=True)
            return self._address


def _make_listener(services: AdminServices, handler: AdminListener) -> Listener:
    return Listener(
        AdminServer(handler), "server.admin_listen", services.group, create_admin_limiter()
    )


def _is_bound_to_loopback(tcp_socket: socket.socket) -> bool:
    return is_loopback(tcp_socket.getsockname()[0])


def _bind_admin_socket(store_path: Path, stack: AsyncExitStack) -> socket.socket:
    """Return the bound socket `admin.sock`, which the stack removes. Raises `StorageError`."""
    try:
        # Bound through a descriptor of the directory: a socket address is limited to 107 bytes,
        # which the path may exceed.
        directory_fd = os.open(store_path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, directory_fd)
        # The socket of a killed daemon may be left. No other daemon is running: we hold the lock.
        _unlink_socket(directory_fd)
        admin_socket = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        admin_socket.setblocking(False)
        # On Linux the file gets the mode of the socket, so no one else can connect at any moment.
        os.fchmod(admin_socket.fileno(), 0o600)
        admin_socket.bind(f"/proc/self/fd/{directory_fd}/{SOCKET_NAME}")
    except OSError as error:
        raise StorageError(
            f"{store_path}/{SOCKET_NAME} cannot be used: {error.strerror}"
        ) from error
    stack.callback(_unlink_socket, directory_fd)
    return admin_socket


def _unlink_socket(directory_fd: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(SOCKET_NAME, dir_fd=directory_fd)
