"""A TCP relay with a limited rate, which counts the bytes that its server sends."""

import socket
import socketserver
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

CHUNK_SIZE = 1 << 16


class Relay:
    """Relays connections to `host:port`. `rate` is in bytes per second and connection; 0 is unlimited."""

    def __init__(self, target: str, rate: int) -> None:
        host, _, port = target.rpartition(":")
        self.rate = rate
        self.received = 0
        relay = self

        class RelayHandler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with suppress(OSError), socket.create_connection((host, int(port))) as server:
                    requests = threading.Thread(target=_copy, args=(self.request, server))
                    requests.start()
                    relay._copy_responses(server, self.request)
                    requests.join()

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), RelayHandler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def _copy_responses(self, server: socket.socket, client: socket.socket) -> None:
        try:
            while data := server.recv(CHUNK_SIZE):
                client.sendall(data)
                self.received += len(data)
                time.sleep(len(data) / self.rate if self.rate else 0)
        finally:
            client.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(CHUNK_SIZE):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
