"""Whether a client still reads what it asked for."""

import asyncio
import socket
import struct
from collections.abc import Callable

# A reader that takes nothing for so long is dropped, in seconds.
READER_TIMEOUT = 60.0

_BYTES_ACKED = struct.Struct("=120xQ")  # tcpi_bytes_acked in Linux's struct tcp_info


class Watch:
    """Calls `on_silence` if a client takes nothing for a minute, unless it is cancelled before.

    A full buffer alone does not tell: whoever reads a megabyte in two minutes leaves it full for that long.
    """

    __slots__ = ("_on_silence", "_taken", "_timer", "_transport")

    def __init__(self, transport: asyncio.BaseTransport, on_silence: Callable[[], object]) -> None:
        self._transport = transport
        self._on_silence = on_silence
        # Most waits end at once, so nothing is asked of the system before half of the time is over.
        self._taken = -1
        self._wait()

    def cancel(self) -> None:
        """End the watch."""
        self._timer.cancel()

    def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(READER_TIMEOUT / 2, self._look)

    def _look(self) -> None:
        taken = _bytes_taken(self._transport)
        if taken == self._taken:
            self._on_silence()
            return
        self._taken = taken
        self._wait()


def _bytes_taken(transport: asyncio.BaseTransport) -> int:
    """Return how many bytes the other end of a TCP connection has acknowledged; 0 where nobody counts."""
    connection = transport.get_extra_info("socket")
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
    except OSError:
        return 0
    return int(_BYTES_ACKED.unpack(info)[0]) if len(info) == _BYTES_ACKED.size else 0
