"""The actor of a request to the admin API: a process on a Unix socket, or the bearer of a token."""

import os
import socket
import struct
from dataclasses import dataclass

from aiohttp.web import BaseRequest

from proxy.config.schema import AdminRole

_UCRED = struct.Struct("=iII")  # struct ucred of Linux: process, user, group


@dataclass(frozen=True, slots=True)
class Actor:
    """What is known of the sender of a request; `str` returns it as the log shows it.

    `token` is the name of the token. `user` and `process` are those of a process that has connected
    to a Unix socket (SO_PEERCRED); the process may have ended since. With neither, the request came
    over loopback while no token is configured. `origin` is how the user of a page was let in, if
    without a token.
    """

    role: AdminRole = "operate"
    token: str = ""
    user: int | None = None
    process: int | None = None
    origin: str = ""

    def __str__(self) -> str:
        if self.origin:
            return self.origin
        if self.user is not None:
            return f"uid {self.user} pid {self.process}"
        return f"token {self.token}" if self.token else "loopback"

    @property
    def is_trusted_local(self) -> bool:
        """Whether it is a process of the daemon's user or root.

        Such a client may open every file that the daemon may open.
        """
        return self.user in (0, os.geteuid())


def unix_actor(request: BaseRequest) -> Actor:
    """Return the actor of a request over a Unix socket, which may operate."""
    transport = request.transport
    connection = transport and transport.get_extra_info("socket")
    if not connection or connection.family != socket.AF_UNIX:
        return Actor()
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    process, user, _ = _UCRED.unpack(credentials)
    return Actor(user=user, process=process)
