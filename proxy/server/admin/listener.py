"""The listeners of the admin API, and which requests they accept.

On `admin.sock` in the store, the mode of the file restricts access to the daemon's user. On TCP a
token is required, whose role says what it permits, or, on loopback without a token, a request that no web page can send: browsers
let any site send requests to loopback addresses.
"""

import asyncio
import hmac
import os
import re
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from aiohttp import hdrs
from aiohttp.web import BaseRequest, Response, StreamResponse

from proxy.config import ServerSettings
from proxy.config.schema import AdminToken
from proxy.config.values import is_ip_address, is_loopback
from proxy.errors import (
    ConfigError,
    DeniedError,
    InvalidRequestError,
    ProxyError,
    StorageError,
    UnauthorizedError,
)
from proxy.server.admin.actor import Actor, unix_actor
from proxy.server.admin.handler import COMMON_HEADERS, AdminApiHandler, api_error_response
from proxy.server.admin.server import AdminServer
from proxy.server.clients.connection_limit import create_admin_limiter
from proxy.server.health import HealthEndpoints
from proxy.server.listening import Listener, format_address
from proxy.server.tls import TlsContext

SOCKET_NAME = "admin.sock"

# Content types that a page of another site may send without a preflight request (Fetch standard,
# "CORS-safelisted request-header"), including none at all.
_SAFELISTED_CONTENT_TYPES = (
    "",
    "text/plain",
    "multipart/form-data",
    "application/x-www-form-urlencoded",
)


class TokenAuth:
    """Checks requests over TCP. One of `tokens` is sufficient; without any, web pages are rejected.

    A site may point its own name at this address (DNS rebinding), so `Host` is checked; `hosts` are the
    names that lead here.
    """

    def __init__(self, tokens: Sequence[AdminToken], hosts: Sequence[str] = ()) -> None:
        self._tokens = tokens
        self._hosts = frozenset(host.lower() for host in hosts)

    def check(self, request: BaseRequest) -> Actor:
        """Return the actor of a request.

        Raises `UnauthorizedError`, `DeniedError` or `InvalidRequestError` to reject it.
        """
        if self._tokens:
            if token := self._find_token(request):
                return Actor(token.role, token.name)
            raise UnauthorizedError(
                "the admin API requires a token, of admin_token_file or admin_tokens: "
                "Authorization: Bearer TOKEN"
            )
        host = request.headers.get(hdrs.HOST, "")
        if not is_loopback(_host_name(host)):
            raise DeniedError(
                "without a token, the Host header must be a loopback address or localhost"
            )
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and origin != f"{request.scheme}://{host}":
            raise DeniedError("the admin API rejects cross-origin requests")
        media_type = request.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip().lower()
        if request.method == "POST" and media_type in _SAFELISTED_CONTENT_TYPES:
            raise InvalidRequestError("POST requires a Content-Type (application/json)")
        return Actor()

    def check_metrics(self, request: BaseRequest) -> None:
        """Raise `DeniedError` if the request for metrics may come from a web page."""
        host = request.headers.get(hdrs.HOST)
        if host is None:  # no browser leaves it out
            return
        name = _host_name(host)
        if not (is_ip_address(name) or is_loopback(name) or name in self._hosts):
            if self._find_token(request):
                return
            raise DeniedError(
                f"/metrics is not served under the name {name[:100]!r}; use an IP address, "
                "or add the name to server.admin_hosts"
            )

    def _find_token(self, request: BaseRequest) -> AdminToken | None:
        """Return the token of a request. How long it takes does not depend on which one it is."""
        scheme, _, text = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        given = text.strip().encode(errors="surrogateescape")
        equal = [
            token for token in self._tokens if hmac.compare_digest(given, token.secret.encode())
        ]
        return equal[0] if equal and scheme.lower() == "bearer" else None


def _host_name(host: str) -> str:
    """Return the name or address in a `Host` header, without port and brackets."""
    return re.sub(r":[0-9]*$", "", host).strip("[]").removesuffix(".").lower()


class AdminListener:
    """The handler of an admin listener: the API, after authentication, and health and metrics."""

    def __init__(
        self, api: AdminApiHandler, health: HealthEndpoints, token_auth: TokenAuth | None
    ) -> None:
        self._api = api
        self._health = health
        self._token_auth = token_auth

    async def __call__(self, request: BaseRequest) -> StreamResponse:
        """Respond to a request."""
        try:
            path = request.raw_path.partition("?")[0]
            if self._health.has_path(path):
                if self._token_auth and path == "/metrics":
                    self._token_auth.check_metrics(request)
                response = await self._health.handle(request.method, path)
                assert isinstance(response.body, bytes)
                headers = {**COMMON_HEADERS, **response.headers}
                return Response(status=response.status, headers=headers, body=response.body)
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


async def listen(
    stack: AsyncExitStack,
    group: asyncio.TaskGroup,
    store_path: Path,
    settings: ServerSettings,
    api: AdminApiHandler,
    health: HealthEndpoints,
    sockets: Sequence[socket.socket] = (),
    tls: TlsContext | None = None,
) -> list[str]:
    """Listen on the socket in the store, which must be locked, and on TCP; return the addresses.

    Passed `sockets` replace the configured addresses; anyone who can connect to a passed Unix
    socket is trusted. With `tls`, addresses off loopback use https, to protect the token. The
    addresses returned are all except `admin.sock`. Raises `ConfigError` and `StorageError`.
    """
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
    trusted, checked = (
        Listener(
            AdminServer(AdminListener(api, health, auth)),
            "server.admin_listen",
            group,
            create_admin_limiter(),
        )
        for auth in (None, TokenAuth(tokens, hosts))
    )
    admin_socket = _bind_admin_socket(store_path, stack)
    _, *addresses = await trusted.open(stack, (), [admin_socket, *unix_sockets])
    for address in () if sockets else settings.admin_listen:
        addresses += await checked.open(stack, [address], tls=None if address.is_loopback else tls)
    for each in tcp_sockets:
        is_local = _is_bound_to_loopback(each)
        addresses += await checked.open(stack, (), [each], None if is_local else tls)
    stack.push_async_callback(api.close)
    for listener in (trusted, checked):
        stack.push_async_callback(listener.close)
    return addresses


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
