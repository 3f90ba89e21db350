"""Ports that a server keeps while it is stopped."""

import socket
import weakref


def reserve_port(owner: object) -> int:
    """Return a free port of 127.0.0.1 that only servers can bind as long as `owner` exists.

    While a server restarts, the kernel could give its port to an outgoing connection of another test.
    It does not give away a port to which a socket is bound. With SO_REUSEADDR, servers bind it as well.
    """
    reservation = socket.socket()
    weakref.finalize(owner, reservation.close)
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind(("127.0.0.1", 0))
    return int(reservation.getsockname()[1])
