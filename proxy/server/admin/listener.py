"""Where the admin API listens, and who is let in.

On `admin.sock` in the store the file's mode is the login: only the daemon's user connects. On TCP a token is, or
on loopback without one the promise that it is no web page that asks: browsers send requests to anybody's loopback.
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
from proxy.config.values import is_loopback
from proxy.errors import (
    ConfigError,
    DeniedError,
    InvalidRequestError,
    ProxyError,
    StorageError,
    UnauthorizedError,
)
from proxy.server.admin.api import AdminApiHandler, api_error_response
from proxy.server.admin.server import AdminServer
from proxy.server.health import HealthEndpoints
from proxy.server.listening import Listener, format_address
from proxy.server.tls import TlsContext

SOCKET_NAME = "admin.sock"

# What a form or a script of a foreign page may send without asking the browser's leave (Fetch standard, "CORS-safelisted
# request-header"); nothing at all is safelisted too.
_SAFELISTED_CONTENT_TYPES = (
    "",
    "text/plain",
    "multipart/form-data",
    "application/x-www-form-urlencoded",
)


class TokenAuth:
    """Judges requests that came by TCP. With a `token` that is all that counts."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def check(self, request: BaseRequest) -> None:
        """Raise `UnauthorizedError`, `DeniedError` or `InvalidRequestError` if it may not come in."""
        if self._token:
            scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
            given_bytes = given.strip().encode(errors="surrogateescape")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given_bytes, self._token):
                raise UnauthorizedError(
                    "the admin API wants the token of admin_token_file: Authorization: Bearer TOKEN"
                )
            return
        host = request.headers.get(hdrs.HOST, "")
        if not is_loopback(re.sub(r":[0-9]*$", "", host).strip("[]")):
            # A name that leads to loopback is how a web page rebinds its own (DNS rebinding).
            raise DeniedError("without a token the admin API is asked by address, or as localhost")
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and origin != f"{request.scheme}://{host}":
            raise DeniedError("the admin API does not answer to other sites' pages")
        plain_type = request.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip().lower()
        if request.method == "POST" and plain_type in _SAFELISTED_CONTENT_TYPES:
            raise InvalidRequestError("a POST says what it sends (Content-Type: application/json)")


class AdminListener:
    """The handler of an admin listener: the API behind the gate, and health and metrics beside it."""

    def __init__(
        self, api: AdminApiHandler, health: HealthEndpoints, token_auth: TokenAuth | None
    ) -> None:
        self._api = api
        self._health = health
        self._token_auth = token_auth

    async def __call__(self, request: BaseRequest) -> StreamResponse:
        """Answer any request."""
        try:
            path = request.raw_path.partition("?")[0]
            if self._health.has_path(path):
                answer = await self._health.handle(request.method, path)
                assert isinstance(answer.body, bytes)
                return Response(status=answer.status, headers=answer.headers, body=answer.body)
            if self._token_auth:
                self._token_auth.check(request)
        except ProxyError as error:
            return _rejection_response(error)
        return await self._api.handle(request)


def _rejection_response(error: ProxyError) -> Response:
    response = api_error_response(error)
    if isinstance(error, UnauthorizedError):
        response.headers[hdrs.WWW_AUTHENTICATE] = 'Bearer realm="pullcache"'
    # What is refused is not read.
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
    """Open the socket in the store at `root`, whose lock is ours, and the TCP addresses; return these.

    Passed `sockets` take the place of the addresses: who can connect to a Unix socket is let in. With `tls`, what is
    off loopback speaks https, for the token is not for everybody.
    Raises `ConfigError` and `StorageError`.
    """
    token = settings.read_admin_token()
    for one in sockets:
        if not (token or _is_unix_socket(one) or is_loopback(one.getsockname()[0])):
            raise ConfigError(
                f"the admin socket that was passed, {format_address(one.getsockname())}, is open to other "
                "machines (set server.admin_token_file)"
            )
    local, remote = (
        Listener(AdminServer(AdminListener(api, health, gate)), "server.admin_listen", group)
        for gate in (None, TokenAuth(token))
    )
    bound = _bind_admin_socket(store_path, stack)
    _, *passed = await local.open(stack, (), [bound, *filter(_is_unix_socket, sockets)])
    others = [one for one in sockets if not _is_unix_socket(one)]
    opened: list[str] = []
    for address in () if sockets else settings.admin_listen:
        opened += await remote.open(stack, [address], tls=None if address.is_loopback else tls)
    for one in others:
        is_near = is_loopback(one.getsockname()[0])
        opened += await remote.open(stack, (), [one], None if is_near else tls)
    stack.push_async_callback(api.close)
    for listener in (local, remote):
        stack.push_async_callback(listener.close)
    return [*passed, *opened]


def _is_unix_socket(sock: socket.socket) -> bool:
    return sock.family == socket.AF_UNIX


def _bind_admin_socket(store_path: Path, stack: AsyncExitStack) -> socket.socket:
    """Return the bound socket `admin.sock` in `root`, which the stack removes. Raises `StorageError`."""
    try:
        # By way of the directory's descriptor: a socket's address holds 107 bytes, a path more.
        directory = os.open(store_path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, directory)
        # A daemon that was killed has left its own; none lives, or we would not have the lock.
        _unlink_socket(directory)
        bound = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        bound.setblocking(False)
        # Linux gives the file the socket's own mode, so there is no moment in which others can connect.
        os.fchmod(bound.fileno(), 0o600)
        bound.bind(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
    except OSError as error:
        raise StorageError(
            f"{store_path}/{SOCKET_NAME} cannot be used: {error.strerror}"
        ) from error
    stack.callback(_unlink_socket, directory)
    return bound


def _unlink_socket(directory_fd: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(SOCKET_NAME, dir_fd=directory_fd)
