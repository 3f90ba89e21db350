"""A server of static files that limits the rate of each connection, as most CDNs do.

    python -m tests.bench.throttled_server DIRECTORY BYTES_PER_SECOND

It prints its port. nginx cannot replace it: its limit_rate counts whole seconds, separately for each request, so
that requests for pieces of a few MiB would not be throttled.
"""

import os
import re
import sys
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

from tests.system.images import MANIFEST

CHUNK_SIZE = 64 << 10
RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class ThrottledHandler(BaseHTTPRequestHandler):
    """One connection. It sends a chunk at once and then waits until the next one is due."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    root: ClassVar[Path]
    rate: ClassVar[float]
    due = 0.0  # when the connection may send again, by the monotonic clock

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Print nothing: writing a line per request would affect the measurement."""

    def _answer(self) -> None:
        file = self.root / self.path.partition("?")[0].strip("/")
        if not file.exists():
            self._head(HTTPStatus.NOT_FOUND, 0)
            return
        if file.is_dir():  # /v2/
            self._head(HTTPStatus.OK, 0)
            return
        size = file.stat().st_size
        start, stop, status = 0, size, HTTPStatus.OK
        if requested := RANGE.fullmatch(self.headers.get("Range", "")):
            start = int(requested[1]) if requested[1] else size - int(requested[2])
            stop = min(size, int(requested[2]) + 1) if requested[1] and requested[2] else size
            status = HTTPStatus.PARTIAL_CONTENT
        is_manifest = file.parent.name == "manifests"
        self._head(
            status,
            stop - start,
            ("Content-Type", MANIFEST if is_manifest else "application/octet-stream"),
            *([("Content-Range", f"bytes {start}-{stop - 1}/{size}")] if requested else []),
        )
        if self.command == "GET":
            self._body(file, start, stop)

    def _head(self, status: HTTPStatus, length: int, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def _body(self, file: Path, start: int, stop: int) -> None:
        with file.open("rb") as source:
            while start < stop:
                wait = self.due - time.monotonic()
                if wait > 0:
                    time.sleep(wait)
                # A connection that was idle or slow may not catch up by sending faster.
                self.due = max(self.due, time.monotonic() - CHUNK_SIZE / self.rate)
                count = min(CHUNK_SIZE, stop - start)
                try:
                    sent = os.sendfile(self.connection.fileno(), source.fileno(), start, count)
                except OSError:
                    self.close_connection = True
                    return
                start += sent
                self.due += sent / self.rate


class ThrottledServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    ThrottledHandler.root = Path(sys.argv[1])
    ThrottledHandler.rate = float(sys.argv[2])
    server = ThrottledServer(("127.0.0.1", 0), ThrottledHandler)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
