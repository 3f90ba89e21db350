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
from proxy.server.admin.api import Api, error_response
from proxy.server.health import Admin
from proxy.server.listening import Listener, text_of
from proxy.server.tls import Tls

SOCKET = "admin.sock"

# What a form or a script of a foreign page may send without asking the browser's leave (Fetch standard, "CORS-safelisted
# request-header"); nothing at all is safelisted too.
_SAFELISTED = ("", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded")


class Gate:
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
        if request.method == "POST" and plain_type in _SAFELISTED:
            raise InvalidRequestError("a POST says what it sends (Content-Type: application/json)")


class Door:
    """The handler of an admin listener: the API behind the gate, and health and metrics beside it."""

    def __init__(self, api: Api, admin: Admin, gate: Gate | None) -> None:
        self._api = api
        self._admin = admin
        self._gate = gate

    async def __call__(self, request: BaseRequest) -> StreamResponse:
        """Answer any request."""
        try:
            if self._admin.has(request):
                return await self._admin.handle(request)
            if self._gate:
                self._gate.check(request)
        except ProxyError as error:
            return _refusal(error)
        return await self._api.handle(request)


def _refusal(error: ProxyError) -> Response:
    response = error_response(error)
    if isinstance(error, UnauthorizedError):
        response.headers[hdrs.WWW_AUTHENTICATE] = 'Bearer realm="pullcache"'
    # What is refused is not read.
    response.force_close()
    return response


async def listen(
    stack: AsyncExitStack,
    group: asyncio.TaskGroup,
    root: Path,
    settings: ServerSettings,
    api: Api,
    admin: Admin,
    sockets: Sequence[socket.socket] = (),
    tls: Tls | None = None,
) -> list[str]:
    """Open the socket in the store at `root`, whose lock is ours, and the TCP addresses; return these.

    Passed `sockets` take the place of the addresses: who can connect to a Unix socket is let in. With `tls`, what is
    off loopback speaks https, for the token is not for everybody.
    Raises `ConfigError` and `StorageError`.
    """
    token = settings.read_admin_token()
    for one in sockets:
        if not (token or _is_local(one) or is_loopback(one.getsockname()[0])):
            raise ConfigError(
                f"the admin socket that was passed, {text_of(one.getsockname())}, is open to other "
                "machines (set server.admin_token_file)"
            )
    local, remote = (
        Listener(Door(api, admin, gate), "server.admin_listen", group)
        for gate in (None, Gate(token))
    )
    bound = _bind(root, stack)
    _, *passed = await local.open(stack, (), [bound, *filter(_is_local, sockets)])
    others = [one for one in sockets if not _is_local(one)]
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


def _is_local(one: socket.socket) -> bool:
    return one.family == socket.AF_UNIX


def _bind(root: Path, stack: AsyncExitStack) -> socket.socket:
    """Return the bound socket `admin.sock` in `root`, which the stack removes. Raises `StorageError`."""
    try:
        # By way of the directory's descriptor: a socket's address holds 107 bytes, a path more.
        directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, directory)
        # A daemon that was killed has left its own; none lives, or we would not have the lock.
        _unlink(directory)
        bound = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        bound.setblocking(False)
        # Linux gives the file the socket's own mode, so there is no moment in which others can connect.
        os.fchmod(bound.fileno(), 0o600)
        bound.bind(f"/proc/self/fd/{directory}/{SOCKET}")
    except OSError as error:
        raise StorageError(f"{root}/{SOCKET} cannot be used: {error.strerror}") from error
    stack.callback(_unlink, directory)
    return bound


def _unlink(directory: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(SOCKET, dir_fd=directory)
